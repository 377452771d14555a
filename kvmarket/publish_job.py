"""What a publisher gives to its announcing thread."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.digest import page_digests

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from kvmarket.region.pages import PagedMemory


@dataclass
class Job:
    """Blocks to announce, or (without `generations`) to withdraw.

    With `after` the pages are not readable yet: `generations` are those under which they are reserved until then.
    `after` is not asked before `delay_s` have passed.
    """

    keys: list[bytes]
    pages: np.ndarray
    generations: np.ndarray | None
    done: Future[int] | None = None
    after: Callable[[], bool] | None = None
    delay_s: float = 0.0
    digests: list[bytes] | None = None

    def keep(self, rows: list[int]) -> None:
        """Drop all blocks but those at `rows`."""
        self.keys, self.pages = [self.keys[row] for row in rows], self.pages[rows]
        if self.digests is not None:
            self.digests = [self.digests[row] for row in rows]


def digests_of(jobs: Sequence[Job], memory: PagedMemory) -> list[bytes]:
    """Return the digests of all pages of `jobs`, computed unless they came with them."""
    unknown = [job for job in jobs if job.digests is None]
    pages = np.concatenate([job.pages for job in unknown]) if unknown else np.empty(0, np.int64)
    computed = iter(page_digests(memory, pages) if len(pages) else ())
    return [
        digest
        for job in jobs
        for digest in (job.digests if job.digests is not None else islice(computed, len(job.pages)))
    ]
