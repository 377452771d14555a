"""The CUDA transport with host memory in the place of the card's: everything but CUDA itself."""

from dataclasses import replace

import numpy as np
import pytest

from kvmarket.deadline import Deadline
from kvmarket.errors import MissingExtraError, RegistrationError, TransportUnavailableError
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
        connections = [transport.connect(lents[0].owner, lents[0].descriptor) for _ in range(3)]
        assert len(opened) == 2, "one for the probe and one for the pages"
        connections.append(transport.connect(lents[1].owner, lents[1].descriptor))
        assert len(opened) == 4
        for connection in connections:
            connection.close()
        del connections, connection
        opened.clear()
        transport.connect(lents[0].owner, lents[0].descriptor).close()
        assert len(opened) == 2, "what nobody uses is not kept"

    def test_a_probe_of_the_card_that_reads_other_bytes_is_no_connection(self, transport, owner):
        lents = [owner.lend(PageLayout.packed(1, 64), [64], [b"a" * 64]) for _ in range(2)]
        swapped = replace(lents[0].descriptor, cuda=(lents[1].descriptor.cuda[0], *lents[0].descriptor.cuda[1:]))
        with pytest.raises(Exception, match="probe"):
            transport.connect(lents[0].owner, swapped)

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
