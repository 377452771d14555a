"""What an owner announced of pages of one region, prepared once and compared often.

A read compares the generations of its pages before and after the copy, and their digests behind that. Nearly always all
of them are as announced, which one comparison of bytes says; only where it does not is each page looked at.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvmarket.registry.records import BlockRecords

DIGEST_BYTES, GENERATION_BYTES = 16, 8
NO_DIGEST = bytes(DIGEST_BYTES)
"""Stands for "the owner computed none": such a page can only be checked by its generation."""
_NO_DIGEST = np.void(NO_DIGEST)
_ODD, _NEVER = np.uint64(1), 1 << 64


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

    def __init__(self, pages: np.ndarray, generations: np.ndarray, digests: np.ndarray) -> None:
        self.pages, self.generations, self.digests = pages, generations, digests
        self.every = named(digests)
        self.vouched = bool(np.logical_and.reduce(self.every))
        if not self.vouched:
            self.every = np.ones(len(pages), bool)

    @cached_property
    def _digest_bytes(self) -> bytes:
        return self.digests.tobytes()

    @cached_property
    def _generation_bytes(self) -> bytes:
        return self.generations.tobytes()

    @cached_property
    def _end(self) -> int:
        """How long a table must be; `_NEVER` where one of the generations says that its page is not readable."""
        odd = np.bitwise_or.reduce(self.generations) & _ODD  # not as methods of arrays, which take twice as long
        if not len(self.pages) or odd or not np.minimum.reduce(self.generations):
            return _NEVER
        return int(np.maximum.reduce(self.pages.view(np.uint64))) + 1  # as unsigned, negative numbers are large

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
