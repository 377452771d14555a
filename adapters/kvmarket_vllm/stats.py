"""Counters in vLLM's own /metrics, as ``vllm:kvmarket_*_total``.

With several workers, blocks, bytes and seconds are summed over them. Requests and tokens are counted once.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "lookups": "prefixes looked up in the registry",
    "lookup_hit_tokens": "prompt tokens that peers offered beyond the local prefix cache",
    "loads": "fetches from peers that were started, by the first rank",
    "load_failures": "fetches (of any rank) that delivered fewer blocks than promised; the rest was recomputed",
    "loaded_tokens": "prompt tokens adopted from peers, as the first rank has them",
    "loaded_bytes": "bytes adopted from peers",
    "load_seconds": "seconds spent reading and proving blocks",
    "blocks_offered": "blocks offered to peers, in place",
    "blocks_retracted": "offered blocks that were taken back before being overwritten",
    "blocks_kept": "blocks copied to the host arena before vLLM overwrote them",
    "keep_seconds": "seconds spent copying them",
    "blocks_announced": "blocks that the registry took",
    "announcements_failed": "blocks that the registry did not take",
    "announcements_dropped": "blocks not announced because too many waited",
    "blocks_verified": "adopted blocks whose bytes were compared with the owner's digest",
    "disk_blocks_written": "kept blocks written to disk",
    "disk_blocks_promoted": "blocks taken back from disk after a start",
    "disk_errors": "failures of the disk, after which it is done without",
    "resets": "times all processes of the namespace were told to forget",
    "errors": "unexpected errors, each turned into a recompute",
}
LABELLED = {
    "hook_steps": ("role", "engine steps that the connector took part in, by its role"),
    "hook_seconds": ("role", "seconds of the engine's thread spent in the connector's hooks, by its role"),
    "misses": ("reason", "look-ups that ended before the prompt did, by reason"),
    "blocks_refused": ("reason", "blocks read and discarded, by reason"),
    "arena_evicted": ("reason", "kept blocks that left the host arena, by reason"),
    "transport_bytes": ("transport", "bytes read from peers, by the transport that really carried them"),
    "tier_bytes": ("tier", "bytes read, by what held them: an engine's KV cache, an arena of copies, or a disk"),
    "path_bytes": ("path", "bytes read from peers, by the way they took: mapped memory, or the lanes of UCX"),
}
"""Counters with one more label: name -> (label, documentation)."""


@dataclass
class MarketStats(KVConnectorStats):
    """Deltas since the last step, by counter name or ``name{label=value}``."""

    def reset(self) -> None:
        """Start again from nothing."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another role's or rank's deltas."""
        for key, value in other.data.items():
            self.data[key] = self.data.get(key, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what the periodic log line shows."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """True when nothing happened."""
        return not self.data


class Deltas:
    """Collects counts between two steps. Thread-safe.

    Attributes:
        pending: what was not taken yet, by counter. Looked at without a lock: what is being added is seen next time.
        totals: all since the start, for tests and for people.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.pending: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()

    def add(self, **amounts: float) -> None:
        """Add to counters of `COUNTERS`."""
        with self._lock:
            pending, totals = cast("dict[str, float]", self.pending), cast("dict[str, float]", self.totals)
            for name, amount in amounts.items():  # `Counter.update` takes several times as long, for few
                pending[name] += amount
                totals[name] += amount

    def add_labelled(self, name: str, value: str, amount: float = 1) -> None:
        """Add to a counter of `LABELLED`, under a value of its label."""
        self.add(**{f"{name}{{{LABELLED[name][0]}={value}}}": amount})

    def take(self) -> MarketStats | None:
        """Return the deltas and start again, or None when nothing happened."""
        if not self.pending:
            return None
        with self._lock:
            data, self.pending = dict(self.pending), Counter()
            return MarketStats(data=data)


class MarketPromMetrics(KVConnectorPromMetrics):
    """Prometheus counters of one API process."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._values = per_engine_labelvalues
        self._counters = {
            name: self._counter_cls(name=f"vllm:kvmarket_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        self._labelled = {
            name: self._counter_cls(name=f"vllm:kvmarket_{name}", documentation=text, labelnames=[*labelnames, label])
            for name, (label, text) in LABELLED.items()
        }
        for values in per_engine_labelvalues.values():
            for counter in self._counters.values():
                counter.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one step's deltas."""
        values = self._values[engine_idx]
        for key, amount in transfer_stats_data.items():
            name, _, label = key.partition("{")
            if name in self._counters:
                self._counters[name].labels(*values).inc(amount)
            elif name in self._labelled:
                self._labelled[name].labels(*values, label.partition("=")[2].removesuffix("}")).inc(amount)
