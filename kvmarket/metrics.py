"""Counters of one marketplace, cheap enough to be always on."""

from __future__ import annotations

import threading
from collections import Counter


class Metrics:
    """Monotonic counters and current levels, by name. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._levels: dict[str, float] = {}

    def add(self, **amounts: float) -> None:
        """Add to counters; they start at 0."""
        with self._lock:
            self._counts.update(amounts)

    def level(self, **values: float) -> None:
        """Say how high something stands now: bytes held, blocks pinned."""
        with self._lock:
            self._levels.update(values)

    def add_reason(self, kind: str, reason: str, amount: int = 1) -> None:
        """Count an outcome by reason, as ``kind{reason=...}``."""
        self.add_labelled(kind, "reason", reason, amount)

    def add_labelled(self, name: str, label: str, value: str, amount: int = 1) -> None:
        """Count under a value of a label, as ``name{label=value}``."""
        with self._lock:
            self._counts[f"{name}{{{label}={value}}}"] += amount

    def snapshot(self) -> dict[str, float]:
        """Return all counters and levels."""
        with self._lock:
            return {**self._counts, **self._levels}
