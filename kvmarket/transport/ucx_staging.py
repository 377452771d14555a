"""Buffers for what an owner sends and the caller's pages cannot take well: registered, on huge pages, touched before.

Over RDMA a large message goes straight into memory that the card knows. UCX makes memory known to it as it goes, piece
by piece, which costs more than copying a short piece does; so groups of short pieces arrive in a buffer that is known
already, and the thread that waits for them copies them to where they belong, before anybody is told that they are here.
Other lanes copy anyway, straight into the pages.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.region.memory import private_huge_pages
from kvmarket.transport import ucx_api as api
from kvmarket.transport.ucx_settings import is_rdma

if TYPE_CHECKING:
    from collections.abc import Callable

BUFFER_BYTES = 8 << 20
"""A group, see `kvmarket.transport.ucx_read`."""
BUFFERS_MAX = 4
"""More groups at once than this go straight into the pages."""
PIECE_BYTES_MIN = 64 << 10
"""Longer pieces, on average, are left to UCX. By the cost of a copy; no card was there to measure the other side."""


class StagingBuffer:
    """One buffer.

    Attributes:
        array: (BUFFER_BYTES,) uint8.
        memory: UCX's handle of its registration.
    """

    def __init__(self, context: int) -> None:
        self.array = private_huge_pages(BUFFER_BYTES)
        self.memory = api.map_memory(context, self.array.ctypes.data, BUFFER_BYTES)

    def iov(self, nbytes: int) -> np.ndarray:
        """(1, 2) uint64: the scatter/gather list of its first bytes."""
        return np.array([[self.array.ctypes.data, nbytes]], np.uint64)


class StagingBuffers:
    """A bounded number of buffers, made when they are needed and kept.

    Args:
        context: returns the handle of the UCX context.
    """

    def __init__(self, context: Callable[[], int]) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._idle: list[StagingBuffer] = []
        self.made: list[StagingBuffer] = []

    def take(self, nbytes: int) -> StagingBuffer | None:
        """Return a buffer for `nbytes`, or None when there is none; with the driver's turn."""
        with self._lock:
            if nbytes > BUFFER_BYTES or not (self._idle or len(self.made) < BUFFERS_MAX):
                return None
            if not self._idle:
                try:
                    self.made.append(StagingBuffer(self._context()))
                except api.UcxError:
                    return None  # no more memory may be registered
                return self.made[-1]
            return self._idle.pop()

    def give_back(self, buffer: StagingBuffer) -> None:
        """Take back a buffer that UCX does not write to any more. Any thread."""
        with self._lock:
            self._idle.append(buffer)

    @property
    def in_use(self) -> int:
        """Buffers that somebody has now."""
        return len(self.made) - len(self._idle)

    def close(self) -> None:
        """Give the registrations back; with the driver's turn, after the last read. Idempotent."""
        with self._lock:
            for buffer in self.made:
                api.libucp().ucp_mem_unmap(self._context(), buffer.memory)
            self.made.clear()
            self._idle.clear()


def wants_staging(lanes: tuple[tuple[str, str], ...], iov: np.ndarray) -> bool:
    """Tell whether a message for these pieces, (n, 2) addresses and lengths, had better arrive in a buffer."""
    pieces = len(iov)
    return pieces > 1 and int(iov[:, 1].sum()) < pieces * PIECE_BYTES_MIN and any(is_rdma(name) for name, _ in lanes)
