"""Counters, histograms and gauges, and what Prometheus makes of them."""

import ast
from pathlib import Path

import pytest

import kvmarket
from kvmarket.metric_families import FAMILIES, shown_name
from kvmarket.metrics import BUCKETS_S, LABEL_VALUES_MAX, Histogram, Metrics, split_key
from kvmarket.report import MissReason

pytest.importorskip("prometheus_client", reason="the extra 'metrics' is not installed")

import prometheus_client

from kvmarket.exporter import MarketCollector

COUNTING = {"add", "add_reason", "add_labelled", "observe", "observe_phases", "gauge", "level"}
READS = {"transport_reads", "transport_bytes", "path_reads", "path_bytes"}


def counted_in(tree):
    """Return the names of metrics that calls in a file count."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in COUNTING:
            owner = ast.unparse(call.func.value)
            if owner.split(".")[-1].strip("_") == "metrics":
                yield from (keyword.arg for keyword in call.keywords if call.func.attr in {"add", "level"})
                if call.func.attr not in {"add", "level"} and isinstance(call.args[0], ast.Constant):
                    yield call.args[0].value


def test_everything_that_is_counted_has_an_entry_and_the_other_way_round():
    root = Path(kvmarket.__file__).parent
    found = {name for path in root.rglob("*.py") for name in counted_in(ast.parse(path.read_text()))}
    assert len(found) > 20
    assert found - set(FAMILIES) == set()
    assert set(FAMILIES) - found - READS == {"announce_queue", "announce_backlog", "offered_blocks"}


def test_names_are_as_prometheus_wants_them():
    for name, family in FAMILIES.items():
        shown = shown_name(name)
        assert shown.startswith("kvmarket_")
        assert shown.endswith("_total") == (family.kind == "counter")
        assert shown.endswith("_seconds") == (family.kind == "histogram")
        assert family.label in {"", "reason", "transport", "path", "phase", "tier"}
        assert family.text


def test_a_label_has_few_values():
    metrics = Metrics()
    for number in range(10 * LABEL_VALUES_MAX):
        metrics.add_reason("misses", f"reason {number}")
        metrics.add_read("ucx", f"path {number}", 2, "engine", 3)
        metrics.observe("fetch_seconds", 0.1, f"phase {number}")
    counts = metrics.snapshot()
    assert sum(key.startswith("misses") for key in counts) == LABEL_VALUES_MAX + 1
    assert counts["misses{reason=other}"] == 9 * LABEL_VALUES_MAX
    assert counts["path_bytes{path=other}"] == 18 * LABEL_VALUES_MAX
    assert counts["transport_bytes{transport=ucx}"] == 20 * LABEL_VALUES_MAX
    assert counts["tier_blocks{tier=engine}"] == 30 * LABEL_VALUES_MAX
    assert len(metrics.histograms()) == LABEL_VALUES_MAX + 1


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("fetches", ("fetches", "", "")),
        ("misses{reason=torn}", ("misses", "reason", "torn")),
        ("path_bytes{path=am(tcp/eth0,a=b}c)}", ("path_bytes", "path", "am(tcp/eth0,a=b}c)")),
    ],
)
def test_keys_are_taken_apart(key, parts):
    assert split_key(key) == parts


def test_a_histogram_puts_every_duration_where_it_belongs():
    histogram = Histogram()
    for seconds in (0.0, 1e-5, 1.1e-5, 0.3, 10.0, 11.0):
        histogram.add(seconds)
    rows = dict(zip((*BUCKETS_S, "more"), histogram.counts, strict=True))
    assert {limit: count for limit, count in rows.items() if count} == {1e-5: 2, 2.5e-5: 1, 0.5: 1, 10.0: 1, "more": 1}
    assert histogram.total == pytest.approx(21.300021)
    assert list(BUCKETS_S) == sorted(BUCKETS_S)


def exported(collector):
    registry = prometheus_client.CollectorRegistry()
    registry.register(collector)
    return registry.get_sample_value


def test_a_collector_adds_up_its_sources():
    one, other = Metrics(), Metrics()
    value = exported(MarketCollector([one, other]))
    assert one.timed
    assert value("kvmarket_fetches_total") == 0, "a counter is there before anything happened"
    for number, metrics in enumerate((one, other)):
        metrics.add(fetches=2)
        metrics.add_reason("misses", MissReason.TORN)
        metrics.observe("fetch_seconds", 0.02, "hash")
        metrics.gauge("announce_queue", lambda number=number: number + 3)
        metrics.gauge("epoch", lambda number=number: number + 3)
    assert value("kvmarket_fetches_total") == 4
    assert value("kvmarket_misses_total", {"reason": "torn"}) == 2
    assert value("kvmarket_fetch_seconds_count", {"phase": "hash"}) == 2
    assert value("kvmarket_fetch_seconds_sum", {"phase": "hash"}) == pytest.approx(0.04)
    assert value("kvmarket_fetch_seconds_bucket", {"phase": "hash", "le": "0.01"}) == 0
    assert value("kvmarket_fetch_seconds_bucket", {"phase": "hash", "le": "0.025"}) == 2
    assert value("kvmarket_announce_queue") == 7
    assert value("kvmarket_epoch") == 4


def test_counters_never_go_back_when_sources_come_and_go():
    one, other = Metrics(), Metrics()
    collector = MarketCollector([one, one, other])
    value = exported(collector)
    one.add(fetches=1)
    other.add(fetches=10)
    one.observe("lookup_seconds", 1.0)
    collector.detach(one)
    assert value("kvmarket_fetches_total") == 11, "it was attached twice"
    collector.detach(one)
    assert value("kvmarket_fetches_total") == 11
    one.add(fetches=1)
    collector.attach(one)
    assert value("kvmarket_fetches_total") == 12
    assert value("kvmarket_lookup_seconds_count") == 1
    collector.detach(one)
    collector.detach(other)
    assert value("kvmarket_fetches_total") == 12
    assert value("kvmarket_lookup_seconds_sum") == 1.0
    assert collector.idle


def test_what_has_no_entry_yet_is_exported_all_the_same():
    metrics = Metrics()
    value = exported(MarketCollector([metrics]))
    metrics.add(pages_of_a_later_version=3)
    metrics.add_labelled("tier_reads", "tier", "disk", 2)
    assert value("kvmarket_pages_of_a_later_version_total") == 3
    assert value("kvmarket_tier_reads_total", {"kind": "disk"}) == 2
    metrics.level(arena_bytes=4096)
    metrics.level(arena_bytes=2048)
    assert value("kvmarket_arena_bytes") == 2048
    assert metrics.snapshot()["arena_bytes"] == 2048
