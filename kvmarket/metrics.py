"""Counters of one marketplace, cheap enough to be always on."""

from __future__ import annotations

import threading
from collections import Counter


class Metrics:
    """Monotonic counters by name. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, **amounts: float) -> None:
        """Add to counters; they start at 0."""
        with self._lock:
            self._counts.update(amounts)

    def add_reason(self, kind: str, reason: str, amount: int = 1) -> None:
        """Count an outcome by reason, as ``kind{reason=...}``."""
        with self._lock:
            self._counts[f"{kind}{{reason={reason}}}"] += amount

    def snapshot(self) -> dict[str, float]:
        """Return all counters."""
        with self._lock:
            return dict(self._counts)
