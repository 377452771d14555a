"""Publishing by copy: the caller's pages go into an arena, which is lent like any other region."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.config import SECONDS_MAX
from kvmarket.errors import ArenaFullError, InvalidInputError, KVMarketError
from kvmarket.region.arena import Arena
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import copy_pages
from kvmarket.registry.records import block_index

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from kvmarket.config import MarketConfig
    from kvmarket.core import MarketCore
    from kvmarket.disk import DiskTier
    from kvmarket.disk_log import StoredBlock
    from kvmarket.region.pages import PagedMemory


@dataclass(frozen=True, slots=True)
class Stay:
    """How long published copies stay: withdrawn after `ttl_s` (0: never), not evicted for `pin_s` (0: no pin)."""

    ttl_s: float = 0.0
    pin_s: float = 0.0

    @classmethod
    def of(cls, config: MarketConfig, ttl_s: float | None, pin_s: float) -> Stay:
        """Take what the caller asked for, checked, or what `config` says."""
        ttl_s = config.arena_ttl_s if ttl_s is None else ttl_s
        return cls(checked_seconds("ttl_s", ttl_s), checked_seconds("pin_s", pin_s))


def checked_seconds(name: str, value: float) -> float:
    """Return a duration, or raise `InvalidInputError` that names it."""
    try:
        valid = 0 <= value <= SECONDS_MAX
    except TypeError:
        valid = False
    if not valid:
        raise InvalidInputError(f"{name} must be within [0, {SECONDS_MAX:g}] seconds, not {value!r}")
    return float(value)


class ArenaPublisher:
    """One arena of one marketplace. Thread-safe.

    Args:
        core: the marketplace.
        like: pages in memory of the kind, and of the card, that is to be published; default: host memory.
        nbytes: size of the arena; default `MarketConfig.arena_bytes`.
        disk: where copies are written behind; its newest blocks take half of the arena at once. Closed by the caller,
            before the marketplace is.

    Raises:
        InvalidInputError, RegistrationError: the card's memory cannot be lent.
        RegistryError: this process cannot be entered as an owner.
    """

    def __init__(
        self,
        core: MarketCore,
        like: PagedMemory | None = None,
        nbytes: int | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        cuda = (like.api, like.device) if isinstance(like, CudaPagedMemory) else None
        size = core.config.arena_bytes if nbytes is None else nbytes
        self._arena = Arena(size, core.namespace.spec.page_bytes, cuda, core.config.arena_eviction)
        self._default, self._metrics = Stay(core.config.arena_ttl_s), core.metrics
        self._changed = threading.Condition(threading.RLock())
        self._stopped = False
        self._janitor: threading.Thread | None = None
        try:
            region = core.lend(self._arena.pages, self._arena.shared, tier="host", leases=self._arena.leases)
            self._publisher = core.publisher(region)
        except KVMarketError:
            self._arena.close()
            raise
        self._disk = disk if cuda is None else None
        if self._disk is not None:
            self._disk.lend(region)
            self._disk.promote(self._promote, self._arena.capacity // 2)

    def put(
        self, keys: Sequence[bytes], pages: PagedMemory, stay: Stay | None = None
    ) -> tuple[int, Future[int] | None]:
        """Copy in the blocks of a prefix that are not there yet and offer them. Does no I/O.

        Args:
            keys: registry keys of the prefix, from its first block on.
            pages: one page per key, in memory of the arena's kind; not read any more when this returns.
            stay: how long the blocks are to stay; default: as `MarketConfig` says.

        Returns:
            How many blocks were new, and a future that ends when everything offered so far is announced. None were, and
            there is no future, when another process bumped the epoch since the last time: the caller's KV may be older.

        Raises:
            InvalidInputError: the arena is too small for the prefix, or more than half of it would be pinned.
            ArenaFullError: too much of it is pinned or being read.
        """
        stay = stay or self._default
        arena = self._arena
        if len(keys) > arena.capacity:
            raise InvalidInputError(
                f"{len(keys)} blocks do not fit an arena of {arena.capacity}; raise KVMARKET_ARENA_BYTES"
            )
        with self._changed:
            if self._forgotten(keys):
                return 0, None
            now = time.monotonic()
            if stay.pin_s:
                arena.check_pins(keys, now)
            new, slots = self._copy_in(
                keys, [None, *keys[:-1]], pages, range(len(keys)), now=now, stay=stay, partly=False
            )
            if stay.pin_s:
                arena.pin(keys, now + stay.pin_s, now)
            self._count()
            announced = self._publisher.offer(new, slots, wait=True)
            self._write_behind(keys, [None, *keys[:-1]], new, slots, stay.ttl_s)
            return len(new), announced

    def keep(
        self,
        keys: Sequence[bytes],
        parents: Sequence[bytes | None],
        pages: PagedMemory,
        numbers: Sequence[int],
        *,
        epoch: int,
        digests: Sequence[bytes] | None = None,
    ) -> int:
        """Copy in single blocks, of any prefixes, as far as there is room; return how many were new. Does no I/O.

        A copy that is not what its digest says is refused by every reader that verifies.

        Args:
            keys: registry keys, parents before children.
            parents: the key of the block before each; None for the first of a prefix.
            pages: memory of the arena's kind.
            numbers: the page of each block there.
            epoch: of the namespace, when the blocks were offered; when it is over nothing is kept.
            digests: of the blocks, where they are known.
        """
        with self._changed:
            if self._forgotten(keys) or self._publisher.epoch != epoch:
                return 0
            now = time.monotonic()
            new, slots = self._copy_in(keys, parents, pages, numbers, now=now, stay=self._default, partly=True)
            known = None if digests is None else dict(zip(keys, digests, strict=True))
            self._publisher.offer(new, slots, digests=None if known is None else [known[key] for key in new])
            self._write_behind(keys, parents, new, slots, self._default.ttl_s)
            self._count()
            return len(new)

    def _write_behind(
        self,
        keys: Sequence[bytes],
        parents: Sequence[bytes | None],
        new: Sequence[bytes],
        slots: Sequence[int],
        ttl_s: float,
    ) -> None:
        if self._disk is not None and new:
            parent_of = dict(zip(keys, parents, strict=True))
            self._disk.write(new, [parent_of[key] for key in new], slots, self._publisher.epoch, ttl_s)

    def _promote(self, blocks: Sequence[StoredBlock], pages: PagedMemory, epoch: int) -> int:
        """Take blocks back from disk, for peers to fetch."""
        rows = sorted(range(len(blocks)), key=lambda row: block_index(blocks[row].key))
        taken = [blocks[row] for row in rows]
        return self.keep(
            [block.key for block in taken],
            [block.parent for block in taken],
            pages,
            rows,
            epoch=epoch,
            digests=[block.digest for block in taken],
        )

    def _forgotten(self, keys: Sequence[bytes]) -> bool:
        """Free what an epoch has made useless; True when another process bumped it since the last time."""
        if self._publisher.notice_epoch():  # of what is published now, too, nobody knows whose weights computed it
            self._evicted("epoch", self._arena.clear())
            return True
        self._evicted("epoch", self._arena.release([key for key in keys if self._publisher.page_of(key) is None]))
        return False

    def _copy_in(
        self,
        keys: Sequence[bytes],
        parents: Sequence[bytes | None],
        pages: PagedMemory,
        numbers: Sequence[int],
        *,
        now: float,
        stay: Stay,
        partly: bool,
    ) -> tuple[list[bytes], list[int]]:
        """Copy in those of `keys` that are not there, for the caller to offer; return them and their slots."""
        arena = self._arena
        until = now + stay.ttl_s if stay.ttl_s else math.inf
        placed = arena.place(keys, parents, now, until=until, partly=partly)
        self._evicted("capacity", placed.evicted)
        if placed.missing and not partly:
            raise ArenaFullError(
                f"{len(keys)} blocks do not fit an arena of {arena.capacity}, of which {arena.pinned} are pinned and "
                f"{len(arena.leases.held())} being read; wait for that to end, or raise KVMARKET_ARENA_BYTES"
            )
        if placed.missing:
            self._metrics.add(arena_blocks_turned_away=placed.missing)
        source = np.array([numbers[row] for row in placed.new], np.int64)
        _copy(pages, source, arena.pages, np.array(placed.slots, np.int64))
        arena.filled(placed.slots)
        if until < math.inf:
            self._expect_expiry()
        return [keys[row] for row in placed.new], placed.slots

    def _evicted(self, reason: str, gone: Sequence[tuple[bytes, int]]) -> None:
        """Make blocks that the arena gave up unreadable, and count them."""
        if gone:
            self._publisher.retract([slot for _, slot in gone])
            self._metrics.add_reason("arena_evicted", reason, len(gone))

    def _count(self) -> None:
        nbytes = len(self._arena) * self._arena.pages.layout.page_bytes
        self._metrics.level(arena_resident_bytes=nbytes, arena_blocks_pinned=self._arena.pinned)

    def offered(self, keys: Sequence[bytes]) -> int:
        """Return how many of `keys` peers may read, as far as this process knows."""
        return sum(self._publisher.page_of(key) is not None for key in keys)

    def pin(self, keys: Sequence[bytes], seconds: float) -> int:
        """Keep the leading blocks that are there from being evicted for a while; return how many. See `Arena.pin`."""
        with self._changed:
            now = time.monotonic()
            count = self._arena.pin(keys, now + seconds, now)
            self._count()
            return count

    def unpin(self, keys: Sequence[bytes]) -> int:
        """End pins; return how many there were."""
        with self._changed:
            self._arena.end_pins(time.monotonic())
            count = self._arena.unpin(keys)
            self._count()
            return count

    def withdraw(self, keys: Sequence[bytes]) -> int:
        """Make blocks unreadable and free their slots; return how many there were."""
        with self._changed:
            gone = self._arena.release(keys)
            self._evicted("withdrawn", gone)
            if self._disk is not None:
                self._disk.withdraw(keys)
            self._count()
            return len(gone)

    def clear(self) -> None:
        """Make every block unreadable and free its slot."""
        with self._changed:
            self._evicted("epoch", self._arena.clear())
            if self._disk is not None:
                self._disk.notice(self._publisher.epoch)
            self._count()

    def forget(self) -> None:
        """Make every block unreadable because the namespace has, or may have, a new epoch."""
        with self._changed:
            self._publisher.forget_all()
            self.clear()

    # ---- expiry

    def _expect_expiry(self) -> None:
        if self._janitor is None and not self._stopped:
            self._janitor = threading.Thread(target=self._expire, name="kvmarket-arena", daemon=True)
            self._janitor.start()
        self._changed.notify_all()

    def _expire(self) -> None:
        """Withdraw blocks when their time is over."""
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                gone = self._arena.expire(now)
                if gone:
                    self._evicted("ttl", gone)
                    self._count()
                due = self._arena.next_expiry()
                self._changed.wait(None if due == math.inf else min(due - now, threading.TIMEOUT_MAX))

    def stop(self) -> None:
        """End the thread that withdraws what has expired. Call it before the marketplace closes. Idempotent."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            janitor, self._janitor = self._janitor, None
        if janitor is not None:
            janitor.join()

    def close(self) -> None:
        """Give the memory back."""
        self.stop()
        self._arena.close()


def close_market(core: MarketCore, arena: ArenaPublisher | None, disk: DiskTier | None = None) -> None:
    """Close a market with what it has of an arena and a disk tier, in the only order that is right.

    What waits for the disk is read from the arena; what expires is withdrawn through the market; and the arena's memory
    goes when the market has made it unreadable.
    """
    if disk is not None:
        disk.close()
    if arena is not None:
        arena.stop()
    core.close()
    if arena is not None:
        arena.close()


def _copy(source: PagedMemory, source_pages: np.ndarray, target: PagedMemory, target_pages: np.ndarray) -> None:
    """Copy pages within one kind of memory; on a card, after the event that `source` names. Waits for the end."""
    if not isinstance(target, CudaPagedMemory):
        copy_pages(source, source_pages, target, target_pages)
    elif len(source_pages):
        if not isinstance(source, CudaPagedMemory):
            raise InvalidInputError("pages of the host do not fit an arena on a card")
        target.api.copy(source, source_pages, replace(target, after=source.after), target_pages).wait()
