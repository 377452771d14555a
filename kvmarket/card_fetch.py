"""Fetching to a card from asyncio: on the event loop where no step takes long, and on a thread everything else.

A thread that is woken finds nothing of the fetch in the caches of its core, and competes for the GIL with the event
loop that waits for it. So the loop goes on itself, group by group, and lets others have their turn in between; the card
copies meanwhile.
"""

from __future__ import annotations

import asyncio
import time
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
    from kvmarket.overlapped_fetch import OverlappedFetch
    from kvmarket.region.pages import PagedMemory

BEGUN_GROUPS, BEGUN_BYTES_MAX = 2, 512 << 20
"""Groups that are hashed, looked up and launched at once, each in some 0.1 ms: a small fetch is done then. Groups of
more bytes are left to a thread: they may have to wait for the card."""
INLINE_WAIT_S = 100e-6
"""How long the event loop waits for copies, when all is looked up, without letting others have their turn: 8 MiB take
10 us of a card that has nothing else to do first."""
TURN_S = 100e-6
"""After so long others have their turn; a group of new blocks may take twice that."""
ON_LOOP_BYTES_MAX = 2 << 30
"""What is begun on the event loop; so much never waits for the card before it is launched, see `CudaStream`."""
ON_LOOP_WAIT_S = 0.003
"""How long the event loop looks for the end of copies, once a turn, before it leaves that to a thread: 2 GiB take 1.5
ms within a card."""


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
        self._blocks_on_loop = ON_LOOP_BYTES_MAX // page_bytes

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
            return await self._go_on(begun, deadline)
        finally:
            begun.abandon()

    async def _go_on(self, begun: OverlappedFetch, deadline: Deadline) -> Fetched:
        """End what was begun: here, as long as it is soon done, and then on a thread."""
        fetcher = self._core.fetcher
        async with self._calls.begun():
            try:
                await self._look_up(begun)
                if await self._copied(begun):
                    begun.settle()
                    if begun.whole:
                        return fetcher.complete(begun)
            except asyncio.CancelledError:
                deadline.cancel()
                await self._calls.go_on(begun.abandon, deadline)  # it waits for the card
                raise
            begun.flush()
            return await self._calls.go_on(partial(fetcher.complete, begun), deadline)

    async def _look_up(self, begun: OverlappedFetch) -> None:
        """Look up and launch group after group, as long as none has to wait."""
        while self._takes_more(begun):
            await asyncio.sleep(0)
            end = time.perf_counter() + TURN_S
            while self._takes_more(begun) and time.perf_counter() < end:
                self._core.fetcher.advance(begun, 1)

    def _takes_more(self, begun: OverlappedFetch) -> bool:
        """Tell whether the next group would be launched, or be found to be none, without waiting for the card."""
        apart = self._core.fetcher.verify != "full"  # such groups do not share a launch
        return begun.unfinished and begun.streams and not apart and begun.asked < self._blocks_on_loop

    async def _copied(self, begun: OverlappedFetch) -> bool:
        """Wait for the card, but not for long; tell whether everything has been copied."""
        end = time.perf_counter() + ON_LOOP_WAIT_S
        while not begun.unfinished and begun.streams and time.perf_counter() < end:
            if begun.copied:
                return True
            await asyncio.sleep(0)
        return False
