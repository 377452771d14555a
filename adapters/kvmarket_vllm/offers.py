"""Which of vLLM's blocks peers may read: the scheduler's mirror of what the workers have offered.

A block is offered when its KV is final, and taken back in the very step in which vLLM writes to it again. vLLM frees a
block long before it writes to it, and until then peers may read it: that costs nothing and needs no pin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmarket.registry.records import NOT_SEALED, block_key, block_keys

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmarket.secret import Sealer
    from kvmarket_vllm.messages import StepPlan

GROUP_SUFFIX = (0).to_bytes(4, "big")
"""What vLLM's pool appends to the block hashes of KV cache group 0."""


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
        self._void.update(self._offered, *self._tables.values())
        self._drop_offers()

    def _drop_offers(self) -> None:
        self._offered.clear()
        self._parents.clear()
        self._overwritten.clear()

    def take_back(self, block_ids: Iterable[int]) -> list[int]:
        """Return those of `block_ids`, which get new content, that are offered, and no longer count them as such."""
        self._void.difference_update(block_ids := list(block_ids))
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
        """Add to `plan` what this step overwrites, and what is final after it."""
        computed: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            self._replace_table(new.req_id, new.block_ids[0], new.num_computed_tokens, plan)
        cached = output.scheduled_cached_reqs
        resumed = getattr(cached, "resumed_req_ids", ())
        for request_id, blocks, count in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            computed[request_id] = count
            if request_id in resumed:
                self._replace_table(request_id, blocks[0] if blocks else [], count, plan)
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
                self._offer(request, complete, plan)

    def _replace_table(self, request_id: str, blocks: list[int], num_computed: int, plan: StepPlan) -> None:
        """A request (again) gets its whole table: all from the first block that is not complete will be written to."""
        self._tables[request_id], self._seen[request_id] = list(blocks), 0
        plan.dirty += self.take_back(blocks[num_computed // self._block_size :])

    def _offer(self, request: Any, complete: int, plan: StepPlan) -> None:
        """Offer the blocks of a request that are complete once this step has run, if vLLM agrees on what they hold."""
        request_id, hashes = request.request_id, request.block_hashes
        table = self._tables.get(request_id, [])
        end = min(complete, len(hashes), len(table))
        if table and table[0] in self._void:
            return
        first = self._seen.get(request_id, 0)
        # A prompt may have a thousand blocks and is waited for: comparisons are of whole lists where they can be.
        blocks = table[first:end]
        if not self._void.isdisjoint(blocks):
            blocks = blocks[: next(i for i, block in enumerate(blocks) if block in self._void)]
        pool = self._pool.blocks
        held = [pool[block].block_hash for block in blocks]
        final = [bytes(hash_) + GROUP_SUFFIX for hash_ in hashes[first : first + len(blocks)]]
        if held != final:  # not after this step (speculation, sampling under way): look again in the next one
            blocks = blocks[: next(i for i, hash_ in enumerate(final) if held[i] != hash_)]
        if not blocks:
            return
        end = self._seen[request_id] = first + len(blocks)
        keys = block_keys(hashes[:end], first, self.seal) if len(blocks) > 1 else [block_key(hashes, first, self.seal)]
        offered = self._offered
        if [*map(offered.get, blocks)] == keys:  # a local hit
            return
        for index, (key, block) in enumerate(zip(keys, blocks, strict=True), first):
            if offered.get(block) != key:
                offered[block] = key
                if self._keeps:
                    self._parents[block] = block_key(hashes, index - 1, self.seal) if index else None
                plan.publish.append((key, block))


def _targets(copies: Any) -> list[int]:
    """Return the block ids that a copy-on-write entry writes to."""
    target = copies[1] if isinstance(copies, tuple | list) else getattr(copies, "dst", ())
    return [target] if isinstance(target, int) else list(target)
