"""Metrics for Prometheus (extra ``metrics``): a collector for a registry of the user's, and an endpoint of our own.

Nothing here runs, nor is imported, where nobody asked for it. Series of a process are sums over its marketplaces; what
closed ones counted stays, so that counters never go back.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from kvmarket.errors import KVMarketError, MissingExtraError
from kvmarket.logs import Log
from kvmarket.metric_families import FAMILIES, PREFIX, Family
from kvmarket.metrics import BUCKETS_S, Histogram, Metrics, split_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

events = Log(__name__)

HIGHEST = ("epoch", "registry_away")
"""Gauges of which a process shows the highest; of the others it shows the sum."""


class MarketCollector:
    """A collector for ``prometheus_client``. Thread-safe.

    Args:
        sources: what to export, e.g. ``marketplace.core.sources``.

    Raises:
        MissingExtraError: ``prometheus-client`` is not installed.
    """

    def __init__(self, sources: Iterable[Metrics] = ()) -> None:
        try:
            from prometheus_client import core
        except ImportError as error:
            raise MissingExtraError("prometheus_client", "metrics") from error
        self._core: Any = core
        self._lock = threading.Lock()
        self._sources: list[Metrics] = []
        self._past_counts: Counter[str] = Counter()
        self._past_times: dict[str, Histogram] = {}
        self._detached: WeakKeyDictionary[Metrics, tuple[dict[str, float], dict[str, Histogram]]] = WeakKeyDictionary()
        for source in sources:
            self.attach(source)

    def attach(self, source: Metrics) -> None:
        """Export `source` from now on. One that is attached twice is exported once."""
        source.timed = True
        with self._lock:
            self._sources.append(source)
            counts, times = self._detached.pop(source, ({}, {}))  # it still counts them itself
            self._past_counts.subtract(counts)
            _merge(self._past_times, times, -1)

    def detach(self, source: Metrics) -> None:
        """Keep what `source` has counted, once nobody else attached it, and let it go."""
        with self._lock:
            self._sources.remove(source)
            if not any(each is source for each in self._sources):
                counts, times = self._detached[source] = source.counters(), source.histograms()
                self._past_counts.update(counts)
                _merge(self._past_times, times)

    @property
    def idle(self) -> bool:
        """True when nothing is attached."""
        return not self._sources

    def collect(self) -> Iterator[Any]:
        """Yield every family of `FAMILIES`, and what has no entry there under its own name."""
        counts, times, gauges = self._read()
        by_name: dict[str, dict[str, float]] = {
            name: {} for name, family in FAMILIES.items() if family.kind == "counter"
        }
        for key, amount in counts.items():
            name, _, value = split_key(key)
            by_name.setdefault(name, {})[value] = amount
        for name, values in by_name.items():
            yield self._counter(name, values)
        for name in {**{name: None for name, (kind, *_) in FAMILIES.items() if kind == "gauge"}, **gauges}:
            text = FAMILIES[name].text if name in FAMILIES else _words(name)
            yield self._core.GaugeMetricFamily(PREFIX + name, text, value=gauges.get(name, 0.0))
        for name, family in FAMILIES.items():
            if family.kind == "histogram":
                yield self._histogram(name, family, times)

    def _read(self) -> tuple[Counter[str], dict[str, Histogram], dict[str, float]]:
        with self._lock:
            sources = list({id(source): source for source in self._sources}.values())
            counts: Counter[str] = Counter(self._past_counts)
            times: dict[str, Histogram] = {}
            _merge(times, self._past_times)
        gauges: dict[str, float] = {}
        for source in sources:
            counts.update(source.counters())
            _merge(times, source.histograms())
            try:
                found = source.gauges()
            except KVMarketError:  # of a marketplace that was closed just now
                continue
            for name, value in found.items():
                before = gauges.get(name, 0.0)
                gauges[name] = max(before, value) if name in HIGHEST else before + value
        return counts, times, gauges

    def _counter(self, name: str, values: dict[str, float]) -> Any:
        family = FAMILIES.get(name) or Family("counter", _words(name), "" if set(values) <= {""} else "kind")
        labels = [family.label] if family.label else []
        found = self._core.CounterMetricFamily(PREFIX + name, family.text, labels=labels)
        for value, amount in (values or ({} if labels else {"": 0.0})).items():
            found.add_metric([value] if labels else [], amount)
        return found

    def _histogram(self, name: str, family: Family, times: dict[str, Histogram]) -> Any:
        labels = [family.label] if family.label else []
        found = self._core.HistogramMetricFamily(PREFIX + name, family.text, labels=labels)
        for key, histogram in times.items():
            of, _, phase = split_key(key)
            if of == name:
                found.add_metric([phase] if labels else [], _cumulated(histogram), histogram.total)
        return found


def _words(name: str) -> str:
    return name.replace("_", " ")


def _merge(into: dict[str, Histogram], more: dict[str, Histogram], sign: int = 1) -> None:
    for key, histogram in more.items():
        into.setdefault(key, Histogram()).merge(histogram, sign)


def _cumulated(histogram: Histogram) -> list[tuple[str, float]]:
    buckets, below = [], 0
    for limit, count in zip((*BUCKETS_S, float("inf")), histogram.counts, strict=True):
        below += count
        buckets.append((f"{limit:g}" if limit != float("inf") else "+Inf", float(below)))
    return buckets


class Endpoint:
    """One HTTP endpoint ``/metrics`` of this process, for as long as something is attached to it.

    Args:
        host, port: where it listens; port 0 takes a free one.

    Attributes:
        port: where it listens now; 0 while it does not.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host, self._wanted, self.port = host, port, 0
        self._collector = MarketCollector()
        self._lock = threading.Lock()
        self._server: Any = None

    def attach(self, sources: Iterable[Metrics]) -> None:
        """Export `sources` too; listen if this is the first. A port that is taken is a line in the log, no error."""
        with self._lock:
            for source in sources:
                self._collector.attach(source)
            if self._server is None:
                self._listen()

    def _listen(self) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self._collector)
        try:
            self._server, _thread = start_http_server(self._wanted, self.host, registry)
        except OSError as error:
            events.warning(
                "metrics_port", "metrics are not served", address=f"{self.host}:{self._wanted}", error=error.strerror
            )
            return
        self.port = self._server.server_port

    def detach(self, sources: Iterable[Metrics]) -> None:
        """Let `sources` go; without any left, stop listening."""
        with self._lock:
            for source in sources:
                self._collector.detach(source)
            server, self._server = (self._server, None) if self._collector.idle else (None, self._server)
            if server is not None:
                self.port = 0
                server.shutdown()
                server.server_close()


_endpoints: dict[tuple[str, int], Endpoint] = {}
_endpoints_lock = threading.Lock()


def endpoint(host: str, port: int) -> Endpoint:
    """Return this process's endpoint at that address."""
    with _endpoints_lock:
        return _endpoints.setdefault((host, port), Endpoint(host, port))
