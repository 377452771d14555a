"""The facade: publish, fetch, match, withdraw, in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.arena_publish import ArenaPublisher, Stay, checked_seconds, close_market
from kvmarket.calls import Calls, wait_for
from kvmarket.card_fetch import CardFetches
from kvmarket.config import MarketConfig
from kvmarket.core import MarketCore
from kvmarket.cuda import is_cuda, packed_cuda_pages
from kvmarket.deadline import Deadline
from kvmarket.disk import DiskTier
from kvmarket.errors import DeadlineExceededError, InvalidInputError, MarketClosedError
from kvmarket.hashing import TokenIds, token_array
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.outcome import Fetched, FetchResult, Outcome
from kvmarket.prefix_keys import PrefixKeys, in_groups
from kvmarket.region.memory import SharedMemory
from kvmarket.region.pages import PagedMemory
from kvmarket.registry import LookupResult, Registry
from kvmarket.registry.records import RECORD
from kvmarket.report import FetchReport, MatchReport, MissReason, PublishReport
from kvmarket.staging import StagingPool
from kvmarket.tensors import as_pages

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from kvmarket.spec import KVCacheSpec

INLINE_BYTES_MAX = 128 << 10
"""Fetches of at most this many bytes are copied on the event loop: a thread hop would take longer."""


class Marketplace:
    """Blocks of one namespace, published by this process and fetched from others. Use as ``async with``.

    Args:
        model: which weights, by name or as `ModelIdentity`.
        spec: the KV cache page.
        config: settings; default: from ``KVMARKET_*``.
        registry: share one registry object between marketplaces of this process; default: the one `config` names.

    Raises:
        ConfigError, InvalidInputError, RegistryError: at construction, when something cannot be used.
    """

    def __init__(
        self,
        model: ModelIdentity | str,
        spec: KVCacheSpec,
        *,
        config: MarketConfig | None = None,
        registry: Registry | None = None,
    ) -> None:
        config = config or MarketConfig.from_env()
        identity = ModelIdentity(model) if isinstance(model, str) else model
        namespace = Namespace(identity, spec, config.hash, **config.tenancy())
        self._core = MarketCore(namespace, config, registry)
        self._config, self._spec, self._root = config, spec, namespace.digest
        self._prefix_keys = PrefixKeys(self._root, spec.block_size, config.hash, namespace.sealer)
        self._calls = Calls(config.fetch_concurrency, self._require_open)
        self._to_cards = CardFetches(self._core, self._calls)
        self._staging = StagingPool()
        self._arena: ArenaPublisher | None = None
        self._disk = DiskTier(self._core) if config.disk_bytes else None
        if self._disk is not None:
            self._calls.writer.submit(self._open_arena)  # for what a run before this one has left
        self._closing: asyncio.Task[None] | None = None

    # ---- life

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Withdraw everything this process published and release all handles. Waits for running calls. Idempotent.

        Cancellation:
            A cancelled call leaves at once; closing goes on by itself, and a second call waits for it.
        """
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._shut_down())
        await asyncio.shield(self._closing)

    async def _shut_down(self) -> None:
        await self._calls.end()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._calls.shut_down()
        close_market(self._core, self._arena, self._disk)

    @property
    def namespace(self) -> Namespace:
        """What must be equal for another process to share blocks with this one."""
        return self._core.namespace

    @property
    def core(self) -> MarketCore:
        """The synchronous core, for `lend` and for engines with threads of their own."""
        return self._core

    def metrics(self) -> dict[str, float]:
        """Return all counters."""
        return self._core.metrics.snapshot()

    def allocate(self, num_blocks: int) -> tuple[SharedMemory, np.ndarray]:
        """Make shared memory for `num_blocks` pages that can be lent; returns it and its (num_blocks, page_bytes) view.

        Args:
            num_blocks: at least 1.
        """
        memory = SharedMemory(num_blocks * self._spec.page_bytes, "pages")
        memory.populate()
        return memory, memory.array.reshape(num_blocks, self._spec.page_bytes)

    # ---- publish

    async def publish(
        self,
        tokens: TokenIds,
        kv: Any,
        *,
        extra_keys: Sequence[bytes] | None = None,
        deadline_s: float | None = None,
        ttl_s: float | None = None,
        pin_s: float = 0.0,
    ) -> PublishReport:
        """Offer the KV of a prefix to every process of the namespace; copies it once into this process's arena.

        Args:
            tokens: (n,) token ids of the prefix. Only full blocks are published.
            kv: the pages of its full blocks in order, see `kvmarket.tensors.as_pages`.
            extra_keys: per full block, what else makes its KV differ (image digests, ...).
            deadline_s: seconds; default `MarketConfig.publish_deadline_s`.
            ttl_s: seconds after which the blocks are withdrawn; default `MarketConfig.arena_ttl_s`, and 0 for never.
                Blocks that are published already last as long as the longest that anybody asked for.
            pin_s: seconds for which the blocks are not evicted, see `pin`.

        Returns:
            When it returns, peers can fetch the blocks.

        Raises:
            InvalidInputError: the tokens or the KV do not fit, or too much would be pinned; nothing was published.
            ArenaFullError: too much is pinned or being read; nothing was published.
            DeadlineExceededError: the registry did not answer in time; the blocks may appear later.
            RegistryError: the registry refused.
        Cancellation:
            `kv` may be reused when the call is over, however it ended; a cancelled call waits until nothing reads `kv`.
        """
        began = time.perf_counter()
        pages = as_pages(kv, self._spec)
        keys = self._keys(tokens, extra_keys)
        if len(pages) != len(keys):
            raise InvalidInputError(f"kv has {len(pages)} blocks for {len(keys)} full blocks of tokens")
        deadline = Deadline(self._config.publish_deadline_s if deadline_s is None else deadline_s)
        stay = Stay.of(self._config, ttl_s, pin_s)
        new = blocks = 0
        if keys:
            arena = self._arena
            if arena is None:
                arena = await self._calls.write(self._open_arena, deadline)
            new, announced = await self._calls.write(
                partial(arena.put, keys, PagedMemory.packed(pages), stay), deadline, borrowed=True
            )
            if announced is not None:
                await wait_for(asyncio.wrap_future(announced), deadline)
            blocks = arena.offered(keys)
        seconds = time.perf_counter() - began
        return PublishReport(len(keys) * self._spec.block_size, blocks, new, new * self._spec.page_bytes, seconds)

    def _open_arena(self) -> ArenaPublisher:
        if self._arena is None:
            self._arena = ArenaPublisher(self._core, disk=self._disk)
        return self._arena

    async def withdraw(self, tokens: TokenIds, *, extra_keys: Sequence[bytes] | None = None) -> int:
        """Take this process's blocks of a prefix back; returns how many. Peers stop adopting them at once."""
        keys = self._keys(tokens, extra_keys)
        deadline = Deadline(self._config.publish_deadline_s)
        return await self._calls.write(lambda: self._arena.withdraw(keys) if self._arena else 0, deadline)

    async def pin(self, tokens: TokenIds, *, ttl_s: float, extra_keys: Sequence[bytes] | None = None) -> int:
        """Keep this process's blocks of a prefix from being evicted for `ttl_s` seconds from now; returns how many.

        Those are the leading ones that are in the arena. A later pin can only lengthen it; `unpin`, `withdraw`,
        `bump_epoch` and the blocks' own time to live end it early.

        Raises:
            InvalidInputError: more than half of the arena would be pinned; nothing was changed.
        """
        keys = self._keys(tokens, extra_keys)
        seconds = checked_seconds("ttl_s", ttl_s)
        deadline = Deadline(self._config.publish_deadline_s)
        return await self._calls.write(lambda: self._arena.pin(keys, seconds) if self._arena else 0, deadline)

    async def unpin(self, tokens: TokenIds, *, extra_keys: Sequence[bytes] | None = None) -> int:
        """End the pins of a prefix's blocks; returns how many there were."""
        keys = self._keys(tokens, extra_keys)
        deadline = Deadline(self._config.publish_deadline_s)
        return await self._calls.write(lambda: self._arena.unpin(keys) if self._arena else 0, deadline)

    async def bump_epoch(self) -> int:
        """Make every process forget all blocks of this namespace, for new weights; returns the new epoch."""

        def bump() -> int:
            epoch = self._core.bump_epoch()
            if self._arena is not None:
                self._arena.clear()
            return epoch

        return await self._calls.write(bump, Deadline(self._config.publish_deadline_s))

    # ---- match and fetch

    async def match(self, tokens: TokenIds, *, extra_keys: Sequence[bytes] | None = None) -> MatchReport:
        """Say how much of a prefix is published, and why not more, without moving a byte."""
        began = time.perf_counter()
        keys = self._keys(tokens, extra_keys)
        found, reason, detail = await self._lookup(keys, Deadline(self._config.fetch_deadline_s))
        missing = found.blocks if found.blocks < len(keys) else None
        matched = found.blocks * self._spec.block_size
        seconds = time.perf_counter() - began
        return MatchReport(matched, found.blocks, len(keys), tuple(found.owners), reason, missing, detail, seconds)

    async def fetch(
        self,
        tokens: TokenIds,
        *,
        out: Any = None,
        extra_keys: Sequence[bytes] | None = None,
        deadline_s: float | None = None,
    ) -> FetchResult:
        """Fetch the KV of the longest published prefix of `tokens`.

        Args:
            tokens: (n,) token ids.
            out: where to put the pages, a writable array or tensor of at least one page per full block, on the host
                (see `kvmarket.tensors.as_pages`) or on a GPU (see `kvmarket.cuda.packed_cuda_pages`); default: a host
                buffer from a pool, which is reused when the result is gone. Blocks on a GPU are fetched to a GPU.
            extra_keys: as for `publish`.
            deadline_s: seconds; default `MarketConfig.fetch_deadline_s`. When it passes, what is proven is the hit.

        Returns:
            The pages and a report. A miss is a result with no pages, and the report says why.

        Raises:
            InvalidInputError: the tokens or `out` cannot be used.
            MarketClosedError: this marketplace is closed.
        Cancellation:
            A cancelled call waits until nothing writes to `out` any more (at most one group of pages), then raises.
        """
        began = time.perf_counter()
        tokens = token_array(tokens)
        local = None if out is None else self._local(out)
        blocks = len(tokens) // self._spec.block_size
        if local is not None and local.layout.num_pages < blocks:
            raise InvalidInputError(f"out has {local.layout.num_pages} blocks for {blocks} full blocks of tokens")
        deadline = Deadline(self._config.fetch_deadline_s if deadline_s is None else deadline_s)
        if local is not None and local.kind == "cuda" and blocks:
            fetched = await self._fetch_overlapped(tokens, extra_keys, local, deadline)
        else:
            local, fetched = await self._fetch_in_steps(tokens, extra_keys, local, deadline)
        outcome = fetched.outcome
        if outcome.reason is MissReason.NONE and (outcome.blocks < blocks or not blocks):
            outcome.reason, outcome.detail = fetched.reason, fetched.detail
        outcome.stages["total"] = time.perf_counter() - began
        kv = local.memories[0].reshape(-1, self._spec.page_bytes)[: outcome.blocks]
        return FetchResult(kv, self._report(len(tokens), fetched))

    async def _fetch_in_steps(
        self, tokens: np.ndarray, extra_keys: Sequence[bytes] | None, local: PagedMemory | None, deadline: Deadline
    ) -> tuple[PagedMemory, Fetched]:
        """Hash, look up, read; pages go into `local` or, without it, into a buffer as long as what was found."""
        began = time.perf_counter()
        keys = self._keys(tokens, extra_keys)
        hashed = time.perf_counter()
        found, reason, detail = await self._lookup(keys, deadline)
        looked_up = time.perf_counter()
        on_host = local is None or local.kind == "host"
        stored = await self._stored(keys[found.blocks :], found.epoch, deadline) if on_host else 0
        if local is None:
            local = PagedMemory.packed(self._staging.pages(found.blocks + stored, self._spec.page_bytes))
        outcome = await self._read(found, local, deadline) if found.blocks else Outcome()
        if on_host and outcome.blocks < found.blocks + stored:
            await self._read_stored(keys[: found.blocks + stored], found.epoch, local, deadline, outcome)
            if outcome.blocks == len(keys):
                outcome.reason, outcome.detail = MissReason.NONE, ""
        outcome.stages |= {"hash": hashed - began, "lookup": looked_up - hashed}
        return local, Fetched(found, reason, detail, outcome, len(keys), stored)

    async def _fetch_overlapped(
        self, tokens: np.ndarray, extra_keys: Sequence[bytes] | None, local: PagedMemory, deadline: Deadline
    ) -> Fetched:
        """Hash, look up and read, all at once where that can be: on a thread, but for what is soon done."""
        self._require_open()
        groups = self._prefix_keys.groups(tokens) if extra_keys is None else in_groups(self._keys(tokens, extra_keys))
        try:
            return await self._to_cards.fetch(groups, local, deadline)
        except DeadlineExceededError as error:
            nothing, late = LookupResult(0, 0, np.empty(0, RECORD)), MissReason.DEADLINE
            blocks = len(tokens) // self._spec.block_size
            return Fetched(nothing, late, str(error), Outcome(reason=late, detail=str(error)), blocks)

    def _local(self, out: Any) -> PagedMemory:
        if is_cuda(out):
            return packed_cuda_pages(out, self._spec, what="out")
        return PagedMemory.packed(as_pages(out, self._spec, writable=True, what="out"))

    async def _lookup(self, keys: list[bytes], deadline: Deadline) -> tuple[LookupResult, MissReason, str]:
        self._require_open()
        nothing = LookupResult(0, 0, np.empty(0, RECORD))
        if not keys:
            detail = f"the prompt is shorter than one block of {self._spec.block_size} tokens"
            return nothing, MissReason.SHORT_PROMPT, detail
        if self._core.registry.local:
            return self._core.fetcher.lookup(keys)
        try:
            return await self._calls.run(self._calls.readers, lambda: self._core.fetcher.lookup(keys), deadline)
        except DeadlineExceededError as error:
            return nothing, MissReason.DEADLINE, str(error)

    async def _read(self, found: LookupResult, local: PagedMemory, deadline: Deadline) -> Outcome:
        pages = np.arange(found.blocks)
        fetcher = self._core.fetcher
        small = found.blocks * self._spec.page_bytes <= INLINE_BYTES_MAX
        if small and self._core.registry.local and self._core.transports.immediate(found.owners.values()):
            return fetcher.read(found, local, pages, deadline)
        try:
            return await self._calls.read(partial(fetcher.read, found, local, pages, deadline), deadline)
        except DeadlineExceededError as error:
            return Outcome(reason=MissReason.DEADLINE, detail=str(error))

    async def _stored(self, keys: list[bytes], epoch: int, deadline: Deadline) -> int:
        """Return how many leading blocks of `keys` are on this process's disk."""
        if self._disk is None or not keys:
            return 0
        if not self._disk.opened:
            with contextlib.suppress(DeadlineExceededError):
                await self._calls.run(self._calls.readers, partial(self._disk.wait_opened, deadline), deadline)
        return self._disk.run(keys, epoch)

    async def _read_stored(
        self, keys: list[bytes], epoch: int, local: PagedMemory, deadline: Deadline, outcome: Outcome
    ) -> None:
        """Go on from disk where reading from owners ended: there were no more, or they did not deliver."""
        first = outcome.blocks
        count = await self._stored(keys[first:], epoch, deadline)
        if self._disk is not None and count:
            pages = np.arange(first, first + count)
            work = partial(self._disk.read, keys[first : first + count], epoch, local, pages, deadline)
            with contextlib.suppress(DeadlineExceededError):
                outcome.add_disk(await self._calls.run(self._calls.readers, work, deadline, borrowed=True))

    def _report(self, tokens: int, fetched: Fetched) -> FetchReport:
        metrics, report = self._core.metrics, fetched.report(tokens, self._spec)
        metrics.add(fetches=1, tokens_asked=tokens, tokens_adopted=report.tokens_adopted)
        if report.reason is not MissReason.NONE:
            metrics.add_reason("fetch_ended", report.reason)
        if metrics.timed:
            metrics.observe_phases("fetch_seconds", report.stages)
        return report

    # ---- inner

    def _keys(self, tokens: TokenIds, extra_keys: Sequence[bytes] | None) -> list[bytes]:
        self._require_open()
        return self._prefix_keys.of(token_array(tokens), extra_keys)

    def _require_open(self) -> None:
        if self._closing is not None:
            raise MarketClosedError("this marketplace is closed")
        self._core.require_open()
