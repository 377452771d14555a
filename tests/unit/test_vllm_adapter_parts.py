"""The connector's loader, its opening and its counters, without an engine."""

import functools
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.metrics")
prometheus = pytest.importorskip("prometheus_client")

from kvmarket.config import MarketConfig  # noqa: E402
from kvmarket.errors import ConfigError, RegistryUnavailableError  # noqa: E402
from kvmarket.fetch import Outcome  # noqa: E402
from kvmarket.region.pages import PagedMemory  # noqa: E402
from kvmarket.registry import LookupResult  # noqa: E402
from kvmarket.registry.records import make_records  # noqa: E402
from kvmarket.report import TransferReport  # noqa: E402
from kvmarket.testing.waiting import until  # noqa: E402
from kvmarket_vllm import loader as loader_module  # noqa: E402
from kvmarket_vllm import opening as opening_module  # noqa: E402
from kvmarket_vllm.loader import Loader  # noqa: E402
from kvmarket_vllm.messages import Load  # noqa: E402
from kvmarket_vllm.opening import Opening  # noqa: E402
from kvmarket_vllm.scheduler import SchedulerRole  # noqa: E402
from kvmarket_vllm.stats import COUNTERS, LABELLED, Deltas, MarketPromMetrics, MarketStats  # noqa: E402

RANK = (0, 0)
PAGE_BYTES = 64


class Market:
    """Stands for a market: `read` does what the test says."""

    def __init__(self):
        self.config = SimpleNamespace(fetch_deadline_s=1.0)
        self.namespace = SimpleNamespace(spec=SimpleNamespace(block_size=4))
        self.fetcher = self
        self.threads = []
        self.asked = []
        self.do = lambda found: Outcome(blocks=found.blocks)

    def read(self, found, pages, targets, deadline):
        self.threads.append(threading.current_thread())
        self.asked.append((found.blocks, targets.tolist(), sorted(found.records["block"].tolist())))
        return self.do(found)


@pytest.fixture
def market():
    return Market()


@pytest.fixture
def loader(market):
    loader = Loader(market, PagedMemory.packed(np.zeros((64, PAGE_BYTES), np.uint8)), RANK, Deltas())
    yield loader
    loader.close()


def load(name, block_ids, found=None):
    blocks = len(block_ids) if found is None else found
    pages = np.arange(blocks)
    return Load(name, list(block_ids), {RANK: LookupResult(1, blocks, make_records(1, 0, pages, pages * 2 + 2))})


def drain(loader, count):
    finished, invalid = set(), set()
    end = time.monotonic() + 5
    while len(finished) < count and time.monotonic() < end:
        done, failed = loader.take_finished(wait=True)
        assert not finished & done, "reported twice"
        finished |= done
        invalid |= failed
    return finished, invalid


def test_an_idle_engine_loads_at_once(loader, market):
    loader.start(load("a", [3, 4]), inline=True)
    assert loader.take_finished(wait=False) == ({"a"}, set())
    assert loader.take_finished(wait=False) == (set(), set())
    assert market.threads == [threading.current_thread()]
    assert market.asked == [(2, [3, 4], [0, 1])]


def test_a_busy_engine_is_not_kept_waiting(loader, market):
    gate = threading.Event()
    market.do = lambda found: (gate.wait(5), Outcome(blocks=found.blocks))[1]
    loader.start(load("a", [1]), inline=False)
    loader.start(load("b", [2]), inline=True)  # not alone any more: in order, on the thread
    began = time.monotonic()
    assert loader.take_finished(wait=False) == (set(), set())
    assert loader.take_finished(wait=True) == (set(), set())
    assert time.monotonic() - began < 1.0
    gate.set()
    assert drain(loader, 2) == ({"a", "b"}, set())
    assert [targets for _, targets, _ in market.asked] == [[1], [2]]
    assert threading.current_thread() not in market.threads


