"""Comparing what arrived with what was announced: the digests of pages, while their bytes are still in the cache."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.announced import DIGEST_BYTES, named
from kvmarket.digest import can_digest, default_digest, page_digests
from kvmarket.transport import ReadRequest

if TYPE_CHECKING:
    from kvmarket.announced import Announced
    from kvmarket.region.pages import PagedMemory

SAMPLE_ONE_IN = 16


class Verification:
    """Verifies the pages of one read on the threads that read them. Thread-safe.

    On another thread it would cost more: the bytes would have to come from memory or from another core's cache.

    Args:
        mode: ``full``, ``sampled`` (one page in `SAMPLE_ONE_IN`) or ``none``.
        announced: what was announced of the pages.
        local: where the pages arrive.
        local_pages: (n,) page numbers there, one for each of those.
        algorithm: of the announced digests; default: the one for this kind of memory.

    Attributes:
        announced: as above.
        wanted: (n,) bool: pages to compare; `Announced.every` when that is all of them.
        mismatched: pages (indices into `announced`) whose bytes are not those announced.
        blocks: pages compared.
        seconds: time it took, summed over threads.
    """

    def __init__(
        self,
        mode: str,
        announced: Announced,
        local: PagedMemory,
        local_pages: np.ndarray,
        algorithm: str = "",
    ) -> None:
        self._local, self._local_pages = local, local_pages
        self._algorithm = algorithm or default_digest(local.kind)
        if not can_digest(local.kind, self._algorithm):
            mode = "none"
        self.announced = announced
        self._any = self._all = mode == "full" and self.announced.vouched
        self.wanted = self.announced.every if self._all else self._chosen(mode)
        self._lock = threading.Lock()
        self.mismatched: set[int] = set()
        self.blocks, self.seconds = 0, 0.0

    def _chosen(self, mode: str) -> np.ndarray:
        count = len(self.announced)
        if mode == "none":
            return np.zeros(count, bool)
        wanted = named(self.announced.digests)
        if mode == "sampled":
            offset = random.randrange(SAMPLE_ONE_IN)  # noqa: S311 - which pages are sampled is no secret
            wanted &= np.arange(count) % SAMPLE_ONE_IN == offset % max(1, min(SAMPLE_ONE_IN, count))
        self._any = bool(wanted.any())
        return wanted

    @property
    def request(self) -> ReadRequest:
        """The read of all pages over a connection that digests them, and has the digests compared here."""
        known = self.announced
        return ReadRequest(
            known.pages, known.generations, self._local, self._local_pages, self.wanted, self.compare, known
        )

    def check(self, indices: np.ndarray) -> None:
        """Verify pages that have just arrived."""
        if not self._any:
            return
        chosen = indices if self._all else indices[self.wanted[indices]]
        if not len(chosen):
            return
        began = time.perf_counter()
        digests = b"".join(page_digests(self._local, self._local_pages[chosen], self._algorithm))
        self._compare(chosen, digests, began)

    def compare(self, indices: np.ndarray | slice, digests: np.ndarray) -> None:
        """Verify pages that have just arrived by their digests, (n,) V16, which came with them."""
        began = time.perf_counter()
        if not isinstance(indices, slice):
            self._compare(indices, digests.tobytes(), began)
        elif self.announced.same_digests(indices, digests):
            self._count(len(digests), (), began)
        else:
            self._compare(np.arange(indices.start, indices.stop), digests.tobytes(), began)

    def _compare(self, chosen: np.ndarray, actual: bytes, began: float) -> None:
        wrong: list[int] = []
        expected = self.announced.digests[chosen]
        if actual != expected.tobytes():
            wrong = chosen[np.frombuffer(actual, f"V{DIGEST_BYTES}") != expected].tolist()
        self._count(len(chosen), wrong, began)

    def _count(self, blocks: int, wrong: list[int] | tuple[()], began: float) -> None:
        with self._lock:
            self.mismatched.update(wrong)
            self.blocks += blocks
            self.seconds += time.perf_counter() - began
