"""Two live processes, one killed, stopped or cancelled: never wrong, never hung, never written to late."""

import gc
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
from ucx_owners import PeerUcxOwner, UcxRegionOwner, end_all

from kvmarket.deadline import Deadline
from kvmarket.errors import PeerGoneError, TransferError, TransportUnavailableError
from kvmarket.region.pages import PagedMemory
from kvmarket.report import MissReason
from kvmarket.testing.region_owner import page_bytes_of, pattern_page
from kvmarket.transport import ReadRequest, ucx_peer, ucx_read
from kvmarket.transport.ucx import UcxTransport

PAGES, PAGE_BYTES = 512, 256 << 10
TCP, CMA = {"UCX_TLS": "tcp"}, {}
RMA = {"direct": False}
"""The same lanes as `CMA`, with UCX itself doing the reads, as it does over RDMA."""
EVERY = pytest.mark.parametrize("lanes", [TCP, CMA, RMA], ids=["tcp", "cma", "rma"])


class Setting:
    """An owner in another process, a connection to it, and memory to read into."""

    def __init__(self, peers, environ, pages=PAGES):
        environ = dict(environ)
        direct = environ.pop("direct", True)
        self.owner = PeerUcxOwner(peers.spawn(), environ)
        self.lent = self.owner.lend_pattern(pages, PAGE_BYTES)
        self.generations = self.owner.validate(0, list(range(pages)))
        self.transport = UcxTransport({}, direct=direct)
        self.connection = self.transport.connect(self.lent.owner, self.lent.descriptor)
        self.local = PagedMemory.packed(np.zeros((pages, PAGE_BYTES), np.uint8))
        self.arrived = []
        self.pages = np.arange(pages)

    def read(self, deadline_s=20.0, on_first=None, deadline=None):
        """Read everything; `on_first` runs once when the first group is in."""

        def on_group(indices):
            first = not self.arrived
            self.arrived.extend(indices.tolist())
            if first and on_first is not None:
                on_first()

        self.arrived.clear()
        request = ReadRequest(self.pages, self.generations, self.local, self.pages)
        return self.connection.read(request, deadline=deadline or Deadline(deadline_s), on_group=on_group)

    def nothing_wrong(self):
        return all(page_bytes_of(self.local, page) == pattern_page(page, PAGE_BYTES) for page in self.arrived)

    def memory_stays(self, seconds):
        """Tell whether nothing writes to local memory for a while."""
        before = self.local.memories[0].copy()
        time.sleep(seconds)
        return bool((before == self.local.memories[0]).all())


@pytest.fixture
def setting(peers, monkeypatch):
    made = []

    def make(environ, **options):
        for name in environ.keys() - {"direct"}:
            monkeypatch.setenv(name, environ[name])
        made.append(Setting(peers, environ, **options))
        return made[-1]

    yield make
    end_all(made)


@EVERY
def test_an_owner_killed_in_mid_transfer_is_a_miss_within_a_second(setting, lanes):
    world = setting(lanes)
    killed = []

    def kill():
        world.owner.peer.kill()
        killed.append(time.monotonic())

    with pytest.raises((PeerGoneError, TransferError)):
        world.read(on_first=kill)
    assert time.monotonic() - killed[0] < 1.0
    assert world.nothing_wrong()
    assert world.memory_stays(0.05)
    began = time.monotonic()
    with pytest.raises((PeerGoneError, TransferError)):
        world.read()
    assert time.monotonic() - began < 1.5
    with pytest.raises(TransportUnavailableError):
        world.transport.connect(world.lent.owner, world.lent.descriptor)


def test_a_stopped_owner_is_given_up_within_the_heartbeat(setting):
    world = setting(TCP)
    stopped = []

    def stop():
        world.owner.peer.signal(signal.SIGSTOP)
        stopped.append(time.monotonic())

    with pytest.raises((PeerGoneError, TransferError)):
        world.read(on_first=stop)
    assert time.monotonic() - stopped[0] < 1.3
    assert world.nothing_wrong()
    before = world.local.memories[0].copy()
    world.owner.peer.signal(signal.SIGCONT)
    time.sleep(0.3)
    assert (world.local.memories[0] == before).all(), "the owner went on writing after it was given up"
    report = world.read()  # the same connection object finds its way back
    assert report.refused == {}
    assert world.nothing_wrong()


@pytest.mark.parametrize(("lanes", "path"), [(CMA, "cma(cma"), (RMA, "rma(cma")], ids=["cma", "rma"])
def test_a_stopped_owner_is_read_all_the_same_where_reads_are_one_sided(setting, lanes, path):
    world = setting(lanes)
    report = world.read(on_first=lambda: world.owner.peer.signal(signal.SIGSTOP))
    assert report.refused == {}
    assert report.path.startswith(path)
    assert len(world.arrived) == PAGES
    assert world.nothing_wrong()


def test_connecting_to_a_stopped_owner_ends_in_time(setting):
    world = setting(TCP, pages=4)
    world.owner.peer.signal(signal.SIGSTOP)
    other = UcxTransport({}, connect_s=1.0)
    began = time.monotonic()
    with pytest.raises(TransportUnavailableError, match="does not answer: no connection within 1 s"):
        other.connect(world.lent.owner, world.lent.descriptor)
    seconds = time.monotonic() - began
    other.close()
    assert 0.9 < seconds < 3


