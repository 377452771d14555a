"""What the connector costs a step, and blocks between their load and their offer, without an engine."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.metrics")

from kvmarket.digest import page_digests
from kvmarket.metrics import Metrics
from kvmarket.outcome import Outcome
from kvmarket.pending import Pending
from kvmarket.publish_job import Job, digests_of
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import PagedMemory, PageLayout
from kvmarket.registry import LookupResult
from kvmarket.registry.records import make_records
from kvmarket.testing.host_cuda import HostCuda
from kvmarket_vllm import card, hook_time, worker
from kvmarket_vllm.connector import KVMarketConnector
from kvmarket_vllm.fetched import Fetched
from kvmarket_vllm.hook_time import HookTime, timed
from kvmarket_vllm.loader import Loader
from kvmarket_vllm.messages import StepPlan
from kvmarket_vllm.stats import LABELLED, Deltas
from kvmarket_vllm.worker import WorkerRole


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(hook_time, "time", SimpleNamespace(perf_counter=clock, monotonic=clock))
    return clock


class Connector:
    def __init__(self):
        self.hook_time = HookTime("worker")

    @timed
    def hook(self, clock, seconds, *, fail=False):
        clock.now += seconds
        if fail:
            raise LookupError
        return seconds


def test_the_time_of_hooks_is_counted_when_they_fail_too(clock):
    connector = Connector()
    assert connector.hook(clock, 2.0) == 2.0
    with pytest.raises(LookupError):
        connector.hook(clock, 0.5, fail=True)
    clock.now += 10
    assert connector.hook_time.seconds == pytest.approx(2.5)


def test_steps_in_which_nothing_happened_are_told_once_a_second(clock):
    deltas, times = Deltas(), HookTime("worker")
    told = []
    for _ in range(40):
        clock.now += 0.1
        times.steps += 1
        times.seconds += 0.001
        told.append(times.take(deltas))
    sent = [stats.data for stats in told if stats is not None]
    assert 4 <= len(sent) <= 5
    times.take(deltas)
    clock.now += 1
    times.take(deltas)
    assert deltas.totals["hook_steps{role=worker}"] == 40
    assert deltas.totals["hook_seconds{role=worker}"] == pytest.approx(0.04)
    assert {"hook_steps", "hook_seconds"} <= LABELLED.keys()


def test_a_step_in_which_something_happened_tells_its_time_at_once(clock):
    deltas, times = Deltas(), HookTime("scheduler")
    times.steps, times.seconds = 1, 0.25
    times.take(deltas)
    times.steps, times.seconds = 2, 0.75
    deltas.add(loads=1)
    assert times.take(deltas).data == {"loads": 1, "hook_steps{role=scheduler}": 1, "hook_seconds{role=scheduler}": 0.5}


def test_counting_shows_without_a_look_at_the_counters():
    metrics = Metrics()
    seen = [metrics.changes]
    metrics.add(lookups=1)
    seen.append(metrics.changes)
    metrics.add_reason("misses", "torn")
    seen.append(metrics.changes)
    metrics.add_read("shm", "mapped", 10, "engine", 1)
    seen.append(metrics.changes)
    assert len(set(seen)) == 4
    metrics.snapshot()
    assert metrics.changes == seen[-1]


@pytest.fixture
def fetched():
    """Two blocks that a request has had loaded and compared."""
    fetched = Fetched()
    fetched.started("a", [7, 8])
    fetched.loaded("a", [b"7", b"8"])
    return fetched


def test_a_fetched_block_is_offered_with_its_digest_once(fetched):
    assert (fetched.take([9, 7]), fetched.take([7])) == ([None, b"7"], [None])
    assert len(fetched) == 1
    assert fetched.take([8]) == [b"8"]


def test_blocks_of_a_load_that_was_not_compared_have_no_digest():
    fetched = Fetched()
    fetched.started("a", [7, 8])
    fetched.loaded("a", [])
    assert fetched.take([7]) == [b""]
    fetched.started("b", [9, 10])
    fetched.loaded("b", [b"9"])
    assert fetched.take([9]) == [b""]


def test_nothing_is_left_of_a_request_that_ended_before_its_blocks_were_offered(fetched):
    fetched.forget_requests({"a", "unknown"})
    assert fetched.take([7]) == [None]
    fetched.loaded("a", [b"7", b"8"])  # its load ended after it did
    assert fetched.take([8]) == [None]


def test_when_all_is_forgotten_blocks_stay_fetched_and_lose_their_digests(fetched):
    """They are not offered as what they hold now; what they are offered as later may have other bytes."""
    fetched.forget_digests()
    assert (fetched.take([7]), fetched.take([7])) == ([b""], [None])
    fetched.started("b", [9])
    fetched.loaded("b", [b"9"])
    assert fetched.take([9]) == [b"9"]


def test_who_gets_the_blocks_of_a_request_that_is_over_does_not_get_its_digests(fetched):
    """In one step vLLM frees blocks, gives them to another load, and tells last who is over."""
    fetched.started("b", [8])
    fetched.forget_requests({"a"})
    assert fetched.take([7]) == [None]
    assert fetched.take([8]) == [b""]


def certain(verify, kind, outcome, records):
    memory = SimpleNamespace(kind=kind)
    fetcher = SimpleNamespace(verify=verify)
    loader = Loader.__new__(Loader)
    loader._core, loader._pages = SimpleNamespace(fetcher=fetcher), memory
    return loader._compared(LookupResult(1, 2, records), outcome)


def test_digests_are_known_only_if_every_block_was_compared_with_the_only_one():
    pages, digests = np.arange(2), [b"a" * 16, b"b" * 16]
    records = make_records(1, 0, pages, pages * 2 + 2, digests)
    whole = Outcome(blocks=2, blocks_verified=2)
    assert certain("full", "cuda", whole, records) == digests
    assert certain("sampled", "cuda", whole, records) == []
    assert certain("full", "host", whole, records) == []
    assert certain("full", "cuda", Outcome(blocks=2, blocks_verified=1), records) == []
    assert certain("full", "cuda", Outcome(blocks=1, blocks_verified=1), records) == []
    assert certain("full", "cuda", whole, np.concatenate([records, records])) == []


def test_digests_that_came_along_are_not_computed_again_and_keep_their_places():
    memory = PagedMemory.packed(np.arange(6 * 64, dtype=np.uint8).reshape(6, 64))
    right = page_digests(memory, np.arange(6))
    known = Job([b"k"] * 2, np.array([4, 1]), None, digests=[b"x", b"y"])
    before, after = Job([b"k"] * 2, np.array([3, 0]), None), Job([b"k"], np.array([5]), None)
    assert digests_of([before, known, after], memory) == [right[3], right[0], b"x", b"y", right[5]]
    assert digests_of([known], memory) == [b"x", b"y"]


def test_what_waits_is_taken_by_itself_and_whoever_fails_too():
    pending, ended = Pending(), set()

    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    for name in "ab":
        pending.add(name, lambda name=name: name in ended)
    pending.add("c", fail)
    all_before = pending.all_present()
    pending.add("flush", all_before)
    assert pending.take_ended() == [("c", False)]
    ended.add("b")
    pending.add("later", lambda: True, delay_s=60)
    while (taken := pending.take_ended()) == []:
        pass
    assert taken == [("b", True)]
    ended.add("a")
    found = []
    while len(found) < 2:
        found += pending.take_ended()
    assert found == [("a", True), ("flush", True)]
    assert 50 < pending.wait_s <= 60
    assert pending.take_all() == ["later"]
    assert pending.wait_s is None


# ---- what is offered by a worker on a card


class Publisher:
    """Takes down what it is offered."""

    def __init__(self):
        self.offers = []

    def offer(self, keys, pages, *, after, delay_s, digests=None):
        assert after == "launched"
        self.offers.append((list(keys), list(pages), digests and list(digests), delay_s))


@pytest.fixture
def on_card(monkeypatch, fetched):
    """A connector of a worker on a card, which has fetched two blocks, and its publisher."""
    monkeypatch.setattr(worker, "launched_work", lambda: "launched")
    role, publisher = WorkerRole.__new__(WorkerRole), Publisher()
    region = SimpleNamespace(pages=SimpleNamespace(kind="cuda"))
    role._market = lambda root: SimpleNamespace(publisher=publisher, region=region)
    role._on_host, role._shared, role.deltas, role._fetched, role.loading = False, [], Deltas(), fetched, 0
    connector = KVMarketConnector.__new__(KVMarketConnector)
    connector._worker, connector.hook_time = role, HookTime("worker")
    return connector, publisher


def step(connector, plan, over=(), *, forward=True):
    """What vLLM calls in a step; without a forward some versions leave one hook out."""
    connector._connector_metadata = plan
    if forward:
        connector.wait_for_save()
    connector.get_finished(set(over))


@pytest.mark.parametrize("forward", [True, False])
def test_held_blocks_are_offered_with_their_digests_in_the_step_that_tells_that_their_request_is_over(on_card, forward):
    connector, publisher = on_card
    step(connector, StepPlan(held=[(b"x", 7), (b"y", 8)]), {"a"}, forward=forward)
    assert publisher.offers == [([b"x", b"y"], [7, 8], [b"7", b"8"], worker.FETCHED_LATER_S)]
    assert connector._worker.deltas.totals["blocks_offered"] == 2
    assert len(connector._worker._fetched) == 0


def test_held_blocks_that_were_not_fetched_have_their_digests_computed(on_card):
    connector, publisher = on_card
    step(connector, StepPlan(held=[(b"w", 6), (b"x", 7)]))
    later = worker.FETCHED_LATER_S
    assert publisher.offers == [([b"x"], [7], [b"7"], later), ([b"w"], [6], None, later)]


def test_a_block_computed_where_another_was_fetched_is_not_offered_with_its_digest(on_card):
    connector, publisher = on_card
    step(connector, StepPlan(publish=[(b"z", 7)]))
    step(connector, StepPlan(held=[(b"z", 7), (b"y", 8)]))
    assert [offer[:3] for offer in publisher.offers] == [
        ([b"z"], [7], None),
        ([b"y"], [8], [b"8"]),
        ([b"z"], [7], None),
    ]


# ---- what a worker does with what the engine has launched


@pytest.mark.parametrize("busy", [True, False])
def test_a_load_waits_for_what_the_engine_has_launched_if_any_of_it_is_left(monkeypatch, busy):
    stream = SimpleNamespace(query=lambda: not busy, record_event=lambda: "event")
    monkeypatch.setattr(card.torch.cuda, "current_stream", lambda: stream)
    layout = PageLayout.packed(2, 16)
    pages = CudaPagedMemory(layout, (np.zeros(32, np.uint8),), HostCuda())
    behind = card.behind_launched_work(pages)
    assert behind.after == ("event" if busy else None)
    assert (behind is pages) == (not busy)
    assert behind.memories is pages.memories


def test_what_a_step_overwrites_is_unreadable_before_it_and_withdrawn_with_others_later(monkeypatch, on_card):
    connector, _ = on_card
    retracted = []
    publisher = SimpleNamespace(retract=lambda pages, *, delay_s: retracted.append((pages, delay_s)))
    connector._worker._market = lambda root: SimpleNamespace(publisher=publisher, kept=None)
    monkeypatch.setattr(worker.time, "monotonic", lambda: 5.03)
    connector._worker.before_forward(StepPlan(dirty=[3, 4]))
    ((pages, delay_s),) = retracted
    assert pages == [3, 4]
    assert delay_s == pytest.approx(worker.RETRACTED_LATER_S + 0.07)
