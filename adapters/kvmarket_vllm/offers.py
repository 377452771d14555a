"""Which of vLLM's blocks peers may read: the scheduler's mirror of what the workers have offered.

A block is offered when its KV is final, and taken back in the very step in which vLLM writes to it again. vLLM frees a
block long before it writes to it, and until then peers may read it: that costs nothing and needs no pin.

What a request finds in its blocks when it begins (fetched, or hit locally) is offered once its first token is out, or
it is over: such blocks may be a thousand, the token is waited for, and whoever they came from has them meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmarket.registry.records import NOT_SEALED, block_key, block_keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmarket.secret import Sealer
    from kvmarket_vllm.messages import StepPlan

GROUP_SUFFIX = (0).to_bytes(4, "big")
"""What vLLM's pool appends to the block hashes of KV cache group 0."""


@dataclass(frozen=True, slots=True)
class _Held:
    """The first blocks of a request, which were complete when it began. It may be over when they are offered."""

    request: Any
    blocks: list[int]


class Offers:
    """Offered blocks and the block tables of running requests.

    Attributes:
        seal: what block hashes go through, see `kvmarket.identity.Namespace.sealer`.
    """

    def __init__(self, block_size: int, *, enabled: bool, keeps: bool = False, seal: Sealer = NOT_SEALED) -> None:
        self._block_size, self._enabled, self.seal = block_size, enabled, seal
        self._keeps = keeps
        self._parents: dict[int, bytes | None] = {}
        self._overwritten: list[tuple[bytes, bytes | None, int]] = []
        self._pool: Any = None
        self._hash_map: Any = None
        self._offered: dict[int, bytes] = {}
        self._void: set[int] = set()
        self._tables: dict[str, list[int]] = {}
        self._seen: dict[str, int] = {}
        self._held: dict[str, _Held] = {}

    def bind_pool(self, pool: Any) -> None:
        """Take vLLM's block pool."""
        self._pool, self._hash_map = pool, getattr(pool, "cached_block_hash_to_block", None)

    def pool_was_reset(self) -> bool:
        """Tell whether vLLM's prefix cache was reset since the last call: it makes a new hash map, and tells nobody."""
        current = getattr(self._pool, "cached_block_hash_to_block", None)
        if current is self._hash_map:
            return False
        self._hash_map = current
        return True

    def clear(self) -> None:
        """Forget all offers, because vLLM's own prefix cache was emptied."""
        self._drop_offers()
        self._void.clear()
        self._void.update(*self._tables.values())

    def void(self) -> None:
        """Never again offer what blocks hold now, nor what is computed from it; vLLM may still have it cached."""
        self._void.update(self._offered, *self._tables.values(), *(held.blocks for held in self._held.values()))
        self._drop_offers()

    def _drop_offers(self) -> None:
        self._offered.clear()
        self._parents.clear()
        self._overwritten.clear()
        self._held.clear()

    def take_back(self, block_ids: Iterable[int]) -> list[int]:
        """Return those of `block_ids`, which get new content, that are offered, and no longer count them as such."""
        block_ids = list(block_ids)
        if self._void:
            self._void.difference_update(block_ids)
        if self._offered.keys().isdisjoint(block_ids):  # asked once, since a prompt may get a thousand
            return []
        taken: list[int] = []
        for block in block_ids:
            if (key := self._offered.pop(block, None)) is not None:
                taken.append(block)
                if self._keeps:
                    self._overwritten.append((key, self._parents.pop(block, None), block))
        return taken

    def overwritten(self) -> list[tuple[bytes, bytes | None, int]]:
        """Return (key, key of the block before it or None, block) of all that was taken back since the last call."""
        taken, self._overwritten = self._overwritten, []
        return taken

    def forget_request(self, request_id: str) -> None:
        """Drop a finished request's table."""
        self._tables.pop(request_id, None)
        self._seen.pop(request_id, None)

    def step(self, output: Any, requests: dict[str, Any], plan: StepPlan) -> None:
        """Add to `plan` what this step overwrites, what is final after it, and what was final before and is due."""
        due = self._take_due(getattr(output, "finished_req_ids", ())) if self._held else ()
        computed: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            self._replace_table(requests, new.req_id, new.block_ids[0], new.num_computed_tokens, plan)
        cached = output.scheduled_cached_reqs
        resumed = getattr(cached, "resumed_req_ids", ())
        for request_id, blocks, count in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            computed[request_id] = count
            if request_id in resumed:
                self._replace_table(requests, request_id, blocks[0] if blocks else [], count, plan)
            elif blocks:
                plan.dirty += self.take_back(blocks[0])
                self._tables.setdefault(request_id, []).extend(blocks[0])
        for pair in getattr(output, "kv_cache_block_copies", None) or ():
            plan.dirty += self.take_back(_targets(pair))
        if zeroed := getattr(output, "new_block_ids_to_zero", None):
            plan.dirty += self.take_back(zeroed)
        if not self._enabled or self._pool is None:
            return
        scheduled, seen, block_size = output.num_scheduled_tokens, self._seen, self._block_size
        for request_id, count in computed.items():
            complete = (count + scheduled.get(request_id, 0)) // block_size
            if complete > seen.get(request_id, 0) and (request := requests.get(request_id)) is not None:
                self._offer_computed(request, complete, plan)
        for held in due:  # last: a block that this step computes again is offered as that
            hashes = held.request.block_hashes
            plan.held += self._offer(hashes, 0, self._agreed(hashes, 0, held.blocks))

    def _replace_table(
        self, requests: dict[str, Any], request_id: str, blocks: list[int], num_computed: int, plan: StepPlan
    ) -> None:
        """A request (again) gets its whole table: all from the first block that is not complete will be written to."""
        complete = num_computed // self._block_size
        self._tables[request_id], self._seen[request_id] = list(blocks), 0
        plan.dirty += self.take_back(blocks[complete:])
        if complete and self._enabled and (request := requests.get(request_id)) is not None:
            self._held[request_id] = _Held(request, blocks[:complete])
            self._seen[request_id] = complete

    def _take_due(self, finished: Iterable[str]) -> list[_Held]:
        """Return the held blocks of requests whose first token is out, and of those that are over."""
        over = self._held.keys() - self._tables.keys()
        over.update(finished)
        due = [id_ for id_, held in self._held.items() if id_ in over or held.request.num_output_tokens]
        return [self._held.pop(request_id) for request_id in due]

    def _offer_computed(self, request: Any, complete: int, plan: StepPlan) -> None:
        """Offer the blocks of a request that are complete once this step has run, if vLLM agrees on what they hold."""
        request_id, hashes, table = request.request_id, request.block_hashes, self._tables.get(request.request_id, [])
        first = self._seen.get(request_id, 0)
        if self._void and not self._void.isdisjoint(table[:first]):
            return  # it is computed from what must not be offered
        if blocks := self._agreed(hashes, first, table[first:complete]):
            self._seen[request_id] = first + len(blocks)
            plan.publish += self._offer(hashes, first, blocks)

    # A prompt may have a thousand blocks: comparisons are of whole lists where they can be.

    def _agreed(self, hashes: Sequence[bytes], first: int, blocks: list[int]) -> list[int]:
        """Return the leading ones of `blocks`, the first of which is number `first`, that hold what `hashes` say."""
        blocks = blocks[: max(0, len(hashes) - first)]
        if self._void and not self._void.isdisjoint(blocks):
            blocks = blocks[: next(i for i, block in enumerate(blocks) if block in self._void)]
        pool = self._pool.blocks
        held = [pool[block].block_hash for block in blocks]
        final = [bytes(hash_) + GROUP_SUFFIX for hash_ in hashes[first : first + len(blocks)]]
        if held != final:  # not after this step (speculation, sampling under way): look again in the next one
            blocks = blocks[: next(i for i, hash_ in enumerate(final) if held[i] != hash_)]
        return blocks

    def _offer(self, hashes: Sequence[bytes], first: int, blocks: list[int]) -> list[tuple[bytes, int]]:
        """Count blocks `first`, `first` + 1, ... as offered; return those that were not, with their keys."""
        if len(blocks) == 1:  # as in decoding
            keys = [block_key(hashes, first, self.seal)]
        else:
            keys = block_keys(hashes[: first + len(blocks)], first, self.seal)
        offered = self._offered
        if [*map(offered.get, blocks)] == keys:  # a local hit
            return []
        news: list[tuple[bytes, int]] = []
        for index, (key, block) in enumerate(zip(keys, blocks, strict=True), first):
            if offered.get(block) != key:
                offered[block] = key
                if self._keeps:
                    self._parents[block] = block_key(hashes, index - 1, self.seal) if index else None
                news.append((key, block))
        return news


def _targets(copies: Any) -> list[int]:
    """Return the block ids that a copy-on-write entry writes to."""
    target = copies[1] if isinstance(copies, tuple | list) else getattr(copies, "dst", ())
    return [target] if isinstance(target, int) else list(target)
