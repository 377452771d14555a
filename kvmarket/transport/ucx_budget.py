"""A limit on bytes in flight."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmarket.deadline import Deadline

_LOOK_S = 0.02
"""How often a waiter looks whether its deadline was cancelled."""


class ByteBudget:
    """At most `limit` bytes are taken at any time; one request larger than that may have it all. Thread-safe."""

    def __init__(self, limit: int, outer: ByteBudget | None = None) -> None:
        self._limit, self._outer = limit, outer
        self._taken = 0
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        """Bytes in flight now."""
        return self._taken

    def take_now(self, nbytes: int) -> bool:
        """Take bytes if there is room for them at once. For who holds some: waiting then, two could wait for ever."""
        with self._changed:
            if self._taken and self._taken + nbytes > self._limit:
                return False
            self._taken += nbytes
        if self._outer is not None and not self._outer.take_now(nbytes):
            self._return(nbytes)
            return False
        return True

    def take(self, nbytes: int, deadline: Deadline) -> bool:
        """Wait for room; False when the deadline came first, and then nothing is taken."""
        with self._changed:
            while self._taken and self._taken + nbytes > self._limit:
                if deadline.expired:
                    return False
                self._changed.wait(min(_LOOK_S, deadline.remaining_s) or 0.001)
            self._taken += nbytes
        if self._outer is not None and not self._outer.take(nbytes, deadline):
            self._return(nbytes)
            return False
        return True

    def give_back(self, nbytes: int) -> None:
        """Return bytes taken before."""
        if self._outer is not None:
            self._outer.give_back(nbytes)
        self._return(nbytes)

    def _return(self, nbytes: int) -> None:
        with self._changed:
            self._taken -= nbytes
            self._changed.notify_all()
