"""Fetching to a card from asyncio: on the event loop what is done within a moment, and on a thread everything else.

The first group of blocks is always begun on the event loop, so that the card copies while a thread wakes up.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.prefix_keys import GROUP_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmarket.calls import Calls
    from kvmarket.core import MarketCore
    from kvmarket.deadline import Deadline
    from kvmarket.outcome import Fetched
    from kvmarket.region.pages import PagedMemory

INLINE_BYTES_MAX, INLINE_BLOCKS_MAX = 8 << 20, GROUP_BLOCKS
"""Fetches of no more may be done on the event loop: one group is hashed, looked up and launched there in some 0.1 ms.
A hop to a thread and back takes longer, and finds nothing of it in the caches of the other core."""
BEGUN_BYTES_MAX = 256 << 20
"""A first group of more may have to wait for the card in the midst of its launches, and so is left to a thread."""
INLINE_WAIT_S = 100e-6
"""How long the event loop waits for such a copy before it leaves the rest to a thread: 8 MiB take 10 us of a card that
has nothing else to do first."""


class CardFetches:
    """Fetches to cards of one marketplace.

    Args:
        core: of the marketplace.
        calls: its threads.
    """

    def __init__(self, core: MarketCore, calls: Calls) -> None:
        self._core, self._calls = core, calls
        page_bytes = core.namespace.spec.page_bytes
        self._inline_blocks = min(INLINE_BYTES_MAX // page_bytes, INLINE_BLOCKS_MAX)
        self._begun_here = core.registry.local and page_bytes * GROUP_BLOCKS <= BEGUN_BYTES_MAX

    async def fetch(
        self, groups: Iterable[list[bytes]], blocks: int, local: PagedMemory, deadline: Deadline
    ) -> Fetched:
        """Look up and read; result as of `Fetcher.fetch`.

        Args:
            groups: the keys; the first group is no larger than `GROUP_BLOCKS`.
            blocks: how many keys there are.
            local: where the blocks go, page 0 first.
            deadline: see there.

        Raises:
            DeadlineExceededError: no thread was free in time.
        """
        fetcher, pages = self._core.fetcher, np.arange(local.layout.num_pages)
        if self._calls.full or not self._begun_here:
            return await self._calls.read(partial(fetcher.fetch, groups, local, pages, deadline), deadline)
        small = blocks <= self._inline_blocks
        begun = fetcher.begin(groups, local, pages, deadline, 2 if small else 1)  # a small one ends with the second
        try:
            if not begun.unfinished and begun.settles_within(INLINE_WAIT_S):
                begun.settle()
                if begun.whole:
                    return fetcher.complete(begun)
            return await self._calls.go_on(partial(fetcher.complete, begun), deadline)
        finally:
            begun.abandon()