def test_a_slow_connection_serves_who_comes_after_the_one_whose_deadline_it_missed(setting):
    """Nor does the heartbeat cut it: it begins when the owner has answered once."""
    world = setting(TCP, pages=4)
    world.owner.peer.signal(signal.SIGSTOP)
    other = UcxTransport({}, connect_s=20.0)
    began = time.monotonic()
    with pytest.raises(TransportUnavailableError, match="does not answer yet"):
        other.connect(world.lent.owner, world.lent.descriptor, Deadline(0.2))
    assert time.monotonic() - began < 0.7
    time.sleep(ucx_peer.HEARTBEAT_S + 0.2)
    began = time.monotonic()
    with pytest.raises(TransportUnavailableError, match="does not answer yet"):
        other.connect(world.lent.owner, world.lent.descriptor)
    assert time.monotonic() - began < 0.2, "the next one does not wait for it again"
    world.owner.peer.signal(signal.SIGCONT)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            other.connect(world.lent.owner, world.lent.descriptor)
            break
        except TransportUnavailableError:
            time.sleep(0.02)
    else:
        pytest.fail("it was never connected")
    assert world.owner.sessions() == 2, "it is the first attempt's connection"
    other.close()


@EVERY
def test_a_cancelled_read_returns_soon_and_nothing_is_written_after_it(setting, lanes):
    world = setting(lanes)
    deadline = Deadline(20)
    report = world.read(deadline=deadline, on_first=deadline.cancel)
    assert set(report.refused.values()) == {MissReason.DEADLINE}
    assert world.memory_stays(0.2)
    assert world.nothing_wrong()
    assert world.read().refused == {}
    assert world.nothing_wrong()


def test_cancelling_while_the_owner_is_stopped_cuts_the_connection_and_frees_the_memory(setting):
    world = setting(TCP)
    deadline = Deadline(20)
    cancelled = []

    def stop_then_cancel():
        world.owner.peer.signal(signal.SIGSTOP)
        deadline.cancel()
        cancelled.append(time.monotonic())

    report = world.read(deadline=deadline, on_first=stop_then_cancel)
    assert time.monotonic() - cancelled[0] < ucx_read.DRAIN_S + 0.5
    assert report.refused
    before = world.local.memories[0].copy()
    world.owner.peer.signal(signal.SIGCONT)
    time.sleep(0.3)
    assert (world.local.memories[0] == before).all()
    assert world.nothing_wrong()
    assert world.read().refused == {}


def test_deadlines_hold_while_the_owner_is_stopped(setting):
    world = setting(TCP)
    world.owner.peer.signal(signal.SIGSTOP)
    began = time.monotonic()
    report = world.read(deadline_s=0.3)
    assert 0.25 < time.monotonic() - began < 0.3 + ucx_read.DRAIN_S + 0.3
    assert report.refused == dict.fromkeys(range(PAGES), MissReason.DEADLINE)


@pytest.mark.parametrize("lanes", [TCP, RMA], ids=["tcp", "rma"])
def test_bytes_in_flight_are_bounded(setting, lanes):
    world = setting(lanes)
    budget = world.transport._budget
    seen, stop = [0], threading.Event()

    def look():
        while not stop.wait(0.0005):
            seen[0] = max(seen[0], budget.taken)

    watcher = threading.Thread(target=look)
    watcher.start()
    world.read()
    stop.set()
    watcher.join()
    assert 0 < seen[0] <= ucx_read.WINDOW * ucx_read.GROUP_BYTES
    assert budget.taken == 0


@EVERY
def test_an_idle_connection_uses_no_cpu(setting, lanes):
    world = setting(lanes, pages=8)
    world.read()
    time.sleep(0.1)
    before = time.process_time()
    owner = world.owner.cpu_seconds(1.0)
    reader = time.process_time() - before
    assert owner < 0.01
    assert reader < 0.02, "more than the call that asked the owner"


def test_readers_leave_no_trace_at_the_owner(setting):
    world = setting(TCP, pages=4)
    for _ in range(5):
        other = UcxTransport({})
        other.connect(world.lent.owner, world.lent.descriptor)
        other.close()
    end = time.monotonic() + 5
    while world.owner.sessions() > 1 and time.monotonic() < end:
        time.sleep(0.02)
    assert world.owner.sessions() == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_neither_uses_nor_destroys_what_it_inherited(setting):
    """Its copy of the worker has the parent's shared memory and sockets."""
    world, owner = setting(CMA, pages=8), UcxRegionOwner()
    world.read()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            world.connection.close()
            world.transport.close()
            owner.close()
            del world, owner
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    world.arrived.clear()
    world.read()
    assert len(world.arrived) == 8
    owner.close()


def test_what_was_closed_is_gone_before_garbage_is_collected():
    """UCX must not be torn down by whichever thread happens to collect garbage."""

    def parts():
        names = Counter(type(thing).__name__ for thing in gc.get_objects())
        return {name: names[name] for name in ("UCXWorker", "UCXListener", "UCXEndpoint")}

    gc.collect()
    before = parts()
    gc.disable()
    try:
        owner, reader = UcxRegionOwner(), UcxTransport({})
        try:
            lent = owner.lend_pattern(4, PAGE_BYTES)
            reader.connect(lent.owner, lent.descriptor)
            assert parts()["UCXListener"] > before["UCXListener"]
        finally:
            reader.close()
            owner.close()
        assert parts() == before
    finally:
        gc.enable()
