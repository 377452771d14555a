"""Large reads over CMA lanes, which two threads share: every page once and right, and an end to every failure."""

import os
import threading
import time

import numpy as np
import pytest
from ucx_owners import PeerUcxOwner, end_all

from kvmarket.announced import Announced
from kvmarket.deadline import Deadline
from kvmarket.errors import PeerGoneError, TransferError
from kvmarket.helper import Helper
from kvmarket.region.pages import PagedMemory
from kvmarket.registry.records import NO_DIGEST, make_records
from kvmarket.report import MissReason
from kvmarket.shared_read import SharedRead
from kvmarket.testing.region_owner import pattern_page
from kvmarket.transport import ReadRequest, ucx_cma
from kvmarket.transport.ucx import UcxTransport
from kvmarket.transport.ucx_connect import PeerTable
from kvmarket.verification import Verification

PAGES, PAGE_BYTES = 512, 64 << 10
several_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nobody helps on one core")


@pytest.fixture
def helper():
    helper = Helper()
    helper.submit(lambda: None).result(10)
    yield helper
    helper.close()


class World:
    """An owner in another process, and a connection to it."""

    def __init__(self, peers, **options):
        self.owner = PeerUcxOwner(peers.spawn())
        self.lent = self.owner.lend_pattern(PAGES, PAGE_BYTES)
        self.generations = self.owner.validate(0, list(range(PAGES)))
        self.transport = UcxTransport({}, **{"cma_readers": 2, **options})
        self.connection = self.transport.connect(self.lent.owner, self.lent.descriptor)
        self.order = np.random.default_rng(3).permutation(PAGES)
        self.expected = np.stack([np.frombuffer(pattern_page(int(p), PAGE_BYTES), np.uint8) for p in self.order])

    def reading(self, deadline=None):
        out = np.zeros((PAGES, PAGE_BYTES), np.uint8)
        local, targets = PagedMemory.packed(out), np.arange(PAGES)
        generations = self.generations[self.order]
        digests = np.full(PAGES, np.void(NO_DIGEST))
        records = make_records(1, 0, self.order, generations, digests)
        request = ReadRequest(self.order, generations, local, targets)
        shared = SharedRead(
            self.connection,
            request,
            deadline or Deadline(30.0),
            Verification("none", Announced.of(records), local, targets),
        )
        return out, shared


@pytest.fixture
def world(peers):
    made = []

    def make(**options):
        made.append(World(peers, **options))
        return made[-1]

    yield make
    end_all(made)


@pytest.fixture
def together(monkeypatch):
    """The first copy of pages waits until the other thread has come, however busy the machine is."""
    read_group = ucx_cma.CmaRegion._read_group
    names, both = set(), threading.Event()

    def wait_then_read(region, request, copy, indices):
        names.add(threading.current_thread().name)
        if len(names) > 1:
            both.set()
        assert both.wait(30), "nobody helped"
        return read_group(region, request, copy, indices)

    monkeypatch.setattr(ucx_cma.CmaRegion, "_read_group", wait_then_read)
    return both


def test_only_the_kernels_copies_are_shared(world):
    assert world().connection.readers(None) == 2
    assert world(cma_readers=1).connection.readers(None) == 1
    assert world(direct=False).connection.readers(None) == 1
    assert world(one_sided=False).connection.readers(None) == 1


@several_cores
def test_two_threads_read_every_page_once_and_right(world, helper, together):
    one = world()
    out, shared = one.reading()
    report = shared.run(helper)
    assert (report.pages, report.nbytes, report.refused) == (PAGES, PAGES * PAGE_BYTES, {})
    assert report.path.startswith("cma(")
    assert (out == one.expected).all()
    assert shared.threads == 2


