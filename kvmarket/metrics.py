"""Counters of one marketplace or registry, cheap enough to be always on; histograms and gauges once somebody exports.

What the names mean is in `kvmarket.metric_families`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LABEL_VALUES_MAX = 64
"""Values of one label; what comes later is counted as `OTHER`: nothing that peers say makes series without end."""
OTHER = "other"
BUCKETS_S = (*(digit * 10.0**power for power in range(-5, 1) for digit in (1, 2.5, 5)), 10.0)
"""Upper limits of the buckets of every histogram, seconds: 10 us to 10 s."""


def labelled(name: str, label: str, value: str) -> str:
    """Return the key under which a count with a label is kept: ``name{label=value}``."""
    return f"{name}{{{label}={value}}}"


def split_key(key: str) -> tuple[str, str, str]:
    """Return name, label and value of a key; the latter two are empty for a name without a label."""
    name, _, rest = key.partition("{")
    label, _, value = rest.removesuffix("}").partition("=")
    return name, label, value


class Histogram:
    """How often an observation fell into each bucket. Not thread-safe.

    Attributes:
        counts: per bucket of `BUCKETS_S`, and one for what is above them all.
        total: the sum of all observations.
    """

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(BUCKETS_S) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.total += seconds

    def merge(self, other: Histogram, sign: int = 1) -> None:
        """Add all of another's observations, or take them out again with `sign` -1."""
        self.counts = [mine + sign * theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += sign * other.total


class Metrics:
    """Monotonic counters, levels and durations by name. Thread-safe.

    Attributes:
        timed: somebody exports, so `observe` is worth calling; false costs whoever asks one look at an attribute.
        changes: grows whenever something is counted: who looks at every step sees that there is nothing new.
    """

    def __init__(self) -> None:
        self.timed = False
        self.changes = 0
        self._lock = threading.Lock()
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._values: dict[str, set[str]] = {}
        self._read_names: dict[tuple[str, str, str], tuple[str, ...]] = {}
        self._histograms: dict[str, Histogram] = {}
        self._levels: dict[str, float] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def add(self, **amounts: float) -> None:
        """Add to counters; they start at 0."""
        with self._lock:
            self.changes += 1
            for name, amount in amounts.items():
                self._counts[name] += amount

    def add_reason(self, kind: str, reason: str, amount: int = 1) -> None:
        """Count an outcome by reason, as ``kind{reason=...}``."""
        self.add_labelled(kind, "reason", reason, amount)

    def add_labelled(self, name: str, label: str, value: str, amount: float = 1) -> None:
        """Add to ``name{label=value}``; of one name's values at most `LABEL_VALUES_MAX` are told apart."""
        with self._lock:
            self.changes += 1
            self._counts[labelled(name, label, self._known(name, value))] += amount

    def add_read(self, transport: str, path: str, nbytes: int, tier: str, blocks: int) -> None:
        """Count one read from a peer, by what carried it and what held it: one call, since every read makes it."""
        with self._lock:
            self.changes += 1
            counts = self._counts
            names = self._read_names.get((transport, path, tier)) or self._name_read(transport, path, tier)
            by_transport, by_transport_bytes, by_path, by_path_bytes, by_tier = names
            counts[by_transport] += 1
            counts[by_transport_bytes] += nbytes
            counts[by_path] += 1
            counts[by_path_bytes] += nbytes
            if blocks:
                counts[by_tier] += blocks

    def _name_read(self, transport: str, path: str, tier: str) -> tuple[str, ...]:
        """Return the keys of what a read counts; remembered, since most reads have the same ones."""
        names = []
        for label, value in (("transport", transport), ("path", path)):
            known = self._known(label, value)
            names += [labelled(f"{label}_{what}", label, known) for what in ("reads", "bytes")]
        names.append(labelled("tier_blocks", "tier", self._known("tier", tier)))
        if len(self._read_names) < LABEL_VALUES_MAX:
            self._read_names[transport, path, tier] = tuple(names)
        return tuple(names)

    def _known(self, name: str, value: str) -> str:
        values = self._values.setdefault(name, set())
        if value not in values:
            if len(values) >= LABEL_VALUES_MAX:
                return OTHER
            values.add(value)
        return value

    def observe(self, name: str, seconds: float, phase: str = "") -> None:
        """Enter a duration into a histogram, by phase where there are some. For callers that have seen `timed`."""
        with self._lock:
            key = labelled(name, "phase", self._known(name, phase)) if phase else name
            histogram = self._histograms.get(key)
            if histogram is None:
                histogram = self._histograms[key] = Histogram()
            histogram.add(seconds)

    def observe_phases(self, name: str, phases: Mapping[str, float]) -> None:
        """Enter the duration of every phase."""
        for phase, seconds in phases.items():
            self.observe(name, seconds, phase)

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Have `read` called whenever somebody looks at gauges; it must not block."""
        self._gauges[name] = read

    def level(self, **values: float) -> None:
        """Say how high something stands now: bytes held, blocks pinned."""
        with self._lock:
            self._levels.update(values)

    def snapshot(self) -> dict[str, float]:
        """Return all counters and levels."""
        with self._lock:
            return {**self._counts, **self._levels}

    def counters(self) -> dict[str, float]:
        """Return all counters."""
        with self._lock:
            return dict(self._counts)

    def histograms(self) -> dict[str, Histogram]:
        """Return copies of all histograms."""
        copies: dict[str, Histogram] = {}
        with self._lock:
            for key, histogram in self._histograms.items():
                copies[key] = Histogram()
                copies[key].merge(histogram)
        return copies

    def gauges(self) -> Mapping[str, float]:
        """Return all levels, and what is read at any time."""
        with self._lock:
            levels = dict(self._levels)
        return levels | {name: float(read()) for name, read in list(self._gauges.items())}