def test_large_loads_go_to_the_thread(loader, market, monkeypatch):
    monkeypatch.setattr(loader_module, "INLINE_BYTES_MAX", {"host": 3 * PAGE_BYTES})
    loader.start(load("large", range(4)), inline=True)
    assert drain(loader, 1) == ({"large"}, set())
    assert market.threads != [threading.current_thread()]


def test_more_may_be_found_than_is_loaded(loader, market):
    """Another rank found less, and all load the shortest."""
    loader.start(load("a", [5, 6], found=9), inline=True)
    assert market.asked == [(2, [5, 6], [0, 1])]


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("failure", "errors"), [(RegistryUnavailableError("gone"), 0), (ZeroDivisionError("a bug"), 1), (None, 0)]
)
def test_every_failure_is_reported_and_recomputed(loader, market, inline, failure, errors):
    def fail(found):
        if failure is not None:
            raise failure
        return Outcome(blocks=1, transfers=[TransferReport("shm", "mmap", 1, PAGE_BYTES, 0.1, 0.1)])

    market.do = fail
    loader.start(load("a", [7, 8, 9]), inline=inline)
    assert drain(loader, 1) == ({"a"}, {7, 8, 9} if failure is not None else {8, 9})
    totals = loader._deltas.totals
    assert totals["loads"] == totals["load_failures"] == 1
    assert totals["errors"] == errors
    assert totals["loaded_tokens"] == (0 if failure is not None else 4)


def test_too_many_loads_are_failed_not_queued_without_end(market, monkeypatch):
    monkeypatch.setattr(loader_module, "LOADS_MAX", 2)
    loader = Loader(market, PagedMemory.packed(np.zeros((64, PAGE_BYTES), np.uint8)), RANK, Deltas())
    gate = threading.Event()
    market.do = lambda found: (gate.wait(5), Outcome(blocks=found.blocks))[1]
    for number in range(8):
        loader.start(load(f"r{number}", [number]), inline=False)
    done, failed = loader.take_finished(wait=False)
    assert 5 <= len(done) <= 6  # one runs, two wait
    assert len(failed) == len(done)
    gate.set()
    assert len(drain(loader, 8 - len(done))[0]) == 8 - len(done)
    loader.close()


# ---- opening


def test_opening_waits_a_while_and_goes_on_without(monkeypatch, caplog):
    monkeypatch.setattr(opening_module, "OPEN_WAIT_S", 0.05)
    gate = threading.Event()
    opening = Opening(lambda: gate.wait(5) and "market")
    assert opening.get() is None
    assert not opening.failed
    assert "does not answer" in caplog.text
    gate.set()
    assert opening.finish(5.0) == "market"
    assert opening.get() == "market"
    assert not opening.failed


def test_an_opening_that_fails_for_good_says_so(caplog):
    def fail():
        raise ConfigError("not a place for it")

    opening = Opening(fail)
    assert opening.get() is None
    assert opening.failed
    assert "kvmarket is off for this replica: not a place for it" in caplog.text
    assert opening.finish(1.0) is None


def test_an_opening_that_fails_for_now_is_tried_again(caplog, monkeypatch):
    monkeypatch.setattr(opening_module, "RETRY_S", 0.01)
    tries = []

    def fail_twice():
        tries.append(1)
        if len(tries) < 3:
            raise RegistryUnavailableError("somebody holds it")
        return "market"

    opening = Opening(fail_twice)
    end = time.monotonic() + 5
    while opening.get() is None and time.monotonic() < end:
        assert opening.failed or len(tries) == 3
        time.sleep(0.002)
    assert opening.get() == "market"
    assert not opening.failed
    assert caplog.text.count("off for this replica until this passes: somebody holds it") == 1


def test_shutting_down_ends_the_tries(monkeypatch):
    def fail():
        raise RegistryUnavailableError("gone")

    opening = Opening(fail)
    began = time.monotonic()
    assert opening.finish(5.0) is None
    assert time.monotonic() - began < 4.0


