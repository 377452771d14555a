"""The scheduler role: what do peers have of this prompt, which blocks may peers read, which get overwritten.

No I/O but look-ups in a local registry, nothing blocks, nothing raises into the engine. A registry that is not local is
asked by a thread, and the engine asks again meanwhile.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.core import MarketCore
from kvmarket.errors import DeadlineExceededError, RegistryError
from kvmarket.identity import sealer
from kvmarket.registry import LookupResult
from kvmarket.registry.records import RECORD, block_key, block_keys
from kvmarket.report import MissReason
from kvmarket_vllm.identity import hash_algorithm, hash_root, namespace
from kvmarket_vllm.lookups import Lookups
from kvmarket_vllm.messages import Load, Rank, StepPlan, WorkerFacts
from kvmarket_vllm.offers import Offers
from kvmarket_vllm.opening import Opening
from kvmarket_vllm.resets import Resets
from kvmarket_vllm.stats import Deltas, MarketStats

if TYPE_CHECKING:
    from kvmarket.config import MarketConfig
    from kvmarket_vllm.hook_time import HookTime

logger = logging.getLogger("vllm.kvmarket")

_FOUND_BUT_REFUSED = ("stale_generation", "unverified")
MISS_LOG_MAX = 3
"""How often one reason for finding nothing at all is logged."""


Searched = dict[Rank, tuple[LookupResult, MissReason, str]]


def _search(cores: dict[Rank, MarketCore], keys: list[bytes]) -> Searched:
    """Ask the registry for every rank, and drop what is stale already."""
    searched: Searched = {}
    for rank, core in cores.items():
        result, reason, detail = core.fetcher.lookup(keys)
        searched[rank] = (core.fetcher.fresh(result) if result.blocks else result, reason, detail)
    return searched


@dataclass
class _Match:
    """What was found for a request: `start` is the first block asked for."""

    start: int
    found: dict[Rank, LookupResult]


class SchedulerRole:
    """State of one engine's scheduler-side connector. Used from the scheduler's thread only."""

    def __init__(
        self, vllm_config: Any, config: MarketConfig, block_size: int, *, fetches: bool, publishes: bool
    ) -> None:
        self._config, self._block_size, self._fetches = config, block_size, fetches
        self._algorithm = hash_algorithm(vllm_config)
        self._facts: dict[Rank, WorkerFacts] = {}
        self._root = b""
        self._epochs: dict[Rank, int] = {}
        self._opening: Opening[dict[Rank, MarketCore]] | None = None
        self._requests: dict[str, Any] = {}
        self._matches: dict[str, _Match] = {}
        self._loading: dict[str, tuple[bytes, set[int]]] = {}
        self._failed: set[str] = set()
        keeps = publishes and config.keep_bytes > 0
        self._offers = Offers(block_size, enabled=publishes, keeps=keeps, seal=sealer(config.read_secret()))
        self._plan = StepPlan()
        self._logged: dict[str, int] = {}
        self._lookups: Lookups[Searched] = Lookups()
        self.deltas = Deltas()
        self._resets = Resets(partial(self.deltas.add, resets=1))

    # ---- opening

    def set_facts(self, facts: dict[Rank, WorkerFacts]) -> None:
        """Take what the workers know of their KV caches."""
        refusals = [fact.refusal for fact in facts.values() if fact.refusal]
        if refusals:
            logger.warning("kvmarket fetches and publishes nothing: %s", refusals[0])
            return
        self._facts = facts

    def bind_pool(self, pool: Any) -> None:
        """Take vLLM's block pool, read-only, to know which blocks are what they are said to be."""
        self._offers.bind_pool(pool)

    def _cores(self) -> dict[Rank, MarketCore] | None:
        """Return a core per rank, or None while there is none. The first call with a hash root opens them."""
        if self._opening is None:
            root = hash_root()
            if not root or not self._facts:
                return None
            self._root = self._plan.root = root
            self._opening = Opening(self._open)
        cores = self._opening.get()
        if cores and self._resets.owed:
            if not self._resets.go_on(cores.values()):
                return None  # nothing is looked up before all have been told to forget
            self._plan.forget = True  # now that there is a new epoch, workers begin in it
        return cores

    def _open(self) -> dict[Rank, MarketCore]:
        cores: dict[Rank, MarketCore] = {}
        with ExitStack() as undo:
            for rank, fact in self._facts.items():
                cores[rank] = MarketCore(namespace(fact, self._algorithm, self._root, self._config), self._config)
                undo.callback(cores[rank].close)
            undo.pop_all()
        return cores

    # ---- matching

    def match(self, request: Any, num_computed: int) -> tuple[int | None, bool]:
        """Answer `get_num_new_matched_tokens`: tokens that peers hold beyond the first `num_computed`; load later."""
        self._requests[request.request_id] = request
        cores = self._cores()
        if not self._fetches or cores is None or request.request_id in self._failed:
            return 0, False
        if getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        # The last token is always computed, so that no adopted block is written to again.
        end = min(len(request.block_hashes), (request.num_tokens - 1) // self._block_size)
        start = num_computed // self._block_size
        if start >= end:
            return 0, False
        keys = block_keys(request.block_hashes[:end], start, self._offers.seal)
        if any(keys[0] == key for key, _ in self._loading.values()):
            return None, False  # another request is loading this prefix: wait for it and hit locally
        found = self._lookup(cores, keys, request.request_id)
        blocks = None if found is None else min(result.blocks for result in found.values())
        if not found or not blocks:
            return blocks, False  # None: the registry is being asked, off this thread
        self._matches[request.request_id] = _Match(start, found)
        return blocks * self._block_size, True

    def _lookup(
        self, cores: dict[Rank, MarketCore], keys: list[bytes], request_id: str
    ) -> dict[Rank, LookupResult] | None:
        """Return what every rank finds, or None while a registry that is not local is being asked."""
        if all(core.registry.local for core in cores.values()):
            searched = _search(cores, keys)
        else:
            try:
                answer = self._lookups.ask(request_id, keys, partial(_search, cores, keys))
            except DeadlineExceededError as error:
                nothing = LookupResult(0, 0, np.empty(0, RECORD))
                answer = dict.fromkeys(cores, (nothing, MissReason.REGISTRY_UNAVAILABLE, str(error)))
            if answer is None:
                return None
            searched = answer
        shortest, reason, detail = min(searched.values(), key=lambda answer: answer[0].blocks)  # all load as much
        if shortest.blocks < len(keys):
            why = shortest.first_missing if shortest.first_missing in _FOUND_BUT_REFUSED else str(reason)
            self.deltas.add_labelled("misses", why)
            if not shortest.blocks:
                self._log_miss(why, detail)
        self.deltas.add(lookups=1, lookup_hit_tokens=shortest.blocks * self._block_size)
        return {rank: result for rank, (result, _, _) in searched.items()}

    def _log_miss(self, reason: str, detail: str) -> None:
        self._logged[reason] = self._logged.get(reason, 0) + 1
        if reason != "not_published" and self._logged[reason] <= MISS_LOG_MAX:
            logger.warning("kvmarket: nothing found (%s): %s", reason, detail)

    def allocated(self, request: Any, block_ids: list[int], num_external: int) -> None:
        """Take vLLM's blocks for a request; start the load that was promised for it."""
        request_id = request.request_id
        self._requests[request_id] = request
        match = self._matches.pop(request_id, None)
        if num_external == 0 or match is None:
            return
        count = num_external // self._block_size
        targets = block_ids[match.start : match.start + count]
        self._plan.dirty += self._offers.take_back(targets)
        self._plan.loads.append(Load(request_id, targets, match.found))
        key = block_key(request.block_hashes, match.start, self._offers.seal)
        self._loading[request_id] = (key, set(targets))

    # ---- one step

    def plan_step(self, output: Any) -> StepPlan:
        """Finish the plan of this step and begin the next one."""
        cores = self._cores()
        plan, self._plan = self._plan, StepPlan()
        plan.root = self._root
        # A step that only goes on decoding, and completes no block, can do without knowing the epoch.
        plan.begins = bool(output.scheduled_new_reqs or plan.loads)
        if plan.begins and self._epoch_moved(cores or {}):
            plan.forget = True
            self._offers.void()
        if self._offers.pool_was_reset():
            plan.forget = True
            self._offers.clear()
        self._offers.step(output, self._requests, plan)
        if plan.offers and not plan.begins and self._epoch_moved(cores or {}):
            plan.forget = True
            plan.offer_nothing()  # it was computed from what all are to forget
            self._offers.void()
        if self._resets.owed:
            plan.offer_nothing()  # it would be published as what all are about to forget, or are not told to
            self._offers.void()
        if plan.dirty:
            plan.keep = self._offers.overwritten()
        plan.idle = not output.total_num_scheduled_tokens
        for request_id in output.finished_req_ids:
            self._forget_request(request_id)
        return plan

    def _epoch_moved(self, cores: dict[Rank, MarketCore]) -> bool:
        """Tell whether the namespace was told to forget, by this replica or another, since the last step."""
        try:
            epochs = {rank: core.epoch_hint() for rank, core in cores.items()}
        except RegistryError:
            return False  # nothing is found or announced without it either
        before, self._epochs = self._epochs, epochs
        return bool(before) and before != epochs

    def finished_loading(self, request_ids: set[str], invalid_block_ids: set[int]) -> None:
        """Learn which loads are over, and which of them failed: those requests are never asked about again.

        With several ranks, the blocks that one of them could not load may be known before the others are done.
        """
        for request_id, (_, targets) in self._loading.items():
            if targets & invalid_block_ids and request_id in self._requests:
                self._failed.add(request_id)
        for request_id in request_ids:
            self._loading.pop(request_id, None)

    def request_finished(self, request: Any) -> None:
        """Drop what is pending for a request. Its blocks stay offered until vLLM reuses them."""
        self._matches.pop(request.request_id, None)

    def _forget_request(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._matches.pop(request_id, None)
        self._failed.discard(request_id)
        self._offers.forget_request(request_id)
        self._lookups.forget(request_id)

    # ---- the rest

    def stats(self, hook_time: HookTime) -> MarketStats | None:
        """Return what happened since the last step."""
        return hook_time.take(self.deltas)

    def reset(self) -> bool:
        """Make all processes of the namespace forget everything (weights changed)."""
        cores = self._cores()
        self._plan.forget = True
        self._offers.void()
        if cores is None:  # nothing was ever adopted; what a worker may have published goes when the registry is there
            if self._opening is not None:
                self._resets.owe()
            return self._opening is None or self._opening.failed
        return self._resets.make(cores.values())

    def close(self) -> None:
        """Release the registry."""
        self._lookups.close()
        self._resets.close()
        cores = self._opening.finish(1.0) if self._opening is not None else None
        for core in (cores or {}).values():
            core.close()
