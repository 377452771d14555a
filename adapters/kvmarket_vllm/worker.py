"""The worker role: lends the KV cache in place, guards it with generations, and reads peers' blocks into it."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any, cast

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

from kvmarket.core import MarketCore
from kvmarket.errors import InvalidInputError, KVMarketError, MissingExtraError, RegistrationError, TransportError
from kvmarket.spec import KVCacheSpec
from kvmarket_vllm.card import behind_launched_work, card_pages, launched_work
from kvmarket_vllm.fetched import Fetched
from kvmarket_vllm.identity import engine_facts, hash_algorithm, namespace, unsupported
from kvmarket_vllm.keeping import Kept
from kvmarket_vllm.layout import kv_dtype, paged_memory
from kvmarket_vllm.loader import Loader
from kvmarket_vllm.messages import Load, Rank, StepPlan, WorkerFacts
from kvmarket_vllm.opening import Opening
from kvmarket_vllm.shared_alloc import SharedAllocation
from kvmarket_vllm.stats import Deltas
from kvmarket_vllm.weights import model_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from kvmarket.config import MarketConfig
    from kvmarket.metrics import Metrics
    from kvmarket.publish import Publisher
    from kvmarket.region import LentRegion, PagedMemory, SharedMemory
    from kvmarket.region.cuda import CudaPagedMemory
    from kvmarket_vllm.hook_time import HookTime
    from kvmarket_vllm.stats import MarketStats

    _Offering = Callable[[Publisher, tuple[bytes, ...], tuple[int, ...]], None]

logger = logging.getLogger("vllm.kvmarket")

_ASKS_FOR_CONTEXT = hasattr(KVConnectorBase_V1, "get_mem_pool_context")
_COUNTED_BY = ("blocks_refused{", "transport_bytes{", "path_bytes{")
FETCHED_LATER_S = 0.1
"""What requests found in their blocks is offered this much later, on a card: digesting and announcing it takes the
engine's time while others wait for their first tokens, and whom it came from has it still."""
RETRACTED_LATER_S = 0.1
"""Records of what a step overwrites are withdrawn this much later: a request that begins may overwrite a thousand
blocks, and withdrawing them takes the engine's time while it waits for its load and its first token."""
FEW_BLOCKS, FEW_TOGETHER_S = 16, 0.1
"""On a card, what steps complete of so few blocks, as in decoding, is offered together, ten times a second: each time
takes the engine's time, and nobody asks for the end of an answer that soon."""
_COUNTED = ("blocks_announced", "announcements_failed", "announcements_dropped", "blocks_verified")
_COUNTED_KEPT = ("disk_blocks_written", "disk_blocks_promoted", "disk_errors")


def _until_next(period_s: float) -> float:
    """Return the seconds to the next multiple of a period: what is due then is done together."""
    return period_s - time.monotonic() % period_s


class _Market:
    """The open market of one worker: core, region, publisher and loader, made and closed together.

    Attributes:
        region, publisher: None where the memory of a card cannot be lent; such a replica only fetches.
    """

    def __init__(
        self, core: MarketCore, pages: PagedMemory, shared: list[SharedMemory], rank: Rank, deltas: Deltas
    ) -> None:
        self.core = core
        self.region: LentRegion | None = None
        self.publisher: Publisher | None = None
        try:
            self.region = core.lend(pages, shared)
            self.publisher = core.publisher(self.region)
        except RegistrationError as error:
            logger.warning("kvmarket: this replica fetches from peers, but they cannot fetch from it: %s", error)
        on_card = pages.kind == "cuda"
        ordered = partial(behind_launched_work, cast("CudaPagedMemory", pages)) if on_card else None
        self.loader = Loader(core, pages, rank, deltas, ordered)
        self.kept = Kept.open(core, pages, self.publisher, deltas) if self.publisher is not None else None

    @property
    def changes(self) -> int:
        """Grows whenever something is counted, see `Metrics.changes`."""
        return self.core.metrics.changes + (self.kept.core.metrics.changes if self.kept is not None else 0)

    def close(self) -> None:
        self.loader.close()
        if self.kept is not None:
            self.kept.close()
        self.core.close()


