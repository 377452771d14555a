"""Pages: where the bytes of a block lie, contiguous or scattered, and the gather/scatter copy between two such places.

The page of a block may be one run of bytes (an arena) or several (one per layer and per K/V of an engine's own paged
tensors). `copy_pages` moves pages between any two arrangements of equal page size, with no Python call per page on the
common path (a packed destination).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvmarket.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

RELEASED_BYTES_MIN = 256 << 10
"""Bytes of one copy for which it is worth to release the GIL and take it back."""
SHORT_BYTES = 4 << 10
"""Shorter pieces in random places are cheaper to copy twice, through a buffer, than with a Python statement each."""
_SIGNED = np.dtype(np.int64)
BUFFER_BYTES = 512 << 10
"""Half of a common second-level cache."""


def _unsigned(pages: np.ndarray) -> np.ndarray:
    """Return page numbers as unsigned ones, in which negative ones are large."""
    return pages.view(np.uint64) if pages.dtype == _SIGNED else pages.astype(np.uint64)


@dataclass(frozen=True, slots=True)
class Segment:
    """One run of bytes in every page: page p has it at ``offset + p * stride`` of memory number `memory`."""

    memory: int
    offset: int
    stride: int
    nbytes: int


@dataclass(frozen=True)
class PageLayout:
    """The segments of a page, in page order. Hashable, so that copy plans are cached."""

    num_pages: int
    segments: tuple[Segment, ...]

    def __hash__(self) -> int:
        # The generated one would hash every segment of an engine's many on every copy.
        return hash((self.num_pages, len(self.segments), self.segments[:1]))

    @cached_property
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

    def check_pages(self, pages: np.ndarray) -> None:
        """Raise `InvalidInputError` unless this layout has every one of `pages`."""
        if len(pages) and np.maximum.reduce(_unsigned(pages)) >= self.num_pages:
            raise InvalidInputError(f"page number outside [0, {self.num_pages})")

    def as_list(self) -> list[object]:
        """The wire form."""
        return [self.num_pages, [[s.memory, s.offset, s.stride, s.nbytes] for s in self.segments]]

    @classmethod
    def packed(cls, num_pages: int, page_bytes: int) -> PageLayout:
        """One run of bytes per page, one page after the other, in one memory."""
        return cls(num_pages, (Segment(0, 0, page_bytes, page_bytes),))


@dataclass(frozen=True)
class PagedMemory:
    """A page layout over mapped memory: `memories` are flat uint8 arrays.

    Attributes:
        kind: what holds them: ``host`` here, ``cuda`` in `kvmarket.region.cuda.CudaPagedMemory`.
    """

    layout: PageLayout
    memories: tuple[np.ndarray, ...]
    kind: ClassVar[str] = "host"

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


def copy_plan(source: PageLayout, target: PageLayout) -> tuple[tuple[Segment, Segment], ...]:
    """Cut two layouts of one page size into runs that are contiguous on both sides, in page order."""
    return tuple((piece.source, piece.target) for piece in _copy_plan(source, target))


def _rows(memory: PagedMemory, segment: Segment) -> np.ndarray:
    """View one segment of all pages as (num_pages, nbytes) uint8."""
    shape, strides = (memory.layout.num_pages, segment.nbytes), (segment.stride, 1)
    flat = memory.memories[segment.memory]
    return np.ndarray(shape, np.uint8, buffer=flat, offset=segment.offset, strides=strides)


def _items(memory: PagedMemory, segment: Segment) -> np.ndarray:
    """View one segment of all pages as (num_pages,) opaque items, which numpy moves one memcpy each."""
    flat, shape = memory.memories[segment.memory], (memory.layout.num_pages,)
    return np.ndarray(shape, f"V{segment.nbytes}", buffer=flat, offset=segment.offset, strides=(segment.stride,))


def _is_packed(segment: Segment) -> bool:
    return segment.stride == segment.nbytes


def _consecutive(pages: np.ndarray) -> bool:
    return int(pages[-1]) - int(pages[0]) == len(pages) - 1 and bool((pages[1:] - pages[:-1] == 1).all())


def _runs(source_pages: np.ndarray, target_pages: np.ndarray) -> list[tuple[int, int, int]]:
    """Cut two page lists into (source, target, length) in which both advance by one."""
    steps = (np.diff(source_pages) != 1) | (np.diff(target_pages) != 1)
    starts = np.concatenate(([0], np.flatnonzero(steps) + 1))
    lengths = np.diff(np.concatenate((starts, [len(source_pages)])))
    return list(zip(source_pages[starts].tolist(), target_pages[starts].tolist(), lengths.tolist(), strict=True))


def _check_range(pages: np.ndarray, num_pages: int, *, consecutive: bool) -> None:
    ends = (pages[0], pages[-1]) if consecutive else (np.minimum.reduce(pages), np.maximum.reduce(pages))
    if int(ends[0]) < 0 or int(ends[1]) >= num_pages:
        raise InvalidInputError(f"page number outside [0, {num_pages})")


def copy_pages(source: PagedMemory, source_pages: np.ndarray, target: PagedMemory, target_pages: np.ndarray) -> None:
    """Copy pages `source_pages` of `source` to pages `target_pages` of `target`, byte for byte.

    Per piece of the page it is one call, which releases the GIL, when pages are consecutive on either side: packed
    buffers and prefixes make them so. Else it is one copy per run of consecutive pages.

    Args:
        source: where to copy from.
        source_pages: (n,) int64 page numbers there.
        target: where to copy to; page size as `source`.
        target_pages: (n,) int64 page numbers there, without repeats.

    Raises:
        InvalidInputError: page sizes or list lengths differ, or a page number is out of range.
    """
    if len(source_pages) != len(target_pages):
        raise InvalidInputError(f"{len(source_pages)} source pages for {len(target_pages)} target pages")
    if len(source_pages) == 0:
        return
    gather, scatter = _consecutive(target_pages), _consecutive(source_pages)
    _check_range(source_pages, source.layout.num_pages, consecutive=scatter)
    _check_range(target_pages, target.layout.num_pages, consecutive=gather)
    first, to, count = int(source_pages[0]), int(target_pages[0]), len(source_pages)
    runs = None if gather or scatter else _runs(source_pages, target_pages)
    for piece in _copy_plan(source.layout, target.layout):
        packed = _is_packed(piece.source) and _is_packed(piece.target)
        if gather and scatter:
            _rows(target, piece.target)[to : to + count] = _rows(source, piece.source)[first : first + count]
        elif gather and packed:
            out = _rows(target, piece.target)[to : to + count]
            # "clip" because the default mode buffers the output; the range was checked above
            np.take(_rows(source, piece.source), source_pages, axis=0, out=out, mode="clip")
        elif scatter:
            _items(target, piece.target)[target_pages] = _items(source, piece.source)[first : first + count]
        elif piece.source.nbytes < SHORT_BYTES:
            _copy_short(source, source_pages, target, target_pages, piece)
        else:
            _copy_runs(source, target, piece, runs if runs is not None else _runs(source_pages, target_pages))


def _copy_runs(source: PagedMemory, target: PagedMemory, piece: _Piece, runs: Sequence[tuple[int, int, int]]) -> None:
    """Copy one piece of pages that are scattered on both sides (or not packed), run by run.

    Large runs are copied with the GIL released. Shorter ones are not: taking the GIL back costs more than such a copy,
    and up to the interpreter's switch interval (5 ms) each time if another thread is busy.
    """
    a, b, nbytes = piece.source, piece.target, piece.source.nbytes
    packed = _is_packed(a) and _is_packed(b)
    from_, to_ = source.memories[a.memory].data, target.memories[b.memory].data
    for start, to, length in runs:
        if nbytes * length >= RELEASED_BYTES_MIN:
            _rows(target, b)[to : to + length] = _rows(source, a)[start : start + length]
            continue
        step, repeats = (length * nbytes, 1) if packed else (nbytes, length)
        first, goal = a.offset + start * a.stride, b.offset + to * b.stride
        for _ in range(repeats):
            to_[goal : goal + step] = from_[first : first + step]
            first, goal = first + a.stride, goal + b.stride


def _copy_short(
    source: PagedMemory, source_pages: np.ndarray, target: PagedMemory, target_pages: np.ndarray, piece: _Piece
) -> None:
    """Copy one short piece of scattered pages, many at once through a buffer that stays in the processor's cache."""
    nbytes = piece.source.nbytes
    step = max(1, BUFFER_BYTES // nbytes)
    buffer = np.empty((min(step, len(source_pages)), nbytes), np.uint8)
    items = buffer.reshape(-1).view(f"V{nbytes}")
    rows, out = _rows(source, piece.source), _items(target, piece.target)
    for start in range(0, len(source_pages), step):
        wanted, goals = source_pages[start : start + step], target_pages[start : start + step]
        if _is_packed(piece.source):
            np.take(rows, wanted, axis=0, out=buffer[: len(wanted)], mode="clip")
            out[goals] = items[: len(wanted)]
        else:
            out[goals] = _items(source, piece.source)[wanted]
