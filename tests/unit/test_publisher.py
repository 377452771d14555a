"""The announcing thread, where its timing matters; `tests/property` has the publisher's rules."""

import os
import threading
import time

import numpy as np
import pytest

from kvmarket.deadline import Deadline
from kvmarket.errors import DeadlineExceededError, MarketClosedError, RegistryUnavailableError
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.metrics import Metrics
from kvmarket.publish import QUEUE_MAX, Publisher
from kvmarket.region.pages import PagedMemory
from kvmarket.region.region import LentRegion
from kvmarket.registry.memory import MemoryRegistry
from kvmarket.testing.samples import SPEC
from kvmarket.testing.waiting import until

NAMESPACE = Namespace(ModelIdentity("m"), SPEC)
KEYS = [bytes([number]) * 44 for number in range(8)]


class GatedRegistry(MemoryRegistry):
    """Announcements wait until the gate is open; all that came through is remembered."""

    def __init__(self):
        super().__init__()
        self.gate, self.waiting = threading.Event(), threading.Event()
        self.announced, self.withdrawn = [], []

    def announce(self, digest, epoch, keys, records):
        self.waiting.set()
        assert self.gate.wait(10)
        self.announced += keys
        return super().announce(digest, epoch, keys, records)

    def withdraw(self, digest, owner, keys):
        self.withdrawn += keys
        return super().withdraw(digest, owner, keys)


@pytest.fixture
def registry():
    registry = GatedRegistry()
    registry.open_namespace(NAMESPACE.digest, {})
    return registry


@pytest.fixture
def publisher(registry):
    owner = registry.register_owner(os.urandom(16))
    pages = PagedMemory.packed(np.zeros((8, 64), np.uint8))
    region = LentRegion(0, owner.incarnation, pages, (), SPEC.fingerprint)
    publisher = Publisher(NAMESPACE, registry, owner, region, Metrics(), with_digests=True)
    yield publisher
    registry.gate.set()
    publisher.close()
    region.close()


@pytest.fixture
def busy(registry, publisher):
    """The announcing thread is in the registry with block 0 and does not come back."""
    publisher.offer([KEYS[0]], [0])
    assert registry.waiting.wait(10)


def found(registry):
    return [key for key in KEYS if registry.lookup(NAMESPACE.digest, [key]).blocks]


def settle(registry, publisher):
    registry.gate.set()
    publisher.flush(Deadline(10))


def test_a_block_taken_back_before_its_turn_is_never_announced(registry, publisher, busy):
    publisher.offer(KEYS[1:4], [1, 2, 3])
    publisher.retract([2])
    settle(registry, publisher)
    assert registry.announced == [KEYS[0], KEYS[1], KEYS[3]]
    assert found(registry) == [KEYS[0], KEYS[1], KEYS[3]]


def test_a_block_that_moved_before_its_turn_is_announced_where_it_is(registry, publisher, busy):
    publisher.offer([KEYS[1]], [1])
    publisher.retract([1])
    publisher.offer([KEYS[1]], [5])
    publisher.offer([KEYS[2]], [1])
    settle(registry, publisher)
    pages = {key: int(registry.lookup(NAMESPACE.digest, [key]).records["page"][0]) for key in KEYS[1:3]}
    assert pages == {KEYS[1]: 5, KEYS[2]: 1}
    assert KEYS[1] not in registry.withdrawn, "the newer record is not withdrawn for the older page"


def test_what_is_retracted_for_later_is_unreadable_at_once_and_withdrawn_then(registry, publisher):
    registry.gate.set()
    publisher.offer(KEYS[:3], [0, 1, 2])
    publisher.flush(Deadline(10))
    began = time.monotonic()
    publisher.retract([1, 2], delay_s=0.3)
    assert (publisher._region.generations.values[:3] % 2).tolist() == [0, 1, 1]
    assert publisher.page_of(KEYS[1]) is None
    time.sleep(0.05)
    assert found(registry) == KEYS[:3]
    assert publisher.waiting["announce_queue"] == 1
    publisher.flush(Deadline(10))
    assert time.monotonic() - began >= 0.3
    assert found(registry) == KEYS[:1]
    assert sorted(registry.withdrawn) == KEYS[1:3]


def test_what_is_offered_again_before_its_record_is_withdrawn_keeps_the_new_one(registry, publisher):
    registry.gate.set()
    publisher.offer(KEYS[:3], [0, 1, 2])
    publisher.flush(Deadline(10))
    publisher.retract([1, 2], delay_s=0.1)
    publisher.offer([KEYS[1]], [4])
    publisher.flush(Deadline(10))
    assert int(registry.lookup(NAMESPACE.digest, [KEYS[1]]).records["page"][0]) == 4
    assert found(registry) == KEYS[:2]
    assert registry.withdrawn == [KEYS[2]]


def test_a_publisher_that_closes_does_not_wait_for_what_is_retracted_for_later(registry, publisher):
    registry.gate.set()
    publisher.offer(KEYS[:2], [0, 1])
    publisher.flush(Deadline(10))
    publisher.retract([0], delay_s=60)
    began = time.monotonic()
    publisher.close()
    assert time.monotonic() - began < 5


def test_forgetting_reaches_what_waits(registry, publisher, busy):
    publisher.offer(KEYS[1:3], [1, 2])
    publisher.forget_all()
    settle(registry, publisher)
    assert registry.announced == [KEYS[0]]
    assert publisher.page_of(KEYS[0]) is None


