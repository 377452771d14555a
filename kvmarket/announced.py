"""What an owner announced of pages of one region, prepared once and compared often.

A read compares the generations of its pages before and after the copy, and their digests behind that. Nearly always all
of them are as announced, which one comparison of bytes says; only where it does not is each page looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvmarket.registry.records import BlockRecords

DIGEST_BYTES, GENERATION_BYTES = 16, 8
NO_DIGEST = bytes(DIGEST_BYTES)
"""Stands for "the owner computed none": such a page can only be checked by its generation."""
_NO_DIGEST = np.void(NO_DIGEST)
_ODD, _NEVER = np.uint64(1), 1 << 64
"""No table is that long: pages with an odd generation, or none, are not readable."""


def named(digests: np.ndarray) -> np.ndarray:
    """Return (n,) bool: which of (n,) V16 are digests, and not `NO_DIGEST`."""
    found: np.ndarray = digests != _NO_DIGEST
    return found


class Announced:
    """Pages of one region of one owner. Immutable; its arrays must not be written to.

    Attributes:
        pages: (n,) int64 page numbers.
        generations: (n,) uint64.
        digests: (n,) V16; zero where the owner computed none.
        vouched: every page has a digest.
        every: (n,) bool, all True.
    """

    __slots__ = ("_digest_bytes", "_end", "_generation_bytes", "digests", "every", "generations", "pages", "vouched")

    def __init__(self, pages: np.ndarray, generations: np.ndarray, digests: np.ndarray) -> None:
        self.pages, self.generations, self.digests = pages, generations, digests
        self._generation_bytes, self._digest_bytes = generations.tobytes(), digests.tobytes()
        self.every = named(digests)
        self.vouched = bool(np.logical_and.reduce(self.every))
        if not self.vouched:
            self.every = np.ones(len(pages), bool)
        self._end = _NEVER
        odd = np.bitwise_or.reduce(generations) & _ODD  # ufuncs as such: as methods of arrays they take twice as long
        if len(pages) and not odd and np.minimum.reduce(generations):
            self._end = int(np.maximum.reduce(pages.view(np.uint64))) + 1  # as unsigned, negative numbers are large

    @classmethod
    def of(cls, records: BlockRecords) -> Announced:
        """Take the columns of records of one region of one owner."""
        column = np.ascontiguousarray
        return cls(column(records["page"]), column(records["generation"]), column(records["digest"]))

    def __len__(self) -> int:
        return len(self.pages)

    def current(self, generations: np.ndarray, part: slice | None = None) -> bool:
        """Tell whether a region's table has pages readable, at the generations that were announced, right now.

        Args:
            generations: the table.
            part: which pages, without a step; None: all.
        """
        if self._end > len(generations):
            return False
        if part is None:
            return generations.take(self.pages).tobytes() == self._generation_bytes
        now = generations.take(self.pages[part]).tobytes()
        return now == self._generation_bytes[GENERATION_BYTES * part.start : GENERATION_BYTES * part.stop]

    def same_digests(self, part: slice, digests: np.ndarray) -> bool:
        """Tell whether (n,) V16 `digests` are those of the pages of `part`, which has no step."""
        return digests.tobytes() == self._digest_bytes[DIGEST_BYTES * part.start : DIGEST_BYTES * part.stop]
