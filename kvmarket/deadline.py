"""One deadline for one operation, handed down to everything it calls, and the flag that ends it early."""

from __future__ import annotations

import threading
import time


class Deadline:
    """A point in time on the monotonic clock that may also be cancelled. Thread-safe."""

    __slots__ = ("_at", "_cancelled")

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Make it expire now."""
        self._cancelled.set()

    @property
    def expired(self) -> bool:
        """True once the time has passed or `cancel` was called."""
        return self._cancelled.is_set() or time.monotonic() >= self._at

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return 0.0 if self._cancelled.is_set() else max(0.0, self._at - time.monotonic())