def test_an_epoch_that_ended_meanwhile_is_noticed(registry, publisher, busy):
    publisher.offer(KEYS[1:3], [1, 2])
    registry.bump_epoch(NAMESPACE.digest)
    settle(registry, publisher)
    assert found(registry) == []
    assert [publisher.page_of(key) for key in KEYS[:3]] == [None] * 3
    publisher.offer(KEYS[:3], [0, 1, 2])
    publisher.flush(Deadline(10))
    assert found(registry) == KEYS[:3]


def test_what_this_process_offered_after_its_own_bump_stays(registry, publisher, busy):
    """An announcement for the old epoch comes back refused when the new one is known already."""
    publisher.forget_all(registry.bump_epoch(NAMESPACE.digest))
    publisher.offer(KEYS[4:6], [4, 5])
    settle(registry, publisher)
    assert found(registry) == KEYS[4:6]


def test_a_future_tells_when_and_cannot_be_cancelled(registry, publisher, busy):
    future = publisher.offer([KEYS[1]], [1], wait=True)
    assert not future.cancel()
    assert not future.done()
    registry.gate.set()
    assert future.result(10) >= 1
    publisher.offer([KEYS[2]], [2], wait=True).result(10)
    assert found(registry) == KEYS[:3]


def test_a_full_queue_drops_and_counts_and_offers_again(registry, publisher, busy):
    for _ in range(QUEUE_MAX):
        publisher.offer([], [])
    future = publisher.offer([KEYS[1]], [1], wait=True)
    with pytest.raises(DeadlineExceededError, match="too many"):
        future.result(0)
    assert publisher.page_of(KEYS[1]) is None, "what was dropped is not readable"
    assert publisher._metrics.snapshot()["announcements_dropped"] == 1
    registry.gate.set()
    until(publisher._queue.empty, "the queue is empty")
    publisher.offer([KEYS[1]], [1])
    publisher.flush(Deadline(10))
    assert found(registry) == KEYS[:2]


def test_flush_has_a_deadline(publisher, busy):
    with pytest.raises(DeadlineExceededError):
        publisher.flush(Deadline(0.05))


def test_one_call_with_a_block_twice(registry, publisher):
    registry.gate.set()
    publisher.offer([KEYS[1], KEYS[1]], [1, 2])
    publisher.flush(Deadline(10))
    page = publisher.page_of(KEYS[1])
    publisher.retract([1, 2])
    publisher.flush(Deadline(10))
    assert page in {1, 2}
    assert publisher.page_of(KEYS[1]) is None
    assert found(registry) == []


def test_closed_publishers_take_nothing_more(registry, publisher):
    registry.gate.set()
    publisher.close()
    publisher.close()
    with pytest.raises(MarketClosedError):
        publisher.offer([KEYS[0]], [0])
    publisher.retract([0])


class AwayRegistry(MemoryRegistry):
    """Takes nothing while `away`."""

    def __init__(self):
        super().__init__()
        self.away, self.attempts = False, 0

    def _require(self):
        if self.away:
            raise RegistryUnavailableError("away")

    def epoch(self, digest):
        self._require()
        return super().epoch(digest)

    def announce(self, digest, epoch, keys, records):
        self.attempts += 1
        self._require()
        return super().announce(digest, epoch, keys, records)


@pytest.fixture
def away_publisher(monkeypatch):
    monkeypatch.setattr("kvmarket.backlog.PAUSE_MIN_S", 0.02)
    registry = AwayRegistry()
    registry.open_namespace(NAMESPACE.digest, {})
    owner = registry.register_owner(os.urandom(16))
    region = LentRegion(0, owner.incarnation, PagedMemory.packed(np.zeros((8, 64), np.uint8)), (), SPEC.fingerprint)
    publisher = Publisher(NAMESPACE, registry, owner, region, Metrics(), with_digests=True)
    publisher._backlog._pause_s = 0.02
    yield registry, publisher, region
    publisher.close()
    region.close()


def test_what_a_registry_could_not_take_is_announced_when_it_is_back(away_publisher):
    registry, publisher, _ = away_publisher
    registry.away = True
    publisher.offer(KEYS[:4], [0, 1, 2, 3])
    until(lambda: registry.attempts == 1 and len(publisher._backlog) == 1, "the first attempt failed")
    publisher.retract([2])
    time.sleep(0.1)
    assert registry.attempts == 1, "no digests are computed for a registry that is away"
    assert publisher.page_of(KEYS[1]) == 1, "still readable"
    registry.away = False
    until(lambda: found(registry) == [KEYS[0], KEYS[1], KEYS[3]], "they are announced")
    assert publisher.waiting == {"announce_queue": 0, "announce_backlog": 0, "offered_blocks": 3}
    assert publisher._metrics.snapshot()["announcements_postponed"] == 4


def test_who_waits_for_an_announcement_is_told_at_once(away_publisher):
    registry, publisher, region = away_publisher
    registry.away = True
    future = publisher.offer(KEYS[:2], [0, 1], wait=True)
    with pytest.raises(RegistryUnavailableError):
        future.result(10)
    assert publisher.page_of(KEYS[0]) is None
    assert (region.generations.values[:2] % 2).all(), "nor readable"


def test_a_full_backlog_takes_back_and_counts(away_publisher, monkeypatch):
    monkeypatch.setattr("kvmarket.backlog.BATCHES_MAX", 1)
    registry, publisher, _ = away_publisher
    registry.away = True
    publisher.offer(KEYS[:1], [0])
    until(lambda: len(publisher._backlog) == 1, "it waits for the registry")
    publisher.offer(KEYS[1:3], [1, 2])
    until(lambda: publisher._metrics.snapshot().get("announcements_failed") == 2, "they are given up")
    assert publisher.page_of(KEYS[0]) == 0
    assert publisher.page_of(KEYS[1]) is None
