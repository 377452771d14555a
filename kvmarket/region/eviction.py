"""Which block of an arena goes first: policies without I/O, clocks or memory.

A block is found only through its parent, so all of them are leaf-first: a block with a child in the arena is never
chosen, and neither is a protected one. Such blocks are *parked*, out of the policy's order, until that changes, so that
no choice costs more than what changed since the last one.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmarket.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable

POLICIES = ("lru", "s3fifo")
SMALL_PART = 10
"""S3-FIFO gives new blocks one slot in this many until they are used again."""
USES_MAX = 3
PROMOTED_FROM = 2
"""Uses since its arrival after which a new block moves to the main queue."""


@dataclass(slots=True, eq=False)
class _Block:
    """What a policy knows of a block: `mark` is when (LRU) or how often (S3-FIFO) it was used."""

    key: bytes
    parent: bytes | None
    mark: int = 0
    protections: int = 0
    parked: bool = False
    main: bool = False
    gone: bool = False


class EvictionPolicy(ABC):
    """The order in which blocks leave an arena. Not thread-safe."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, _Block] = {}
        self._children: Counter[bytes] = Counter()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def insert(self, key: bytes, parent: bytes | None) -> None:
        """Add a block that is not there. `parent` is the block before it, which need not be there; None: it has none.

        Add the blocks of one prefix from its last to its first: the first added is the first to go.
        """
        if key in self._blocks:
            raise InvalidInputError(f"block {key.hex()} is in the arena already")
        block = self._blocks[key] = _Block(key, parent)
        if parent is not None:
            self._children[parent] += 1
        self._arrived(block)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Mark the blocks among `keys` that are there as used now, together."""
        self._next_use()
        for key in keys:
            if (block := self._blocks.get(key)) is not None:
                self._used(block)

    def remove(self, key: bytes) -> None:
        """Take a block out, whatever protects it."""
        self._left(self._take(key))

    def protect(self, key: bytes) -> None:
        """Never choose this block until `unprotect` was called as often."""
        self._blocks[key].protections += 1

    def unprotect(self, key: bytes) -> None:
        """Undo one `protect`; fine for a block that has left meanwhile."""
        block = self._blocks.get(key)
        if block is not None and block.protections:
            block.protections -= 1
            self._unpark(block)

    def evict(self) -> bytes | None:
        """Choose the block to go and take it out; None when every one has children or is protected."""
        block = self._choose()
        if block is None:
            return None
        self._take(block.key)
        self._evicted(block)
        return block.key

    def _take(self, key: bytes) -> _Block:
        block = self._blocks.pop(key)
        block.gone = True
        if block.parent is not None:
            self._children[block.parent] -= 1
            if not self._children[block.parent]:
                del self._children[block.parent]
                if (parent := self._blocks.get(block.parent)) is not None:
                    self._unpark(parent)
        return block

    def _free_to_go(self, block: _Block) -> bool:
        return not block.protections and block.key not in self._children

    def _unpark(self, block: _Block) -> None:
        if block.parked and self._free_to_go(block):
            block.parked = False
            self._back(block)

    # ---- what differs

    @abstractmethod
    def _next_use(self) -> None:
        """A call of `touch` begins."""

    @abstractmethod
    def _arrived(self, block: _Block) -> None:
        """Order a new block."""

    @abstractmethod
    def _used(self, block: _Block) -> None:
        """Note a use."""

    @abstractmethod
    def _choose(self) -> _Block | None:
        """Return the next block that is free to go, and drop it from the order; park those found before it."""

    @abstractmethod
    def _back(self, block: _Block) -> None:
        """Order a block again that was parked."""

    @abstractmethod
    def _left(self, block: _Block) -> None:
        """Drop a block that was removed from the order."""

    @abstractmethod
    def _evicted(self, block: _Block) -> None:
        """Remember a block that was chosen."""


class LeafFirstLru(EvictionPolicy):
    """The leaf that was not used for the longest time. Blocks used together go from the last to the first."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = self._entries = 0
        self._heap: list[tuple[int, int, _Block]] = []

    def _next_use(self) -> None:
        self._clock += 1

    def _used(self, block: _Block) -> None:
        block.mark = self._clock

    def _arrived(self, block: _Block) -> None:
        block.mark = self._clock
        self._back(block)

    def _evicted(self, block: _Block) -> None:
        pass

    def _back(self, block: _Block) -> None:
        self._entries += 1
        heapq.heappush(self._heap, (block.mark, self._entries, block))

    def _left(self, block: _Block) -> None:
        del block  # its entry is skipped when it comes up; too many such entries are swept out
        if len(self._heap) > 2 * len(self._blocks) + SMALL_PART:
            self._heap = [entry for entry in self._heap if not entry[2].gone]
            heapq.heapify(self._heap)

    def _choose(self) -> _Block | None:
        while self._heap:
            mark, _, block = heapq.heappop(self._heap)
            if block.gone:
                continue
            if mark != block.mark:  # used since it was ordered
                self._back(block)
            elif self._free_to_go(block):
                return block
            else:
                block.parked = True
        return None


class LeafFirstS3Fifo(EvictionPolicy):
    """Scan-resistant: what is used once passes through a small queue and leaves what is used again alone.

    New blocks enter the small queue; those used again move to the main queue, whose blocks get another round for each
    use. A block that comes back soon after it left the small queue enters the main queue at once.

    Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Added here: leaf-first.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._small_max = max(1, capacity // SMALL_PART)
        self._ghosts_max = max(1, capacity - self._small_max)
        self._small: OrderedDict[bytes, _Block] = OrderedDict()
        self._main: OrderedDict[bytes, _Block] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._num_small = 0

    def _next_use(self) -> None:
        pass

    def _used(self, block: _Block) -> None:
        block.mark = min(block.mark + 1, USES_MAX)

    def _arrived(self, block: _Block) -> None:
        if block.key in self._ghosts:
            del self._ghosts[block.key]
            block.main = True
        self._num_small += not block.main
        self._queue(block)[block.key] = block

    def _back(self, block: _Block) -> None:
        queue = self._queue(block)
        queue[block.key] = block
        queue.move_to_end(block.key, last=False)

    def _left(self, block: _Block) -> None:
        self._queue(block).pop(block.key, None)
        self._num_small -= not block.main

    def _evicted(self, block: _Block) -> None:
        if block.main:
            return
        self._num_small -= 1
        self._ghosts[block.key] = None
        if len(self._ghosts) > self._ghosts_max:
            self._ghosts.popitem(last=False)

    def _queue(self, block: _Block) -> OrderedDict[bytes, _Block]:
        return self._main if block.main else self._small

    def _choose(self) -> _Block | None:
        while self._small or self._main:
            from_small = bool(self._small) and (self._num_small >= self._small_max or not self._main)
            _, block = (self._small if from_small else self._main).popitem(last=False)
            if not self._free_to_go(block):
                block.parked = True
            elif from_small and block.mark >= PROMOTED_FROM:
                block.main, block.mark = True, 0
                self._num_small -= 1
                self._main[block.key] = block
            elif not from_small and block.mark:
                block.mark -= 1
                self._main[block.key] = block
            else:
                return block
        return None


def make_policy(name: str, capacity: int) -> EvictionPolicy:
    """Return the policy of that name (one of `POLICIES`) for an arena of `capacity` blocks."""
    if name == "lru":
        return LeafFirstLru()
    if name == "s3fifo":
        return LeafFirstS3Fifo(capacity)
    raise InvalidInputError(f"no eviction policy {name!r}; there are: {', '.join(POLICIES)}")
