"""What a publisher gives to its announcing thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    import numpy as np


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
