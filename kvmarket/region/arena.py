"""Memory of ours for blocks that are published by copy: packed slots, the least recently used leaf goes first."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvmarket.errors import InvalidInputError
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.memory import SharedMemory
from kvmarket.region.pages import PagedMemory, PageLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.region.cuda import CudaApi


class Arena:
    """Slots of one page each, by block key. Not thread-safe: one publisher owns it.

    Eviction is leaf-first because `touch` is: a prefix is touched from its last block to its first, so no block is ever
    more recent than its parent.
    """

    def __init__(self, capacity_bytes: int, page_bytes: int, cuda: tuple[CudaApi, int] | None = None) -> None:
        """Take the memory: shared memory of the host, or with `cuda` (and the number of a card) memory of that card."""
        slots = capacity_bytes // page_bytes
        if slots < 1:
            raise InvalidInputError(
                f"an arena of {capacity_bytes} bytes holds no page of {page_bytes}; raise KVMARKET_ARENA_BYTES"
            )
        layout, nbytes = PageLayout.packed(slots, page_bytes), slots * page_bytes
        self.shared: tuple[SharedMemory, ...] = ()
        self.pages: PagedMemory
        if cuda is None:
            self.shared = (SharedMemory(nbytes, "arena"),)
            self.shared[0].populate()
            self.pages = PagedMemory(layout, (self.shared[0].array,))
        else:
            api, device = cuda
            self.pages = CudaPagedMemory.of(api, layout, [api.allocate(nbytes, device)])
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(slots - 1, -1, -1))

    @property
    def capacity(self) -> int:
        """Slots in all."""
        return self.pages.layout.num_pages

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, key: bytes) -> int | None:
        """Return where a block is, or None. Does not touch it."""
        return self._slots.get(key)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Mark a prefix, given from its first block on, as used now."""
        for key in reversed(keys):
            if key in self._slots:
                self._slots.move_to_end(key)

    def reserve(self, keys: Sequence[bytes]) -> tuple[list[int], list[tuple[bytes, int]]]:
        """Choose slots for new blocks, evicting others if needed; the new blocks are held from now on.

        Returns:
            The slot of each key, and the (key, slot) pairs evicted: make those unreadable before writing.

        Raises:
            InvalidInputError: more keys than the arena has slots.
        """
        if len(keys) > self.capacity:
            raise InvalidInputError(
                f"{len(keys)} blocks do not fit an arena of {self.capacity}; raise KVMARKET_ARENA_BYTES"
            )
        evicted: list[tuple[bytes, int]] = []
        while len(self._free) < len(keys):
            key, slot = self._slots.popitem(last=False)
            evicted.append((key, slot))
            self._free.append(slot)
        slots = [self._free.pop() for _ in keys]
        for key, slot in zip(reversed(keys), reversed(slots), strict=True):
            self._slots[key] = slot
        return slots, evicted

    def release(self, keys: Sequence[bytes]) -> list[int]:
        """Give blocks up; return the slots they had."""
        slots = [self._slots.pop(key) for key in keys if key in self._slots]
        self._free.extend(slots)
        return slots

    def clear(self) -> list[int]:
        """Give every block up; return the slots they had."""
        return self.release(list(self._slots))

    def close(self) -> None:
        """Give the memory back; that of a card goes with the last reference to it."""
        for memory in self.shared:
            memory.close()
