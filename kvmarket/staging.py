"""Buffers for fetches without a destination: huge pages, touched in advance, used again."""

from __future__ import annotations

import threading
import weakref

import numpy as np

from kvmarket.region.memory import private_huge_pages

BUFFER_BYTES_MIN = 2 << 20
KEPT_BYTES_MAX = 1 << 30


class _Lease:
    """What the arrays of one buffer keep alive; its death gives the buffer back.

    It is not an array itself: numpy makes the base of a view the array *behind* the one viewed, so an array in between
    would die, and the buffer come back, while the view is in use.
    """

    def __init__(self, buffer: np.ndarray) -> None:
        self.__array_interface__ = buffer.__array_interface__


class StagingPool:
    """Lends page arrays; a buffer comes back when the last array that refers to it is gone. Thread-safe."""

    def __init__(self, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._lock = threading.RLock()  # a lease may die, in the garbage collector, anywhere: under the lock as well
        self._idle: list[np.ndarray] = []
        self._kept_bytes_max = kept_bytes_max

    def pages(self, blocks: int, page_bytes: int) -> np.ndarray:
        """Return a (blocks, page_bytes) uint8 array with undefined contents."""
        size = BUFFER_BYTES_MIN
        while size < blocks * page_bytes:
            size *= 2
        with self._lock:
            found = next((i for i, buffer in enumerate(self._idle) if len(buffer) == size), None)
            buffer = self._idle.pop(found) if found is not None else None
        if buffer is None:
            buffer = private_huge_pages(size)
        lease = _Lease(buffer)
        weakref.finalize(lease, self._give_back, buffer).atexit = False
        return np.asarray(lease)[: blocks * page_bytes].reshape(blocks, page_bytes)

    def _give_back(self, buffer: np.ndarray) -> None:
        with self._lock:
            if sum(map(len, self._idle)) + len(buffer) <= self._kept_bytes_max:
                self._idle.append(buffer)