class WorkerRole:
    """State of one rank's connector. Used from the worker's thread only.

    Attributes:
        loading: loads that were started and not reported.
    """

    def __init__(
        self, vllm_config: Any, config: MarketConfig, own: dict[str, str], kv_cache_config: Any, rank: Rank
    ) -> None:
        self._vllm_config, self._config, self._own = vllm_config, config, own
        self._kv_cache_config, self._rank = kv_cache_config, rank
        self._allocation = SharedAllocation()
        self._pages: PagedMemory | None = None
        self._on_host = vllm_config.device_config.device_type == "cpu"
        self._shared: list[SharedMemory] = []
        self._facts: WorkerFacts | None = None
        self._opening: Opening[_Market] | None = None
        self._counted: dict[str, float] = {}
        self._changes = 0
        self._lost: list[Load] = []
        self.loading = 0
        self._fetched = Fetched()
        self.deltas = Deltas()
        if self._on_host and not _ASKS_FOR_CONTEXT and not unsupported(vllm_config, kv_cache_config):
            self._allocation.span_until_registered()

    # ---- start

    def allocation_context(self) -> AbstractContextManager[Any] | None:
        """Return the context in which vLLM should allocate its KV cache."""
        if not self._on_host or unsupported(self._vllm_config, self._kv_cache_config):
            return None  # a card's memory is lent as it is
        return self._allocation

    def register(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the KV cache tensors and work out what a page is."""
        self._allocation.end_span()
        try:
            self._facts = self._describe(tensors)
        except (InvalidInputError, MissingExtraError, TransportError, OSError) as error:
            self._facts = self._refuse(str(error))
        self._allocation.keep_only(self._shared)
        private = self._on_host and not self._shared
        if private and not self._facts.refusal:  # a refusal is the scheduler's to log, once for all ranks
            logger.warning(
                "kvmarket: this vLLM allocates its KV cache in private memory: this replica fetches from peers, but "
                "only replicas of its own process can fetch from it"
            )

    def _describe(self, tensors: Mapping[str, torch.Tensor]) -> WorkerFacts:
        refusal = unsupported(self._vllm_config, self._kv_cache_config)
        kinds = {tensor.device.type for tensor in tensors.values()}
        if not refusal and kinds not in ({"cpu"}, {"cuda"}):
            refusal = f"the KV cache is in memory of {' and '.join(sorted(kinds))}, which no transport reads"
        if refusal:
            return self._refuse(refusal)
        num_blocks = self._kv_cache_config.num_blocks
        if self._on_host:
            self._pages, self._shared, order = paged_memory(tensors, num_blocks, self._allocation.memories)
        else:
            self._pages, order = card_pages(tensors, num_blocks)
        spec = self._spec(tensors, self._pages.layout.page_bytes)
        identity = model_identity(self._vllm_config, self._own.get("model_id", ""), self._own.get("weights_digest", ""))
        return WorkerFacts(spec.as_dict(), engine_facts(self._vllm_config, order), identity)

    def _spec(self, tensors: Mapping[str, torch.Tensor], page_bytes: int) -> KVCacheSpec:
        cache = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec
        parallel = self._vllm_config.parallel_config
        mla = "MLA" in type(cache).__name__
        layers = len({tensor.data_ptr() for tensor in tensors.values()})
        spec = KVCacheSpec(
            num_layers=layers,
            num_kv_heads=cache.num_kv_heads,
            head_size=cache.head_size,
            dtype=kv_dtype(tensors),
            block_size=cache.block_size,
            layout=str(getattr(self._kv_cache_config, "kv_cache_layout", None) or "engine"),
            kv_split=not mla,
            quantization=""
            if self._vllm_config.cache_config.cache_dtype == "auto"
            else str(self._vllm_config.cache_config.cache_dtype),
            packing=self._instruction_set(),
            pp_rank=self._rank[0],
            pp_size=parallel.pipeline_parallel_size,
            tp_rank=self._rank[1],
            tp_size=parallel.tensor_parallel_size,
        )
        if spec.page_bytes != page_bytes:
            raise InvalidInputError(f"blocks have {page_bytes} bytes where {spec} has {spec.page_bytes}")
        return spec

    def _instruction_set(self) -> str:
        """Return how the CPU attention packs rows; raw bytes mean the same only where it is equal."""
        layers = self._vllm_config.compilation_config.static_forward_context
        found = {str(getattr(layer, "isa", "") or "") for layer in layers.values() if hasattr(layer, "isa")}
        return "+".join(sorted(found))

    def _refuse(self, why: str) -> WorkerFacts:
        return WorkerFacts({}, (), {}, refusal=why)

    @property
    def facts(self) -> WorkerFacts:
        """What the scheduler needs to know of this rank."""
        return self._facts if self._facts is not None else self._refuse("no KV cache was registered")

    # ---- one step

    def before_forward(self, plan: StepPlan) -> None:
        """Make unreadable what this step overwrites. Must return before the forward."""
        market = self._market(plan.root)
        if market is None or market.publisher is None:
            return
        if market.kept is not None:
            market.kept.before_forward(plan)
        if plan.forget:
            market.publisher.forget_all()
            self._fetched.forget_digests()
        if plan.dirty:
            market.publisher.retract(plan.dirty, delay_s=RETRACTED_LATER_S + _until_next(FEW_TOGETHER_S))
            self.deltas.add(blocks_retracted=len(plan.dirty))

    def start_loads(self, plan: StepPlan) -> None:
        """Start this step's loads; small ones of an otherwise idle step are done when it returns."""
        if not plan.loads:
            return
        market = self._market(plan.root)
        self.loading += len(plan.loads)
        for load in plan.loads:
            if market is None:
                self._lost.append(load)
            else:
                self._fetched.started(load.request_id, load.block_ids)
                market.loader.start(load, inline=plan.idle and market.core.registry.local)

    def after_forward(self, plan: StepPlan) -> None:
        """Offer the blocks that this step completes: on a card, once its kernels have ended."""
        self._offer(plan, plan.publish, self._offer_computed)

    def after_step(self, plan: StepPlan) -> None:
        """Offer blocks that were final before this step. Not within `after_forward`: not every step has a forward."""
        self._offer(plan, plan.held, self._offer_held)

    def _offer(self, plan: StepPlan, blocks: list[tuple[bytes, int]], on_card: _Offering) -> None:
        market = self._market(plan.root) if blocks else None
        private = self._on_host and not self._shared
        if market is None or market.publisher is None or market.region is None or private:
            return
        keys, pages = zip(*blocks, strict=True)
        if market.region.pages.kind == "cuda":
            on_card(market.publisher, keys, pages)
        else:
            market.publisher.offer(keys, pages)
        self.deltas.add(blocks_offered=len(blocks))

    def _offer_computed(self, publisher: Publisher, keys: tuple[bytes, ...], pages: tuple[int, ...]) -> None:
        """Offer what the engine has launched."""
        self._fetched.computed(pages)
        soon_s = _until_next(FEW_TOGETHER_S) if len(pages) <= FEW_BLOCKS else 0.0
        publisher.offer(keys, pages, after=launched_work(), delay_s=soon_s)

    def _offer_held(self, publisher: Publisher, keys: tuple[bytes, ...], pages: tuple[int, ...]) -> None:
        """Offer what was fetched, or computed before, a little later, with digests where they are known already."""
        digests, ended = self._fetched.take(pages), launched_work()
        known = [bool(digest) for digest in digests]
        for chosen in (known, [not digest for digest in digests]):
            if any(chosen):
                some_keys, some_pages = list(compress(keys, chosen)), list(compress(pages, chosen))
                some_digests = list(filter(None, digests)) if chosen is known else None
                publisher.offer(some_keys, some_pages, after=ended, delay_s=FETCHED_LATER_S, digests=some_digests)

    def finished(self, plan: StepPlan, over: set[str]) -> tuple[set[str], set[int]]:
        """Return the requests whose loads are over, each once, and the blocks among them that were not loaded.

        Args:
            plan: this step's.
            over: requests that ended since the last step.
        """
        if over:
            self._fetched.forget_requests(over)
        if not self.loading:
            return set(), set()
        ids = {load.request_id for load in self._lost}
        invalid = {block for load in self._lost for block in load.block_ids}
        self._lost.clear()
        market = self._market(plan.root)
        if market is not None:
            done, failed = market.loader.take_finished(wait=plan.idle)
            for request_id in done:
                self._fetched.loaded(request_id, market.loader.take_digests(request_id))
            ids |= done
            invalid |= failed
        self.loading -= len(ids)
        return ids, invalid

    @property
    def market(self) -> _Market | None:
        """The open market, or None while there is none."""
        return self._opening.get() if self._opening is not None else None

    def stats(self, hook_time: HookTime) -> MarketStats | None:
        """Return this step's deltas."""
        market = self.market
        # Before the look at the counters: what comes between is seen next time.
        if market is not None and (changes := market.changes) != self._changes:
            self._changes = changes
            self._count(market.core.metrics, _COUNTED, _COUNTED_BY)
            if market.kept is not None:
                self._count(market.kept.core.metrics, _COUNTED_KEPT, ("arena_evicted{",))
        return hook_time.take(self.deltas)

    def _count(self, metrics: Metrics, names: tuple[str, ...], prefixes: tuple[str, ...]) -> None:
        """Add what has grown since the last step; no counter comes from two sources."""
        for name, value in metrics.snapshot().items():
            if name in names or name.startswith(prefixes):
                if delta := value - self._counted.get(name, 0):
                    self.deltas.add(**{name: delta})
                self._counted[name] = value

    def _market(self, root: bytes) -> _Market | None:
        if self._opening is None:
            if not root or self._pages is None:
                return None
            pages, facts = self._pages, self.facts

            def make() -> _Market:
                space = namespace(facts, hash_algorithm(self._vllm_config), root, self._config)
                core = MarketCore(space, self._config)
                with ExitStack() as undo:
                    undo.callback(core.close)
                    market = _Market(core, pages, self._shared, self._rank, self.deltas)
                    undo.pop_all()
                logger.info(
                    "kvmarket is open: %d pages of %d bytes, namespace %s, transports %s",
                    pages.layout.num_pages,
                    pages.layout.page_bytes,
                    space.digest.hex()[:12],
                    "+".join(market.core.transports.schemes),
                )
                return market

            self._opening = Opening(make)
        return self._opening.get()

    def close(self) -> None:
        """Take everything back."""
        market = self._opening.finish(1.0) if self._opening is not None else None
        if market is not None:
            try:
                market.close()
            except KVMarketError as error:
                logger.warning("kvmarket: %s", error)
        for memory in self._allocation.memories:
            memory.close()