# ---- counters


def test_deltas_start_again_after_each_step():
    deltas = Deltas()
    assert deltas.take() is None
    deltas.add(loads=1, loaded_tokens=32)
    deltas.add(loads=2)
    deltas.add_labelled("misses", "torn")
    assert deltas.take().data == {"loads": 3, "loaded_tokens": 32, "misses{reason=torn}": 1}
    assert deltas.take() is None
    deltas.add(loads=1)
    assert deltas.take().data == {"loads": 1}
    assert deltas.totals["loads"] == 4
    with pytest.raises(KeyError):
        deltas.add_labelled("loads", "x")


def test_stats_of_roles_and_ranks_add_up():
    stats = MarketStats(data={"loads": 1})
    same = stats.aggregate(MarketStats(data={"loads": 2, "lookups": 5}))
    assert same is stats
    assert stats.reduce() == {"loads": 3, "lookups": 5}
    assert not stats.is_empty()
    stats.reset()
    assert stats.is_empty()


def test_everything_counted_appears_in_the_metrics():
    registry = prometheus.CollectorRegistry()
    kinds = (prometheus.Counter, prometheus.Gauge, prometheus.Histogram)
    types = {kind: functools.partial(kind, registry=registry) for kind in kinds}
    config = SimpleNamespace(kv_transfer_config=None)
    metrics = MarketPromMetrics(config, types, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})

    def value(name, engine, **labels):
        return registry.get_sample_value(f"vllm:kvmarket_{name}_total", {"model_name": "m", "engine": engine, **labels})

    assert {value(name, engine) for name in COUNTERS for engine in "01"} == {0.0}
    metrics.observe(dict.fromkeys(COUNTERS, 2), engine_idx=1)
    metrics.observe({f"{name}{{{label}=x=y}}": 3 for name, (label, _) in LABELLED.items()})
    metrics.observe({"of a later version": 1, "lookups": 1})
    assert {value(name, "1") for name in COUNTERS} == {2.0}
    assert value("lookups", "0") == 1.0
    for name, (label, _) in LABELLED.items():
        assert value(name, "0", **{label: "x=y"}) == 3.0


# ---- the scheduler's memory of failed loads


def test_a_load_that_failed_on_one_rank_is_never_asked_for_again():
    """That rank reports first; the request's loads are over only when the other rank reports, too."""
    engine = SimpleNamespace(cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"))
    role = SchedulerRole(engine, MarketConfig(), 4, fetches=True, publishes=True)
    for name, blocks in (("unlucky", [1, 2]), ("lucky", [3, 4]), ("aborted", [5, 6])):
        role._requests[name] = SimpleNamespace(request_id=name)
        role._loading[name] = (b"key", set(blocks))
    role._forget_request("aborted")
    role.finished_loading(set(), {2, 6})
    role.finished_loading({"unlucky", "lucky", "aborted"}, set())
    assert role._failed == {"unlucky"}
    assert role._loading == {}
    role._forget_request("unlucky")
    assert role._failed == set()


def test_a_reset_that_the_registry_missed_is_made_up_for():
    engine = SimpleNamespace(cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"))
    role = SchedulerRole(engine, MarketConfig(), 4, fetches=True, publishes=True)
    assert role.reset()  # nothing was ever opened: there is nothing to forget
    bumped = []
    core = SimpleNamespace(bump_epoch=lambda: bumped.append(1))
    opened = [None]
    role._opening = SimpleNamespace(get=lambda: opened[0], failed=False)
    assert not role.reset()  # it may be there any moment, with what a worker has published
    role._opening.failed = True
    assert role.reset()
    assert not bumped
    opened[0] = {RANK: core}
    assert until(role._cores, "the reset that is owed") == opened[0]
    assert bumped == [1]
    assert role._cores() == opened[0]
    assert role.reset()
    assert bumped == [1, 1]
    assert role.deltas.totals["resets"] == 2
