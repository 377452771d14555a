"""The connector that vLLM loads: it hands every hook to the role it was made for.

Version tolerance: hooks are duck-typed, names that only some versions have are looked up, and nothing here is patched.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from kvmarket_vllm.hook_time import HookTime, timed
from kvmarket_vllm.identity import split_extra_config, unsupported
from kvmarket_vllm.messages import StepPlan, WorkerFacts
from kvmarket_vllm.scheduler import SchedulerRole
from kvmarket_vllm.stats import MarketPromMetrics, MarketStats
from kvmarket_vllm.worker import WorkerRole

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # vLLM < 0.32
    CacheHitSource = None

logger = logging.getLogger("vllm.kvmarket")


def _worker_rank() -> tuple[int, int]:
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return get_pp_group().rank_in_group, get_tp_group().rank_in_group


class KVMarketConnector(KVConnectorBase_V1):
    """Fetches prefixes that other replicas have computed, and lets them fetch this one's, in place.

    Settings come from ``KVMARKET_*`` and, above them, from ``kv_connector_extra_config``: any field of
    `kvmarket.MarketConfig`, ``model_id`` (default: derived from the checkpoint) and ``weights_digest`` (default:
    computed).
    """

    if CacheHitSource is not None:
        _cache_hit_source = CacheHitSource.P2P

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        config, own = split_extra_config(dict(transfer.kv_connector_extra_config or {}))
        self._scheduler: SchedulerRole | None = None
        self._worker: WorkerRole | None = None
        self._invalid: set[int] = set()
        self.hook_time = HookTime("worker" if role == KVConnectorRole.WORKER else "scheduler")
        if role == KVConnectorRole.WORKER:
            self._worker = WorkerRole(vllm_config, config, own, kv_cache_config, _worker_rank())
            return
        if getattr(transfer, "kv_load_failure_policy", "recompute") != "recompute":
            transfer.kv_load_failure_policy = "recompute"
            logger.info(
                "kvmarket: kv_load_failure_policy is now 'recompute': a block that cannot be fetched is computed"
            )
        supported = not unsupported(vllm_config, kv_cache_config)  # if not, the workers' facts say why
        block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size if supported else 1
        self._scheduler = SchedulerRole(
            vllm_config,
            config,
            block_size,
            fetches=supported and transfer.is_kv_consumer,
            publishes=supported and transfer.is_kv_producer,
        )

    # ---- what kind of connector this is

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is only a future miss."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> MarketStats:
        """Rebuild stats in the API process."""
        return MarketStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> MarketPromMetrics:
        """Make the counters of vLLM's /metrics."""
        return MarketPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @timed
    def get_kv_connector_stats(self) -> MarketStats | None:
        """Return what happened since the last step."""
        role = self._worker or self._scheduler
        return role.stats(self.hook_time) if role is not None else None

    def shutdown(self) -> None:
        """Take everything back; peers miss from here on."""
        for role in (self._worker, self._scheduler):
            if role is not None:
                role.close()

    # ---- worker role

    @property
    def market(self) -> Any:
        """The open market of this rank (core, region, publisher, loader), or None while there is none."""
        return self._worker.market if self._worker is not None else None

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        """Have the KV cache allocated in memory that peers can map."""
        return self._worker.allocation_context() if self._worker is not None else None

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take the KV cache."""
        if self._worker is not None:
            self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> WorkerFacts | None:
        """Tell the scheduler role what this rank's pages are."""
        return self._worker.facts if self._worker is not None else None

    # Most steps only go on decoding, and take milliseconds: what has nothing to do then is not even timed.

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Before the forward: make unreadable what it overwrites. Old versions pass a set here and bind the plan."""
        plan = kv_connector_metadata if isinstance(kv_connector_metadata, StepPlan) else self._plan()
        if self._worker is not None and plan is not None and not plan.quiet:
            self.hook_time.call(self._worker.before_forward, plan)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start this step's loads."""
        del forward_context, kwargs
        plan = self._plan()
        if self._worker is not None and plan is not None and plan.loads:
            self.hook_time.call(self._worker.start_loads, plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded layer by layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved: peers read the KV cache itself."""

    def wait_for_save(self) -> None:
        """After the forward: offer the blocks it completed."""
        plan = self._plan()
        if self._worker is not None and plan is not None and plan.publish:
            self.hook_time.call(self._worker.after_forward, plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Offer what was final before this step; return the requests whose loads are over."""
        plan = self._plan()
        if self._worker is None or plan is None:
            return None, None
        self.hook_time.steps += 1
        if plan.held:  # before it is forgotten what was fetched for requests that are over
            self.hook_time.call(self._worker.after_step, plan)
        if not finished_req_ids and not self._worker.loading:
            return None, None
        done, self._invalid = self.hook_time.call(self._worker.finished, plan, finished_req_ids)
        return None, done or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks of the loads just reported that were not loaded; vLLM computes them."""
        invalid = self._invalid
        self._invalid = set()
        return invalid

    def _plan(self) -> StepPlan | None:
        return self._connector_metadata if isinstance(self._connector_metadata, StepPlan) else None

    # ---- scheduler role

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """Take what the workers know."""
        facts = {rank: fact for rank, fact in metadata.items() if isinstance(fact, WorkerFacts)}
        if self._scheduler is not None and facts:
            self._scheduler.set_facts(facts)

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        """The same, from versions that know tensor-parallel ranks only."""
        self.set_xfer_handshake_metadata_pp_aware({(0, rank): fact for rank, fact in metadata.items()})

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Take the block pool."""
        if self._scheduler is not None:
            self._scheduler.bind_pool(gpu_block_pool)

    @timed
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Say how many tokens peers hold beyond the local ones."""
        return self._scheduler.match(request, num_computed_tokens) if self._scheduler is not None else (0, False)

    @timed
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Start what was promised."""
        if self._scheduler is not None:
            groups = blocks.get_block_ids() if num_external_tokens else ()  # else they are not asked about
            self._scheduler.allocated(request, list(groups[0]) if groups else [], num_external_tokens)

    @timed
    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        """Plan the step."""
        self.hook_time.steps += 1
        return self._scheduler.plan_step(scheduler_output) if self._scheduler is not None else StepPlan()

    def update_connector_output(self, connector_output: Any) -> None:
        """Learn which loads are over."""
        finished, invalid = connector_output.finished_recving, connector_output.invalid_block_ids
        if self._scheduler is not None and (finished or invalid):
            self.hook_time.call(self._scheduler.finished_loading, set(finished or ()), set(invalid or ()))

    @timed
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Free the blocks now: their content stays readable until they are used again."""
        del block_ids
        if self._scheduler is not None:
            self._scheduler.request_finished(request)
        return False, None

    def reset_cache(self) -> bool:
        """Make every process of the namespace forget."""
        return self._scheduler.reset() if self._scheduler is not None else True
