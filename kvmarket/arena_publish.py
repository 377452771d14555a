"""Publishing by copy: the caller's pages go into an arena, which is lent like any other region."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.errors import InvalidInputError, KVMarketError
from kvmarket.region.arena import Arena
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import copy_pages

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from kvmarket.core import MarketCore
    from kvmarket.region.pages import PagedMemory


class ArenaPublisher:
    """One arena of one marketplace. Not thread-safe: its marketplace's publishing thread owns it.

    Args:
        core: the marketplace.
        like: pages in memory of the kind, and of the card, that is to be published; default: host memory.

    Raises:
        InvalidInputError, RegistrationError: the card's memory cannot be lent.
        RegistryError: this process cannot be entered as an owner.
    """

    def __init__(self, core: MarketCore, like: PagedMemory | None = None) -> None:
        cuda = (like.api, like.device) if isinstance(like, CudaPagedMemory) else None
        self._arena = Arena(core.config.arena_bytes, core.namespace.spec.page_bytes, cuda)
        try:
            region = core.lend(self._arena.pages, self._arena.shared)
            self._publisher = core.publisher(region)
        except KVMarketError:
            self._arena.close()
            raise

    def put(self, keys: Sequence[bytes], pages: PagedMemory) -> tuple[int, Future[int] | None]:
        """Copy in the blocks of a prefix that are not there yet and offer them. Does no I/O.

        Args:
            keys: registry keys of the prefix, from its first block on.
            pages: one page per key, in memory of the arena's kind; not read any more when this returns.

        Returns:
            How many blocks were new, and a future that ends when everything offered so far is announced. None were, and
            there is no future, when another process bumped the epoch since the last time: the caller's KV may be older.

        Raises:
            InvalidInputError: the arena is too small for the prefix.
        """
        if len(keys) > self._arena.capacity:
            raise InvalidInputError(
                f"{len(keys)} blocks do not fit an arena of {self._arena.capacity}; raise KVMARKET_ARENA_BYTES"
            )
        if self._publisher.notice_epoch():  # of what is published now, too, nobody knows whose weights computed it
            return 0, None
        self._arena.release([key for key in keys if self._publisher.page_of(key) is None])  # forgotten by an epoch
        new = [i for i, key in enumerate(keys) if self._arena.slot(key) is None]
        self._arena.touch(keys)
        slots, evicted = self._arena.reserve([keys[i] for i in new])
        self._publisher.retract([slot for _, slot in evicted])
        _copy(pages, np.array(new, np.int64), self._arena.pages, np.array(slots, np.int64))
        self._arena.touch(keys)
        return len(new), self._publisher.offer([keys[i] for i in new], slots, wait=True)

    def offered(self, keys: Sequence[bytes]) -> int:
        """Return how many of `keys` peers may read, as far as this process knows."""
        return sum(self._publisher.page_of(key) is not None for key in keys)

    def withdraw(self, keys: Sequence[bytes]) -> int:
        """Make blocks unreadable and free their slots; return how many there were."""
        held = [(key, slot) for key in keys if (slot := self._arena.slot(key)) is not None]
        self._publisher.retract([slot for _, slot in held])
        self._arena.release([key for key, _ in held])
        return len(held)

    def clear(self) -> None:
        """Free every slot; the publisher has forgotten them already."""
        self._arena.clear()

    def close(self) -> None:
        """Give the memory back."""
        self._arena.close()


def _copy(source: PagedMemory, source_pages: np.ndarray, target: PagedMemory, target_pages: np.ndarray) -> None:
    """Copy pages within one kind of memory; on a card, after the event that `source` names. Waits for the end."""
    if not isinstance(target, CudaPagedMemory):
        copy_pages(source, source_pages, target, target_pages)
    elif len(source_pages):
        if not isinstance(source, CudaPagedMemory):
            raise InvalidInputError("pages of the host do not fit an arena on a card")
        target.api.copy(source, source_pages, replace(target, after=source.after), target_pages).wait()
