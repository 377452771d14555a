"""The conformance suite and the worst of days over RDMA: rc_verbs lanes, with the card's own packet counters as proof.

They take an RDMA device, a UCX with verbs that is told to use it, and the address of the device's network in
``KVMARKET_TEST_VERBS_ADDRESS``; `make test-verbs` brings all that about in a guest.
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from ucx_owners import PeerUcxOwner, UcxRegionOwner, in_ucx_peer
from ucx_suite import CONNECT_S, OneSidedConformance, TwoSidedConformance

from kvmarket.deadline import Deadline
from kvmarket.errors import PeerGoneError, TransferError
from kvmarket.region.pages import PagedMemory
from kvmarket.testing.region_owner import page_bytes_of, pattern_page
from kvmarket.transport import ReadRequest
from kvmarket.transport.ucx import UcxTransport

ADDRESS = os.environ.get("KVMARKET_TEST_VERBS_ADDRESS", "")
PAGES, PAGE_BYTES = 128, 256 << 10  # four groups: two are asked for before the first is in
MTU_MAX = 4096
SLOWER = 50.0
DEVICES = Path("/sys/class/infiniband")


@pytest.fixture(scope="module", autouse=True)
def device(request):
    """The one RDMA device that the tests use."""
    active = [path.parents[2] for path in DEVICES.glob("*/ports/1/state") if "ACTIVE" in path.read_text()]
    if active and ADDRESS:
        return active[0]
    why = "no RDMA device with an address to test over: see make test-verbs"
    if request.config.getoption("--require-verbs", default=False):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture
def counters(device):
    """Return a function that tells how much the device's counters have grown since it was called last."""
    directory = device / "ports/1/hw_counters"
    names = ("sent_pkts", "rcvd_pkts", "rdma_sends")

    def look():
        return {name: int((directory / name).read_text()) for name in names}

    last = look()

    def grown():
        nonlocal last
        before, last = last, look()
        return {name: last[name] - before[name] for name in names}

    return grown


class OwnerHere(UcxRegionOwner):
    """An owner that gives an emulated machine time to read between two rewritings."""

    def __init__(self):
        super().__init__(addresses=(ADDRESS,))

    def start_rewriting(self, region):
        super().start_rewriting(region, SLOWER)


class OwnerThere(PeerUcxOwner):
    """The same in another process."""

    def __init__(self, peer):
        super().__init__(peer, addresses=(ADDRESS,))

    def start_rewriting(self, region):
        return self.peer.call(in_ucx_peer, self.environ, self.addresses, "start_rewriting", region, SLOWER)


class Counted:
    """Tests of bytes must move packets through the device; the transports below refuse connections without RDMA."""

    @pytest.fixture(autouse=True)
    def packets(self, request, counters):
        yield
        grown = counters()
        if "arrive" in request.node.name:
            assert grown["sent_pkts"] > 0
            assert grown["rcvd_pkts"] > 0


class TestTwoSidedOverVerbs(Counted, TwoSidedConformance):
    @pytest.fixture
    def transport(self):
        transport = UcxTransport({}, require="rdma", one_sided=False, connect_s=CONNECT_S)
        yield transport
        transport.close()

    @pytest.fixture
    def owner(self):
        owner = OwnerHere()
        yield owner
        owner.close()


class TestOneSidedOverVerbs(Counted, OneSidedConformance):
    @pytest.fixture
    def transport(self):
        transport = UcxTransport({}, require="one_sided", connect_s=CONNECT_S)
        yield transport
        transport.close()

    @pytest.fixture
    def owner(self, peers):
        return OwnerThere(peers.spawn())


class Setting:
    """An owner in another process, a connection to it, and memory to read into."""

    def __init__(self, peer, *, one_sided):
        self.owner = OwnerThere(peer)
        self.lent = self.owner.lend_pattern(PAGES, PAGE_BYTES)
        self.generations = self.owner.validate(0, list(range(PAGES)))
        self.transport = UcxTransport({}, require="rdma", one_sided=one_sided, connect_s=CONNECT_S)
        self.connection = self.transport.connect(self.lent.owner, self.lent.descriptor)
        self.local = PagedMemory.packed(np.zeros((PAGES, PAGE_BYTES), np.uint8))
        self.arrived = []

    def read(self, on_first=None):
        def on_group(indices):
            first = not self.arrived
            self.arrived.extend(indices.tolist())
            if first and on_first is not None:
                on_first()

        self.arrived.clear()
        pages = np.arange(PAGES)
        request = ReadRequest(pages, self.generations, self.local, pages)
        return self.connection.read(request, deadline=Deadline(20.0), on_group=on_group)

    def nothing_wrong(self):
        return all(page_bytes_of(self.local, page) == pattern_page(page, PAGE_BYTES) for page in self.arrived)


@pytest.fixture(params=[False, True], ids=["am", "rma"])
def setting(request, peers):
    world = Setting(peers.spawn(), one_sided=request.param)
    world.kind = "rma" if request.param else "am"
    yield world
    if world.owner.peer.running:
        world.owner.peer.signal(signal.SIGCONT)
    world.transport.close()


def test_the_report_names_the_lanes_and_the_device_counts_the_packets(setting, device, counters):
    counters()
    report = setting.read()
    grown = counters()
    assert report.refused == {}
    assert len(setting.arrived) == PAGES
    assert setting.nothing_wrong()
    print(setting.kind, report.path, grown)  # with -s: what was seen
    assert report.path.startswith(f"{setting.kind}(")
    assert f"rc_verbs/{device.name}:1" in report.path
    least = PAGES * PAGE_BYTES // MTU_MAX
    assert grown["sent_pkts"] >= least
    assert grown["rcvd_pkts"] >= least


def test_one_sided_reads_are_reads_and_not_messages(setting, device, counters):
    """The device counts sends apart: bytes that arrive without them were read. Pings of a slow read are sends, too.

    soft-RoCE counts no read requests by themselves; where a device does (``rx_read_requests`` of mlx5), that is proof.
    """
    directory = device / "ports/1/hw_counters"
    print(sorted(path.name for path in directory.iterdir()))  # with -s: what there is
    reads = directory / "rx_read_requests"
    reads_before = int(reads.read_text()) if reads.exists() else 0
    setting.read()
    counters()
    setting.read()
    grown = counters()
    print(setting.kind, grown)  # with -s: what was seen
    assert grown["rcvd_pkts"] >= PAGES * PAGE_BYTES // MTU_MAX
    if setting.kind == "rma":
        assert grown["rdma_sends"] < PAGES
        assert not reads.exists() or int(reads.read_text()) > reads_before
    else:
        assert grown["rdma_sends"] >= PAGES


def test_a_stopped_owner_is_read_all_the_same(setting):
    if setting.kind != "rma":
        pytest.skip("two-sided reads need their owner")
    report = setting.read(on_first=lambda: setting.owner.peer.signal(signal.SIGSTOP))
    assert report.refused == {}
    assert len(setting.arrived) == PAGES
    assert setting.nothing_wrong()


def test_an_owner_that_is_killed_in_mid_transfer_is_a_miss(setting):
    killed = []

    def kill():
        setting.owner.peer.kill()
        killed.append(time.monotonic())

    with pytest.raises((PeerGoneError, TransferError)):
        setting.read(on_first=kill)
    assert time.monotonic() - killed[0] < 5  # soft-RoCE in an emulated machine: no figure of speed
    assert setting.nothing_wrong()
    before = setting.local.memories[0].copy()
    time.sleep(0.2)
    assert (before == setting.local.memories[0]).all(), "memory was written to after the read had returned"
