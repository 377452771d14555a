"""Memory of ours for blocks that are kept by copy: packed slots, and what decides how long each block stays.

No I/O, no threads and no clock of its own: callers pass the time. What is evicted must be made unreadable by the caller
before its slot is written to.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmarket.errors import InvalidInputError
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.eviction import make_policy
from kvmarket.region.leases import PageLeases
from kvmarket.region.memory import SharedMemory
from kvmarket.region.pages import PagedMemory, PageLayout

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmarket.region.cuda import CudaApi

PINNED_PART = 2
"""Pins may take one slot in this many, so that publishing never gets stuck behind them."""


@dataclass
class Placement:
    """Where the blocks of a prefix that were not in the arena go.

    Attributes:
        new: indices into the keys that were given, in order.
        slots: the slot of each; nobody can lease these until `Arena.filled`.
        evicted: (key, slot) pairs that had to go: make those unreadable before writing.
        missing: blocks for which there is no slot, because all others are pinned or being read.
    """

    new: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    evicted: list[tuple[bytes, int]] = field(default_factory=list)
    missing: int = 0


class _Until:
    """Times by key, and which are over. A key has one time: the latest that it was given."""

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}
        self._heap: list[tuple[float, bytes]] = []

    def __contains__(self, key: bytes) -> bool:
        return key in self._until

    def keys(self) -> Iterable[bytes]:
        return self._until.keys()

    def __len__(self) -> int:
        return len(self._until)

    def extend(self, key: bytes, until: float) -> None:
        if until <= self._until.get(key, -math.inf):
            return
        self._until[key] = until
        if until < math.inf:
            heapq.heappush(self._heap, (until, key))
        if len(self._heap) > 2 * len(self._until) + PINNED_PART:
            self._heap = [(until, key) for key, until in self._until.items() if until < math.inf]
            heapq.heapify(self._heap)

    def drop(self, key: bytes) -> bool:
        return self._until.pop(key, None) is not None

    def over(self, now: float) -> list[bytes]:
        """Drop and return the keys whose time has come."""
        found: list[bytes] = []
        while self._heap and self.next() <= now:
            found.append(heapq.heappop(self._heap)[1])
            del self._until[found[-1]]
        return found

    def next(self) -> float:
        """Return the earliest time, or infinity."""
        while self._heap and self._until.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf


class Arena:
    """Slots of one page each, by block key. Not thread-safe, but for `leases`: one publisher owns it.

    Args:
        capacity_bytes: memory to take; what is left over of a page is not used.
        page_bytes: size of a page.
        cuda: the CUDA and the number of a card, for memory of that card; default: shared memory of the host.
        policy: who goes first, see `kvmarket.region.eviction`.

    Attributes:
        pages: its memory, one page per slot.
        leases: which slots are being read.
    """

    def __init__(
        self, capacity_bytes: int, page_bytes: int, cuda: tuple[CudaApi, int] | None = None, policy: str = "lru"
    ) -> None:
        slots = capacity_bytes // page_bytes
        if slots < 1:
            raise InvalidInputError(
                f"an arena of {capacity_bytes} bytes holds no page of {page_bytes}; raise KVMARKET_ARENA_BYTES"
            )
        self._policy = make_policy(policy, slots)
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
        self.leases = PageLeases(slots)
        self._slots: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._parents: dict[bytes, bytes | None] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._expiry, self._pins = _Until(), _Until()

    @property
    def capacity(self) -> int:
        """Slots in all."""
        return self.pages.layout.num_pages

    @property
    def pinned(self) -> int:
        """Blocks that are pinned."""
        return len(self._pins)

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def slot(self, key: bytes) -> int | None:
        """Return where a block is, or None. Does not touch it."""
        return self._slots.get(key)

    def keys(self) -> list[bytes]:
        """Return the blocks that are there."""
        return list(self._slots)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Mark blocks as used now, together."""
        self._touch_read()
        self._policy.touch(keys)

    def place(
        self,
        keys: Sequence[bytes],
        parents: Sequence[bytes | None],
        now: float,
        *,
        until: float = math.inf,
        partly: bool = False,
    ) -> Placement:
        """Choose slots for those of `keys` that are not there, evicting others if needed; they are held from now on.

        Blocks of `keys` that are there count as used, and are not evicted for the others.

        Args:
            keys: blocks, parents before children.
            parents: the block before each, see `EvictionPolicy.insert`.
            now: the time.
            until: when the blocks expire; those that are there already never expire earlier than before.
            partly: place as many leading blocks as there is room for; else all or none.
        """
        self.end_pins(now)
        self._touch_read()
        self._policy.touch(keys)
        rows = {key: row for row, key in enumerate(keys) if key not in self._slots}
        new = list(rows.values())
        spared = {key for key in keys if key in self._slots}
        leased = self.leases.held()
        spared.update(self._keys[slot] for slot in leased if slot in self._keys)
        given_up = sum(slot not in self._keys for slot in leased)
        room = self.capacity - len(spared.union(self._pins.keys())) - given_up
        if len(new) > room and not partly:
            return Placement(missing=len(new) - room)
        slots, evicted = self._take_slots(min(len(new), self.capacity), spared)
        missing = len(new) - len(slots)
        if missing and not partly:
            self._give_back(slots)
            return Placement(evicted=evicted, missing=missing)
        new = new[: len(slots)]
        for row, slot in zip(reversed(new), reversed(slots), strict=True):
            key = keys[row]
            self._slots[key], self._keys[slot], self._parents[key] = slot, key, parents[row]
            self._policy.insert(key, parents[row])
        for key in keys:
            if key in self._slots:
                self._expiry.extend(key, until)
        return Placement(new, slots, evicted, missing)

    def filled(self, slots: Sequence[int]) -> None:
        """The bytes of slots from `place` are final: readers may lease them."""
        self.leases.unclaim(slots)

    def _touch_read(self) -> None:
        """Count the reads that the leases know of as uses."""
        for pages in self.leases.take_uses():
            self._policy.touch([self._keys[page] for page in pages if page in self._keys])

    def _take_slots(self, count: int, spared: set[bytes]) -> tuple[list[int], list[tuple[bytes, int]]]:
        """Claim up to `count` slots, evicting what is neither `spared` nor pinned nor leased meanwhile."""
        slots = self._claim_free(count)
        evicted: list[tuple[bytes, int]] = []
        if len(slots) == count:
            return slots, evicted
        for key in spared:
            self._policy.protect(key)
        while len(slots) < count and (victim := self._policy.evict()) is not None:
            slot = self._slots[victim]
            if not self.leases.claim(slot):  # a reader has come meanwhile
                self._policy.insert(victim, self._parents[victim])
                self._policy.protect(victim)
                spared.add(victim)
                continue
            self._drop(victim)
            slots.append(slot)
            evicted.append((victim, slot))
        for key in spared:
            self._policy.unprotect(key)
        return slots, evicted

    def _claim_free(self, count: int) -> list[int]:
        """Claim free slots; one whose last block is still being read stays free."""
        slots: list[int] = []
        busy: list[int] = []
        while len(slots) < count and self._free:
            slot = self._free.pop()
            (slots if self.leases.claim(slot) else busy).append(slot)
        self._free.extend(reversed(busy))
        return slots

    def _give_back(self, slots: Sequence[int]) -> None:
        self.leases.unclaim(slots)
        self._free.extend(reversed(slots))

    def _drop(self, key: bytes) -> int:
        """Forget a block that the policy has forgotten already."""
        slot = self._slots.pop(key)
        del self._keys[slot], self._parents[key]
        self._expiry.drop(key)
        self._pins.drop(key)
        return slot

    def release(self, keys: Iterable[bytes]) -> list[tuple[bytes, int]]:
        """Give blocks up, pinned or not; return them with the slots they had: make those unreadable."""
        released: list[tuple[bytes, int]] = []
        for key in keys:
            if key in self._slots:
                self._policy.remove(key)
                released.append((key, self._drop(key)))
        self._free.extend(slot for _, slot in released)
        return released

    def clear(self) -> list[tuple[bytes, int]]:
        """Give every block up."""
        return self.release(list(self._slots))

    # ---- time

    def expire(self, now: float) -> list[tuple[bytes, int]]:
        """Give up the blocks whose time is over, pinned or not; return them as `release` does."""
        return self.release(self._expiry.over(now))

    def next_expiry(self) -> float:
        """Return when the next block expires, or infinity."""
        return self._expiry.next()

    def check_pins(self, keys: Iterable[bytes], now: float) -> None:
        """Raise `InvalidInputError` when, with all of `keys` pinned, more than half of the arena would be."""
        self.end_pins(now)
        keys = set(keys)
        allowed, wanted = self.capacity // PINNED_PART, len(keys.union(self._pins.keys()))
        if wanted > allowed:
            raise InvalidInputError(
                f"pinning {len(keys)} blocks is {wanted - allowed} too many: pins may take {allowed} of the arena's "
                f"{self.capacity} slots; raise KVMARKET_ARENA_BYTES"
            )

    def pin(self, keys: Sequence[bytes], until: float, now: float) -> int:
        """Keep the leading blocks of `keys` that are there from being evicted until a time; return how many those are.

        A pin ends earlier only with its block: when that is released, cleared or expires.

        Raises:
            InvalidInputError: more than half of the arena would be pinned. Nothing was changed.
        """
        count = next((row for row, key in enumerate(keys) if key not in self._slots), len(keys))
        self.check_pins(keys[:count], now)
        for key in keys[:count]:
            if key not in self._pins:
                self._policy.protect(key)
            self._pins.extend(key, until)
        return count

    def unpin(self, keys: Iterable[bytes]) -> int:
        """End pins; return how many there were."""
        ended = [key for key in keys if self._pins.drop(key)]
        for key in ended:
            self._policy.unprotect(key)
        return len(ended)

    def end_pins(self, now: float) -> None:
        """End the pins whose time is over."""
        for key in self._pins.over(now):
            self._policy.unprotect(key)

    def close(self) -> None:
        """Give the memory back; that of a card goes with the last reference to it."""
        for memory in self.shared:
            memory.close()
