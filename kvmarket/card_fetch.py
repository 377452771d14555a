"""Fetching to a card from asyncio: on the event loop what is done within a moment, and on a thread everything else.

The first groups of blocks are always begun on the event loop, so that the card copies while a thread wakes up.
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

BEGUN_GROUPS, BEGUN_BYTES_MAX = 2, 512 << 20
"""Groups that are hashed, looked up and launched on the event loop, each in some 0.1 ms. A small fetch is done then,
before a thread would be there, which finds nothing of it in the caches of its core; of a larger one the card has copies
to make until a thread goes on. Groups of more bytes are left to a thread: they may have to wait for the card."""
INLINE_WAIT_S = 100e-6
"""How long the event loop waits for copies, when all is looked up, before it leaves the rest to a thread: 8 MiB take
10 us of a card that has nothing else to do first."""


class CardFetches:
    """Fetches to cards of one marketplace.

    Args:
        core: of the marketplace.
        calls: its threads.
    """

    def __init__(self, core: MarketCore, calls: Calls) -> None:
        self._core, self._calls = core, calls
        page_bytes = core.namespace.spec.page_bytes
        self._begun_here = core.registry.local and page_bytes * GROUP_BLOCKS * BEGUN_GROUPS <= BEGUN_BYTES_MAX

    async def fetch(self, groups: Iterable[list[bytes]], local: PagedMemory, deadline: Deadline) -> Fetched:
        """Look up and read; result as of `Fetcher.fetch`.

        Args:
            groups: the keys; the first `BEGUN_GROUPS` groups are no larger than `GROUP_BLOCKS` each.
            local: where the blocks go, page 0 first.
            deadline: see there.

        Raises:
            DeadlineExceededError: no thread was free in time.
        """
        fetcher, pages = self._core.fetcher, np.arange(local.layout.num_pages)
        if self._calls.full or not self._begun_here:
            return await self._calls.read(partial(fetcher.fetch, groups, local, pages, deadline), deadline)
        begun = fetcher.begin(groups, local, pages, deadline, BEGUN_GROUPS)
        try:
            if not begun.unfinished and begun.settles_within(INLINE_WAIT_S):
                begun.settle()
                if begun.whole:
                    return fetcher.complete(begun)
            return await self._calls.go_on(partial(fetcher.complete, begun), deadline)
        finally:
            begun.abandon()
