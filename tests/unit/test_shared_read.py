"""One read by one or two threads: every page once, proven, and nobody writes when it is over."""

import os
import threading
import time

import numpy as np
import pytest

from kvmarket.announced import Announced
from kvmarket.deadline import Deadline
from kvmarket.digest import page_digests
from kvmarket.errors import PeerGoneError
from kvmarket.helper import Helper
from kvmarket.region.pages import PagedMemory
from kvmarket.registry.records import make_records
from kvmarket.report import MissReason
from kvmarket.shared_read import SharedRead
from kvmarket.transport import ReadRequest
from kvmarket.transport.mapped import MappedConnection
from kvmarket.verification import SAMPLE_ONE_IN, Verification

PAGES, PAGE_BYTES = 64, 256 << 10
several_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nobody helps on one core")


class Connection(MappedConnection):
    """Remembers who reads what, and gives the other thread a chance to take part."""

    def __init__(self, pages, generations):
        super().__init__("test", "memory", pages, generations)
        self.parts = []
        self.fail_at = None

    def read(self, request, **options):
        first = int(request.local_pages[0])
        self.parts.append((first, len(request.pages), threading.current_thread().name))
        time.sleep(0.01)
        if self.fail_at is not None and first >= self.fail_at:
            raise PeerGoneError("gone")
        return super().read(request, **options)


@pytest.fixture
def helper():
    helper = Helper()
    yield helper
    helper.close()


@pytest.fixture
def source():
    data = np.random.default_rng(1).integers(0, 256, (PAGES, PAGE_BYTES), np.uint8)
    return PagedMemory.packed(data)


class Reading:
    def __init__(self, source, mode="full", deadline_s=20.0):
        self.generations = np.full(PAGES, 2, np.uint64)
        self.connection = Connection(source, self.generations)
        self.order = np.random.default_rng(2).permutation(PAGES)
        self.source, self.out = source, np.zeros((PAGES, PAGE_BYTES), np.uint8)
        self.local = PagedMemory.packed(self.out)
        self.records = make_records(1, 0, self.order, self.generations[self.order], page_digests(source, self.order))
        self.mode, self.deadline = mode, Deadline(deadline_s)

    def run(self, helper):
        targets = np.arange(PAGES)
        self.verification = Verification(self.mode, Announced.of(self.records), self.local, targets)
        request = ReadRequest(self.order, np.full(PAGES, 2, np.uint64), self.local, targets)
        self.shared = SharedRead(self.connection, request, self.deadline, self.verification)
        return self.shared.run(helper)

    @property
    def expected(self):
        return self.source.memories[0].reshape(PAGES, PAGE_BYTES)[self.order]


@several_cores
def test_two_threads_read_every_page_once(helper, source):
    reading = Reading(source)
    report = reading.run(helper)
    assert (report.pages, report.nbytes, report.refused) == (PAGES, PAGES * PAGE_BYTES, {})
    assert (reading.out == reading.expected).all()
    assert reading.verification.blocks == PAGES
    assert reading.shared.threads == 2
    assert len({name for _, _, name in reading.connection.parts}) == 2
    parts = sorted((first, count) for first, count, _ in reading.connection.parts)
    assert [first for first, _ in parts] == np.cumsum([0, *(count for _, count in parts)])[:-1].tolist()
    assert parts[0][1] > parts[-1][1], "parts get smaller towards the end"


def test_pages_cut_small_are_read_by_one_thread(helper, source):
    small = PagedMemory.packed(source.memories[0].reshape(PAGES * 16, PAGE_BYTES // 16))
    connection = MappedConnection("test", "memory", small, np.full(PAGES * 16, 2, np.uint64))
    assert connection.readers(small) == 1
    assert connection.readers(source) == 1
    assert MappedConnection("test", "memory", source, np.full(PAGES, 2, np.uint64)).readers(source) == 2


@several_cores
def test_a_helper_that_is_busy_elsewhere_is_not_waited_for(helper, source):
    release = threading.Event()
    busy = helper.submit(release.wait)
    reading = Reading(source)
    began = time.monotonic()
    report = reading.run(helper)
    assert time.monotonic() - began < 5
    assert (report.pages, reading.shared.threads) == (PAGES, 1)
    release.set()
    busy.result(5)


@several_cores
def test_a_helper_works_on_another_core_than_whoever_asks(helper):
    cores = os.sched_getaffinity(0)
    threads = []
    helper.submit(lambda: threads.append(threading.get_native_id())).result(5)
    try:
        for core in sorted(cores)[:2]:
            os.sched_setaffinity(0, {core})
            assert helper.submit(lambda: None).result(5) is None
            assert os.sched_getaffinity(threads[0]) == cores - {core}
    finally:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("page", [0, 20, PAGES - 1])
def test_wrong_bytes_are_named_and_end_the_read(helper, source, page):
    reading = Reading(source)
    source.views(int(reading.order[page]))[0][12_345] ^= 1
    report = reading.run(helper)
    assert report.refused[page] is MissReason.DIGEST_MISMATCH
    assert min(report.refused) == page
    assert (reading.out[:page] == reading.expected[:page]).all()


def test_a_stale_page_ends_the_read(helper, source):
    reading = Reading(source)
    reading.generations[reading.order[30]] = 3
    report = reading.run(helper)
    assert min(report.refused) == 30
    assert report.refused[30] is MissReason.STALE_GENERATION


def test_a_late_read_ends_early(helper, source):
    reading = Reading(source, deadline_s=0.03)
    report = reading.run(helper)
    assert set(report.refused.values()) == {MissReason.DEADLINE}
    first = min(report.refused)
    assert 0 < report.pages <= PAGES - len(report.refused)
    assert (reading.out[:first] == reading.expected[:first]).all()


def test_a_lost_connection_is_raised_when_nobody_writes_any_more(helper, source):
    reading = Reading(source)
    reading.connection.fail_at = 20
    with pytest.raises(PeerGoneError):
        reading.run(helper)
    written = reading.out.copy()
    time.sleep(0.05)
    assert (reading.out == written).all()


@pytest.mark.parametrize(("mode", "compared"), [("none", 0), ("sampled", PAGES // SAMPLE_ONE_IN), ("full", PAGES)])
def test_how_many_pages_are_compared(helper, source, mode, compared):
    reading = Reading(source, mode)
    assert reading.run(helper).refused == {}
    assert reading.verification.blocks == compared


def test_pages_without_a_digest_are_not_compared(helper, source):
    reading = Reading(source)
    reading.records["digest"][::2] = np.void(bytes(16))
    assert reading.run(helper).refused == {}
    assert reading.verification.blocks == PAGES // 2
