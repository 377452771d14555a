"""Pages: where the bytes of a block lie, contiguous or scattered, and the gather/scatter copy between two such places.

The page of a block may be one run of bytes (an arena) or several (one per layer and per K/V of an engine's own paged
tensors). `copy_pages` moves pages between any two arrangements of equal page size, with no Python call per page on the
common path (a packed destination).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import as_strided

from kvmarket.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALL_PIECE_BYTES = 4096
"""Below this many bytes a piece, numpy's index copy beats one slice assignment per page."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One run of bytes in every page: page p has it at ``offset + p * stride`` of memory number `memory`."""

    memory: int
    offset: int
    stride: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The segments of a page, in page order. Hashable, so that copy plans are cached."""

    num_pages: int
    segments: tuple[Segment, ...]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return sum(segment.nbytes for segment in self.segments)

    def check(self, memory_sizes: Sequence[int]) -> None:
        """Raise `InvalidInputError` unless every byte of every page lies inside its memory."""
        if self.num_pages < 1 or not self.segments:
            raise InvalidInputError("a page layout needs at least one page and one segment")
        for number, segment in enumerate(self.segments):
            end = segment.offset + (self.num_pages - 1) * segment.stride + segment.nbytes
            if not 0 <= segment.memory < len(memory_sizes):
                raise InvalidInputError(f"segment {number} names memory {segment.memory} of {len(memory_sizes)}")
            if segment.offset < 0 or segment.nbytes < 1 or segment.stride < 0 or end > memory_sizes[segment.memory]:
                raise InvalidInputError(f"segment {number} reaches outside its memory")

    def as_list(self) -> list[object]:
        """The wire form."""
        return [self.num_pages, [[s.memory, s.offset, s.stride, s.nbytes] for s in self.segments]]

    @classmethod
    def packed(cls, num_pages: int, page_bytes: int) -> PageLayout:
        """One run of bytes per page, one page after the other, in one memory."""
        return cls(num_pages, (Segment(0, 0, page_bytes, page_bytes),))


@dataclass(frozen=True, slots=True)
class PagedMemory:
    """A page layout over mapped memory: `memories` are flat uint8 arrays."""

    layout: PageLayout
    memories: tuple[np.ndarray, ...]

    @classmethod
    def packed(cls, array: np.ndarray) -> PagedMemory:
        """View a C-contiguous (num_pages, page_bytes) uint8 array as pages."""
        return cls(PageLayout.packed(*array.shape), (array.reshape(-1),))

    def views(self, page: int) -> list[np.ndarray]:
        """The segments of one page as uint8 views, in page order."""
        return [
            self.memories[s.memory][s.offset + page * s.stride : s.offset + page * s.stride + s.nbytes]
            for s in self.layout.segments
        ]


@dataclass(frozen=True, slots=True)
class _Piece:
    source: Segment
    target: Segment


@lru_cache(maxsize=64)
def _copy_plan(source: PageLayout, target: PageLayout) -> tuple[_Piece, ...]:
    """Cut two layouts of one page size into runs that are contiguous on both sides."""
    if source.page_bytes != target.page_bytes:
        raise InvalidInputError(f"pages of {source.page_bytes} and {target.page_bytes} bytes cannot be copied")
    pieces: list[_Piece] = []
    left, right = list(source.segments), list(target.segments)
    while left:
        a, b = left.pop(0), right.pop(0)
        nbytes = min(a.nbytes, b.nbytes)
        pieces.append(
            _Piece(Segment(a.memory, a.offset, a.stride, nbytes), Segment(b.memory, b.offset, b.stride, nbytes))
        )
        if a.nbytes > nbytes:
            left.insert(0, Segment(a.memory, a.offset + nbytes, a.stride, a.nbytes - nbytes))
        if b.nbytes > nbytes:
            right.insert(0, Segment(b.memory, b.offset + nbytes, b.stride, b.nbytes - nbytes))
    return tuple(pieces)


def _rows(memory: PagedMemory, segment: Segment) -> np.ndarray:
    flat = memory.memories[segment.memory][segment.offset :]
    return as_strided(flat, (memory.layout.num_pages, segment.nbytes), (segment.stride, 1))


def _runs(source_pages: np.ndarray, target_pages: np.ndarray) -> list[tuple[int, int, int]]:
    """Cut two page lists into (source, target, length) in which both advance by one."""
    breaks = np.flatnonzero((np.diff(source_pages) != 1) | (np.diff(target_pages) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(source_pages)])))
    return list(zip(source_pages[starts].tolist(), target_pages[starts].tolist(), lengths.tolist(), strict=True))


def copy_pages(source: PagedMemory, source_pages: np.ndarray, target: PagedMemory, target_pages: np.ndarray) -> None:
    """Copy pages `source_pages` of `source` to pages `target_pages` of `target`, byte for byte.

    The copies release the GIL. Per piece of the page: one call when the target pages are consecutive (gather), else one
    per run of consecutive pages.

    Args:
        source_pages, target_pages: (n,) int64, equally long; target pages must not repeat.

    Raises:
        InvalidInputError: page sizes or list lengths differ, or a page number is out of range.
    """
    if len(source_pages) != len(target_pages):
        raise InvalidInputError(f"{len(source_pages)} source pages for {len(target_pages)} target pages")
    if len(source_pages) == 0:
        return
    for pages, memory in ((source_pages, source), (target_pages, target)):
        if int(pages.min()) < 0 or int(pages.max()) >= memory.layout.num_pages:
            raise InvalidInputError(f"page number outside [0, {memory.layout.num_pages})")
    consecutive = bool((np.diff(target_pages) == 1).all())
    runs = _runs(source_pages, target_pages)
    for piece in _copy_plan(source.layout, target.layout):
        rows, out = _rows(source, piece.source), _rows(target, piece.target)
        packed = piece.source.stride == piece.source.nbytes and piece.target.stride == piece.target.nbytes
        if len(runs) > 1 and consecutive and packed:
            first = int(target_pages[0])
            # "clip" because the default mode buffers the output; the range was checked above
            np.take(rows, source_pages, axis=0, out=out[first : first + len(target_pages)], mode="clip")
        elif len(runs) > 1 and piece.source.nbytes < SMALL_PIECE_BYTES:
            out[target_pages] = rows[source_pages]
        else:
            for start, to, length in runs:
                out[to : to + length] = rows[start : start + length]
