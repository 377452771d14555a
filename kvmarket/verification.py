"""Comparing what arrived with what was announced: the digests of pages, while their bytes are still in the cache."""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.digest import can_digest, default_digest, page_digests
from kvmarket.registry.records import DIGEST_BYTES, BlockRecords, have_digest

if TYPE_CHECKING:
    from kvmarket.region.pages import PagedMemory

SAMPLE_ONE_IN = 16


class Verification:
    """Verifies the pages of one read on the threads that read them. Thread-safe.

    On another thread it would cost more: the bytes would have to come from memory or from another core's cache.

    Args:
        mode: ``full``, ``sampled`` (one page in `SAMPLE_ONE_IN`) or ``none``.
        run: what was announced, one record per page.
        local: where the pages arrive.
        local_pages: (n,) page numbers there, one per record.
        algorithm: of the announced digests; default: the one for this kind of memory.

    Attributes:
        wanted: (n,) bool: pages to compare.
        mismatched: pages (indices into `run`) whose bytes are not those announced.
        blocks: pages compared.
        seconds: time it took, summed over threads.
    """

    def __init__(
        self, mode: str, run: BlockRecords, local: PagedMemory, local_pages: np.ndarray, algorithm: str = ""
    ) -> None:
        self._local, self._local_pages = local, local_pages
        self._algorithm = algorithm or default_digest(local.kind)
        if not can_digest(local.kind, self._algorithm):
            mode = "none"
        self._digests = np.ascontiguousarray(run["digest"])
        self.wanted = have_digest(run)
        if mode == "none":
            self.wanted[:] = False
        elif mode == "sampled":
            offset = random.randrange(SAMPLE_ONE_IN)  # noqa: S311 - which pages are sampled is no secret
            self.wanted &= np.arange(len(run)) % SAMPLE_ONE_IN == offset % max(1, min(SAMPLE_ONE_IN, len(run)))
        self._any, self._all = bool(self.wanted.any()), bool(self.wanted.all())
        self._lock = threading.Lock()
        self.mismatched: set[int] = set()
        self.blocks, self.seconds = 0, 0.0

    def check(self, indices: np.ndarray) -> None:
        """Verify pages that have just arrived."""
        if not self._any:
            return
        chosen = indices if self._all else indices[self.wanted[indices]]
        if not len(chosen):
            return
        began = time.perf_counter()
        self._compare(chosen, b"".join(page_digests(self._local, self._local_pages[chosen], self._algorithm)), began)

    def compare(self, indices: np.ndarray, digests: np.ndarray) -> None:
        """Verify pages that have just arrived by their digests, (n,) V16, which came with them."""
        self._compare(indices, digests.tobytes(), time.perf_counter())

    def _compare(self, chosen: np.ndarray, actual: bytes, began: float) -> None:
        wrong: list[int] = []
        if actual != self._digests[chosen].tobytes():
            differ = np.frombuffer(actual, f"V{DIGEST_BYTES}") != self._digests[chosen]
            wrong = chosen[differ].tolist()
        with self._lock:
            self.mismatched.update(wrong)
            self.blocks += len(chosen)
            self.seconds += time.perf_counter() - began