def test_many_threads_on_one_connection_get_what_they_asked_for(world):
    """Reads of their own pages, of other pages and of stale ones, all at the same time."""
    one = world()
    problems = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for turn in range(12):
            pages = rng.permutation(PAGES)[: int(rng.integers(1, 200))]
            generations = one.generations[pages].copy()
            stale = turn % 3 == 2
            if stale:
                generations[-1] += 2
            out = np.zeros((len(pages), PAGE_BYTES), np.uint8)
            request = ReadRequest(pages, generations, PagedMemory.packed(out), np.arange(len(pages)))
            report = one.connection.read(request, deadline=Deadline(30.0))
            good = len(pages) - stale
            right = all(out[i].tobytes() == pattern_page(int(pages[i]), PAGE_BYTES) for i in range(good))
            if report.pages != good or not right or len(report.refused) != stale:
                problems.append((seed, turn, report))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert problems == []


@several_cores
def test_a_page_withdrawn_in_mid_read_is_refused_and_ends_the_read(world, helper, together):
    one = world()
    out, shared = one.reading()
    victim = int(one.order[PAGES // 2])
    one.owner.invalidate(0, [victim])
    report = shared.run(helper)
    assert set(report.refused.values()) == {MissReason.STALE_GENERATION}
    first = min(report.refused)
    assert first == PAGES // 2
    assert (out[:first] == one.expected[:first]).all()


@several_cores
def test_an_owner_killed_while_two_threads_read_ends_both(world, helper, together, monkeypatch):
    one = world()
    out, shared = one.reading()
    killed = []
    read_group = ucx_cma.CmaRegion._read_group

    def kill_then_read(region, request, copy, indices):
        if together.is_set() and not killed:
            killed.append(time.monotonic())
            one.owner.peer.kill()
        return read_group(region, request, copy, indices)

    monkeypatch.setattr(ucx_cma.CmaRegion, "_read_group", kill_then_read)
    with pytest.raises((PeerGoneError, TransferError)):
        shared.run(helper)
    assert time.monotonic() - killed[0] < 5
    before = out.copy()
    time.sleep(0.05)
    assert (out == before).all(), "somebody still writes"
    _, again = one.reading()
    with pytest.raises((PeerGoneError, TransferError)):
        again.run(helper)


@several_cores
def test_a_connection_cut_between_reads_is_made_again_once_for_both_threads(world, helper, together, monkeypatch):
    one = world()
    peer = one.connection._way.peer
    one.transport.driver.call(lambda: peer.close("cut by the test"), 5.0)
    assert peer.dead
    opened = []
    connect = PeerTable._connect
    monkeypatch.setattr(PeerTable, "_connect", lambda *args: opened.append(1) or connect(*args))
    out, shared = one.reading()
    report = shared.run(helper)
    assert report.pages == PAGES
    assert (out == one.expected).all()
    assert len(opened) == 1
    assert one.connection._way.peer is not peer


def test_where_the_kernel_does_not_allow_it_any_more_reads_go_on_by_ucx(world, helper, monkeypatch):
    """The direct way is refused at the reconnection: one thread reads on, through UCX's own one-sided reads."""
    one = world()
    peer = one.connection._way.peer
    one.transport.driver.call(lambda: peer.close("cut by the test"), 5.0)

    def refuse(region, remote, local):
        raise TransferError("not permitted", scheme="ucx")

    monkeypatch.setattr(ucx_cma.CmaRegion, "_copy", refuse)
    out, shared = one.reading()
    report = shared.run(helper)
    assert report.pages == PAGES
    assert report.path.startswith(("cma(", "rma("))
    assert one.connection.path.startswith("rma(")
    assert one.connection.readers(None) == 1
    assert (out == one.expected).all()


def test_a_reader_with_little_time_does_not_wait_for_another_that_connects(world):
    one = world()
    peer = one.connection._way.peer
    one.transport.driver.call(lambda: peer.close("cut by the test"), 5.0)
    request = ReadRequest(
        np.arange(1), one.generations[:1], PagedMemory.packed(np.zeros((1, PAGE_BYTES), np.uint8)), np.arange(1)
    )
    began = time.monotonic()
    with one.connection._lock, pytest.raises(PeerGoneError, match="still connecting"):
        one.connection.read(request, deadline=Deadline(0.1))
    assert time.monotonic() - began < 5
    assert one.connection.read(request, deadline=Deadline(30.0)).pages == 1
