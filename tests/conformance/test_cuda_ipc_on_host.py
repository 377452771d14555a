"""The CUDA transport with host memory in the place of the card's: everything but CUDA itself."""

from dataclasses import replace

import numpy as np
import pytest

from kvmarket.deadline import Deadline
from kvmarket.errors import MissingExtraError, PeerGoneError, RegistrationError, TransportUnavailableError
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.region.pages import PagedMemory, PageLayout
from kvmarket.registry.host import boot_id, pid_namespace
from kvmarket.testing.cuda_owner import CudaRegionOwner, PeerCudaOwner
from kvmarket.testing.cuda_suite import CudaConformance
from kvmarket.transport import ReadRequest
from kvmarket.transport.cuda_ipc import CudaExports, CudaIpcTransport


class TestBetweenProcesses(CudaConformance):
    real = False

    @pytest.fixture
    def owner(self, peers):
        return PeerCudaOwner(peers.spawn(), real=False)

    def test_an_allocation_is_mapped_once_for_all_its_memories(self, card, transport, owner, monkeypatch):
        opened = []
        original = card.api.open
        monkeypatch.setattr(card.api, "open", lambda *args: opened.append(args) or original(*args))
        lents = [owner.lend(PageLayout.packed(2, 64), [128], [b"a" * 64] * 2) for _ in range(2)]

        def connect(lent):
            connection = transport.connect(lent.owner, lent.descriptor)
            connection.prepare()
            return connection

        connections = [connect(lents[0]) for _ in range(3)]
        assert len(opened) == 2, "one for the probe and one for the pages"
        connections.append(connect(lents[1]))
        assert len(opened) == 4
        for connection in connections:
            connection.close()
        del connections, connection
        opened.clear()
        connect(lents[0]).close()
        assert len(opened) == 2, "what nobody uses is not kept"

    def test_a_probe_of_the_card_that_reads_other_bytes_lets_nothing_be_read(self, card, transport, owner):
        lents = [owner.lend(PageLayout.packed(1, 64), [64], [b"a" * 64]) for _ in range(2)]
        swapped = replace(lents[0].descriptor, cuda=(lents[1].descriptor.cuda[0], *lents[0].descriptor.cuda[1:]))
        connection = transport.connect(lents[0].owner, swapped)
        local = card.memory(PageLayout.packed(1, 64), [64])
        request = ReadRequest(np.zeros(1, np.int64), owner.validate(0, [0]), local, np.zeros(1, np.int64))
        for use in (
            connection.prepare,
            lambda: connection.prepare(local),
            lambda: connection.stream(local),
            lambda: connection.read(request, deadline=Deadline(1)),
        ):
            with pytest.raises(PeerGoneError, match="probe"):
                use()
        assert (local.memories[0] == 0xAB).all()
        connection.close()

    def test_connecting_and_asking_what_is_fresh_maps_nothing(self, card, transport, owner, monkeypatch):
        lent = owner.lend(PageLayout.packed(2, 64), [128], [b"a" * 64, b"b" * 64])
        generations = np.asarray(owner.validate(0, [0, 1]), np.uint64)
        used = []
        for name in ("open", "peer_access", "download", "make_current", "allocate"):
            original = getattr(card.api, name)
            monkeypatch.setattr(
                card.api, name, lambda *args, name=name, original=original: used.append(name) or original(*args)
            )
        connection = transport.connect(lent.owner, lent.descriptor)
        assert connection.fresh(np.arange(2), generations).tolist() == [True, True]
        assert connection.fresh(np.arange(2), generations + np.uint64(2)).tolist() == [False, False]
        assert used == [], "these need a context of the card"
        connection.prepare()
        assert set(used) == {"peer_access", "open", "download"}
        connection.close()

    def test_memory_that_cannot_be_mapped_is_out_of_reach_and_that_of_the_dead_is_gone(
        self, card, transport, owner, monkeypatch
    ):
        def invalid(*_):
            raise TransportUnavailableError("the owner's allocation cannot be mapped", scheme="cuda_ipc")

        monkeypatch.setattr(card.api, "open", invalid)
        lent = owner.lend(PageLayout.packed(1, 64), [64], [b"a" * 64])
        connection = transport.connect(lent.owner, lent.descriptor)
        with pytest.raises(TransportUnavailableError, match="cannot be mapped"):
            connection.prepare()
        owner.peer.kill()
        with pytest.raises(PeerGoneError):
            connection.prepare()
        connection.close()

    def test_host_targets_are_refused(self, transport, owner):
        lent = owner.lend(PageLayout.packed(1, 64), [64], [b"a" * 64])
        connection = transport.connect(lent.owner, lent.descriptor)
        assert connection.fills == {"cuda"}
        local = PagedMemory.packed(np.zeros((1, 64), np.uint8))
        request = ReadRequest(np.zeros(1, np.int64), owner.validate(0, [0]), local, np.zeros(1, np.int64))
        with pytest.raises(TransportUnavailableError, match="CUDA memory"):
            connection.read(request, deadline=Deadline(1))
        connection.close()

    def test_without_the_extra_the_refusal_says_what_to_install(self, owner):
        def missing():
            raise MissingExtraError("cupy", "cuda13")

        lent = owner.lend(PageLayout.packed(1, 64), [64], [b"a" * 64])
        with pytest.raises(TransportUnavailableError, match=r"kvmarket\[cuda13\]"):
            CudaIpcTransport(boot_id(), pid_namespace(), missing).connect(lent.owner, lent.descriptor)


class TestWithinOneProcess(CudaConformance):
    real = False

    @pytest.fixture
    def owner(self):
        owner = CudaRegionOwner(real=False)
        yield owner
        owner.close()

    def unreachable(self, lent):
        return []

    def vanish(self, owner):
        owner.close()

    def test_nothing_is_mapped(self, card, transport, owner, monkeypatch):
        monkeypatch.setattr(card.api, "open", None)
        lent = owner.lend(PageLayout.packed(2, 64), [128], [b"a" * 64, b"b" * 64])
        connection = transport.connect(lent.owner, lent.descriptor)
        assert connection.path == "kernel(same process)"
        connection.close()


class TestOnABusyCard(TestWithinOneProcess):
    """Its copies have not ended before they are waited for, where those of the others have at once."""

    @pytest.fixture(autouse=True)
    def busy(self, card):
        card.api.busy = True


def test_descriptors_travel_and_older_ones_are_host_memory():
    owner = CudaRegionOwner(real=False)
    descriptor = owner.lend(PageLayout.packed(2, 64), [128], [b"a" * 64] * 2).descriptor
    wire = descriptor.to_wire()
    assert RegionDescriptor.from_wire(wire) == descriptor
    assert (descriptor.kind, descriptor.digest, len(descriptor.cuda)) == ("cuda", "sum128", 2)
    older = {key: value for key, value in wire.items() if key not in {"memory_kind", "cuda", "digest"}}
    decoded = RegionDescriptor.from_wire(older)
    assert (decoded.kind, decoded.cuda, decoded.digest) == ("host", (), "xxh3_128")
    owner.close()


def test_memory_that_cannot_be_exported_is_not_lent():
    owner = CudaRegionOwner(real=False)
    memory = owner.card.memory(PageLayout.packed(1, 64), [64])
    owner.card.api.exportable = False
    with pytest.raises(RegistrationError):
        CudaExports(memory)
    owner.close()
