"""Scatter/gather lists of pages: arithmetic on addresses, no UCX."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.region.cuda import CudaPagedMemory

if TYPE_CHECKING:
    from kvmarket.region.pages import PagedMemory, PageLayout

PIECES_MAX = 8192
"""Entries of one list; page groups are cut so that neither side has more."""
_FEW = 8
"""So few pieces are sooner counted out one by one than by numpy."""


@dataclass(frozen=True, slots=True)
class Runs:
    """Contiguous runs of bytes in page order.

    Attributes:
        iov: (n, 2) uint64 addresses and lengths.
        memory: (n,) int64: which memory each is in.
    """

    iov: np.ndarray
    memory: np.ndarray


def page_runs(layout: PageLayout, bases: np.ndarray, pages: np.ndarray) -> Runs:
    """Return where `pages` lie, neighbours joined.

    Args:
        layout: the pages' layout.
        bases: (memories,) uint64 address of each memory.
        pages: (n,) int64 page numbers.
    """
    if len(pages) * len(layout.segments) <= _FEW:
        return _few_runs(layout, bases, pages)
    memory, offset, stride, nbytes = _segments(layout).T
    starts = (bases[memory.astype(np.int64)] + offset)[None, :] + pages.astype(np.uint64)[:, None] * stride[None, :]
    addresses = starts.reshape(-1)
    lengths = np.broadcast_to(nbytes, starts.shape).reshape(-1)
    memories = np.broadcast_to(memory.astype(np.int64), starts.shape).reshape(-1)
    joined = (addresses[:-1] + lengths[:-1] == addresses[1:]) & (memories[:-1] == memories[1:])
    first = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    iov = np.empty((len(first), 2), np.uint64)
    iov[:, 0] = addresses[first]
    iov[:, 1] = np.add.reduceat(lengths, first)
    return Runs(iov, memories[first])


@lru_cache(maxsize=64)
def _segments(layout: PageLayout) -> np.ndarray:
    """(segments, 4) uint64: memory, offset, stride, bytes."""
    segments = np.array([[s.memory, s.offset, s.stride, s.nbytes] for s in layout.segments], np.uint64)
    segments.flags.writeable = False
    return segments


def _few_runs(layout: PageLayout, bases: np.ndarray, pages: np.ndarray) -> Runs:
    found: list[list[int]] = []  # address, bytes, memory
    starts = bases.tolist()
    for page in pages.tolist():
        for segment in layout.segments:
            address = starts[segment.memory] + segment.offset + page * segment.stride
            if found and found[-1][0] + found[-1][1] == address and found[-1][2] == segment.memory:
                found[-1][1] += segment.nbytes
            else:
                found.append([address, segment.nbytes, segment.memory])
    table = np.array(found, np.uint64).reshape(-1, 3)
    return Runs(np.ascontiguousarray(table[:, :2]), table[:, 2].astype(np.int64))


def page_lists(layout: PageLayout, bases: np.ndarray, pages: np.ndarray) -> np.ndarray:
    """Return (n, segments, 2) uint64 addresses and lengths of pages, nothing joined; arguments as of `page_runs`."""
    segments = _segments(layout)
    starts = bases[segments[:, 0].astype(np.int64)] + segments[:, 1]
    lists = np.empty((len(pages), len(segments), 2), np.uint64)
    lists[:, :, 0] = starts + pages.astype(np.uint64)[:, None] * segments[:, 2]
    lists[:, :, 1] = segments[:, 3]
    return lists


def local_bases(memory: PagedMemory) -> np.ndarray:
    """Return (memories,) uint64: where each memory of this process starts."""
    if isinstance(memory, CudaPagedMemory):
        return np.array(memory.pointers, np.uint64)
    return np.array([array.ctypes.data for array in memory.memories], np.uint64)


def local_iov(memory: PagedMemory, pages: np.ndarray) -> np.ndarray:
    """Return the (n, 2) uint64 scatter/gather list of pages of this process."""
    return page_runs(memory.layout, local_bases(memory), pages).iov


def cut(remote: Runs, local: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut two lists of equal total length into pieces contiguous in both.

    Returns:
        (n, 3) uint64: local address, length, remote address; and (n,) the remote memory of each piece.
    """
    remote_ends, local_ends = np.cumsum(remote.iov[:, 1]), np.cumsum(local[:, 1])
    ends = np.union1d(remote_ends, local_ends)
    starts = np.concatenate((np.zeros(1, np.uint64), ends[:-1]))
    in_remote = np.searchsorted(remote_ends, starts, side="right")
    in_local = np.searchsorted(local_ends, starts, side="right")
    pieces = np.empty((len(ends), 3), np.uint64)
    pieces[:, 0] = local[in_local, 0] + (starts - (local_ends[in_local] - local[in_local, 1]))
    pieces[:, 1] = ends - starts
    pieces[:, 2] = remote.iov[in_remote, 0] + (starts - (remote_ends[in_remote] - remote.iov[in_remote, 1]))
    return pieces, remote.memory[in_remote]
