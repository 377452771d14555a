"""What a registry that is away could not take, kept to be tried again."""

from __future__ import annotations

import time
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")

BATCHES_MAX = 1024
PAUSE_MIN_S, PAUSE_MAX_S = 0.5, 10.0
"""Between two attempts: doubling from the first to the second while they fail."""


class Backlog(Generic[T]):
    """A bounded queue with one pause for all of it. For one thread."""

    def __init__(self) -> None:
        self._waiting: deque[T] = deque()
        self._pause_s, self._retry_at = PAUSE_MIN_S, 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: T) -> bool:
        """Keep `item` for the next attempt; False when there is no room."""
        if len(self._waiting) >= BATCHES_MAX:
            return False
        if not self._waiting:
            self._retry_at = time.monotonic() + self._pause_s
        self._waiting.append(item)
        return True

    @property
    def wait_s(self) -> float | None:
        """Seconds until the next attempt, or None with nothing to try."""
        return max(0.0, self._retry_at - time.monotonic()) if self._waiting else None

    def take(self) -> list[T]:
        """Return all of it for an attempt; the pause before the next one is longer, until `worked`."""
        taken = list(self._waiting)
        self._waiting.clear()
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        return taken

    def worked(self) -> None:
        """The registry takes announcements again."""
        self._pause_s = PAUSE_MIN_S
