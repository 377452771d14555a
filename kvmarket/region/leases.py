"""Which pages of a region somebody reads at this moment, as far as the owner's process knows.

Readers that map the memory are not seen: a page overwritten under them is torn and costs only themselves. Readers
inside the owner's process, and those that the owner serves itself, hold a lease while the bytes move, and an arena does
not use such a page for another block until the lease ends or has run out.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

LEASE_S = 10.0
"""A reader that takes longer reads without protection from then on, and may find its pages torn."""
USES_MAX = 1 << 16
"""Pages read that are remembered until the arena asks for them, the last ones."""


class PageLeases:
    """Leases of one region's pages. Thread-safe.

    Args:
        num_pages: pages of the region; at most half of them, or one, are leased at a time.
        clock: seconds, never going back.
    """

    def __init__(self, num_pages: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pages_max, self._clock = max(1, num_pages // 2), clock
        self._lock = threading.Lock()
        self._leases: OrderedDict[int, tuple[list[int], float]] = OrderedDict()
        self._readers: Counter[int] = Counter()
        self._claimed: set[int] = set()
        self._uses: deque[list[int]] = deque()
        self._pages_used = 0
        self._next = 1

    def hold(self, pages: Sequence[int]) -> int:
        """Take a lease of `pages` and return its number, or 0.

        There is none to be had when the owner is writing to one of them, or too many are leased. A reader goes on all
        the same: its checks of the generations say what it got.
        """
        wanted = list(pages)
        with self._lock:
            self._remember(wanted)
            self._end_expired()
            if not self._claimed.isdisjoint(wanted) or len(self._readers) + len(wanted) > self._pages_max:
                return 0
            number, self._next = self._next, self._next + 1
            self._leases[number] = wanted, self._clock() + LEASE_S
            self._readers.update(wanted)
            return number

    def release(self, number: int) -> None:
        """End a lease; 0 and one that has run out are fine."""
        with self._lock:
            self._end(number)

    def claim(self, page: int) -> bool:
        """Keep readers from leasing `page` until `unclaim`, for the owner to write to it; False while one is leased."""
        with self._lock:
            self._end_expired()
            if page in self._readers:
                return False
            self._claimed.add(page)
            return True

    def unclaim(self, pages: Iterable[int]) -> None:
        """Let readers lease `pages` again."""
        with self._lock:
            self._claimed.difference_update(pages)

    def held(self) -> set[int]:
        """Return the pages under a live lease."""
        with self._lock:
            self._end_expired()
            return set(self._readers)

    def take_uses(self) -> list[list[int]]:
        """Return the pages of each read since the last call, the oldest first; of very many only the last."""
        with self._lock:
            uses, self._uses, self._pages_used = list(self._uses), deque(), 0
            return uses

    def _remember(self, pages: list[int]) -> None:
        self._uses.append(pages)
        self._pages_used += len(pages)
        while self._pages_used > USES_MAX:
            self._pages_used -= len(self._uses.popleft())

    def _end(self, number: int) -> None:
        pages, _ = self._leases.pop(number, ((), 0.0))
        for page in pages:
            self._readers[page] -= 1
            if not self._readers[page]:
                del self._readers[page]

    def _end_expired(self) -> None:
        now = self._clock()
        while self._leases:
            number, (_, until) = next(iter(self._leases.items()))
            if until > now:
                return
            self._end(number)
