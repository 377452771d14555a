"""Publishing by copy: the caller's pages go into an arena, which is lent like any other region."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmarket.errors import DeadlineExceededError
from kvmarket.region.arena import Arena
from kvmarket.region.pages import PagedMemory, copy_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.core import MarketCore
    from kvmarket.deadline import Deadline


class ArenaPublisher:
    """One arena of one marketplace. Not thread-safe: its marketplace's publishing thread owns it."""

    def __init__(self, core: MarketCore) -> None:
        self._arena = Arena(core.config.arena_bytes, core.namespace.spec.page_bytes)
        region = core.lend(self._arena.pages, [self._arena.memory])
        self._publisher = core.publisher(region)

    def publish(self, keys: Sequence[bytes], pages: np.ndarray, deadline: Deadline) -> int:
        """Copy in the blocks of a prefix that are not there yet and announce them; return how many those were.

        Raises:
            DeadlineExceededError, RegistryError: they are not announced yet, or not at all.
        """
        for key in keys:
            slot = self._arena.slot(key)
            if slot is not None and self._publisher.page_of(key) is None:  # forgotten by an epoch
                self._arena.release([key])
        new = [i for i, key in enumerate(keys) if self._arena.slot(key) is None]
        self._arena.touch(keys)
        slots, evicted = self._arena.reserve([keys[i] for i in new])
        self._publisher.retract([slot for _, slot in evicted])
        copy_pages(PagedMemory.packed(pages), np.array(new, np.int64), self._arena.pages, np.array(slots, np.int64))
        self._arena.touch(keys)
        announced = self._publisher.offer([keys[i] for i in new], slots, wait=True)
        assert announced is not None
        try:
            announced.result(deadline.remaining_s)
        except TimeoutError as error:
            raise DeadlineExceededError("the registry did not take the announcement before the deadline") from error
        return len(new)

    def withdraw(self, keys: Sequence[bytes]) -> int:
        """Make blocks unreadable and free their slots; return how many there were."""
        held = [key for key in keys if self._arena.slot(key) is not None]
        self._publisher.retract([slot for key in held if (slot := self._arena.slot(key)) is not None])
        self._arena.release(held)
        return len(held)

    def clear(self) -> None:
        """Free every slot; the publisher has forgotten them already."""
        self._arena.clear()

    def close(self) -> None:
        """Give the memory back."""
        self._arena.close()
