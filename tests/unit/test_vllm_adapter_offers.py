"""Which blocks are offered and taken back in a step, on hand-made scheduler outputs."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.base")

from kvmarket.identity import sealer
from kvmarket.registry.records import block_key
from kvmarket.secret import Secret
from kvmarket_vllm.messages import StepPlan
from kvmarket_vllm.offers import GROUP_SUFFIX, Offers

BLOCK = 4


class Scheduler:
    """A pool, requests, and the outputs that vLLM's scheduler would give to the connector."""

    def __init__(self, *, enabled=True):
        self.pool = SimpleNamespace(
            blocks=[SimpleNamespace(block_hash=None) for _ in range(32)], cached_block_hash_to_block={}
        )
        self.requests = {}
        self.offers = Offers(BLOCK, enabled=enabled)
        self.offers.bind_pool(self.pool)

    def request(self, name, num_tokens, chain=None):
        hashes = [f"{chain or name}-{i}".encode() for i in range(num_tokens // BLOCK)]
        self.requests[name] = SimpleNamespace(request_id=name, block_hashes=hashes, num_output_tokens=0)

    def cache(self, name, table, num_tokens):
        """Give the full blocks of a table their hashes, as vLLM does when it schedules the tokens that fill them."""
        for block, block_hash in zip(table[: num_tokens // BLOCK], self.requests[name].block_hashes, strict=False):
            self.pool.blocks[block].block_hash = block_hash + GROUP_SUFFIX

    def step(self, *, new=(), cached=(), resumed=(), scheduled=None, **more):
        """`new`: (name, table, computed); `cached`: (name, new blocks or None, computed)."""
        output = SimpleNamespace(
            scheduled_new_reqs=[
                SimpleNamespace(req_id=name, block_ids=(table,), num_computed_tokens=computed)
                for name, table, computed in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[name for name, _, _ in cached],
                new_block_ids=[(blocks,) if blocks is not None else None for _, blocks, _ in cached],
                num_computed_tokens=[computed for _, _, computed in cached],
                resumed_req_ids=set(resumed),
            ),
            num_scheduled_tokens=scheduled or {},
            **more,
        )
        plan = StepPlan()
        self.offers.step(output, self.requests, plan)
        return plan

    def key(self, name, index):
        return block_key(self.requests[name].block_hashes, index)


@pytest.fixture
def scheduler():
    return Scheduler()


def prefill(scheduler, name, table, num_tokens):
    scheduler.request(name, num_tokens)
    scheduler.cache(name, table, num_tokens)
    return scheduler.step(new=[(name, table, 0)], scheduled={name: num_tokens})


def answers(scheduler, name):
    """The step after the one whose output has a request's token."""
    scheduler.requests[name].num_output_tokens += 1
    return scheduler.step(cached=[(name, None, 0)])


def begin_held(scheduler, name="a", table=(5, 6, 7)):
    """A request begins whose first two blocks were loaded."""
    scheduler.request(name, 12)
    scheduler.cache(name, table, 12)
    return scheduler.step(new=[(name, list(table), 8)], scheduled={name: 4})


def test_full_blocks_are_offered_in_the_step_that_completes_them(scheduler):
    plan = prefill(scheduler, "a", [5, 6, 7], 10)
    assert plan.publish == [(scheduler.key("a", 0), 5), (scheduler.key("a", 1), 6)]
    assert plan.dirty == []


def test_a_chunked_prompt_is_offered_piece_by_piece(scheduler):
    scheduler.request("a", 12)
    scheduler.cache("a", [5], 4)
    first = scheduler.step(new=[("a", [5, 6], 0)], scheduled={"a": 6})
    scheduler.cache("a", [5, 6, 7], 12)
    second = scheduler.step(cached=[("a", [7], 6)], scheduled={"a": 6})
    assert [block for _, block in first.publish] == [5]
    assert second.publish == [(scheduler.key("a", 1), 6), (scheduler.key("a", 2), 7)]


def test_decoding_offers_a_block_when_it_is_full(scheduler):
    prefill(scheduler, "a", [5, 6], 7)
    scheduler.requests["a"].block_hashes.append(b"a-1")
    scheduler.cache("a", [5, 6], 8)
    assert scheduler.step(cached=[("a", None, 7)], scheduled={"a": 1}).publish == [(scheduler.key("a", 1), 6)]
    assert scheduler.step(cached=[("a", [8], 8)], scheduled={"a": 1}).publish == []


def test_a_block_is_taken_back_when_another_request_gets_it(scheduler):
    prefill(scheduler, "a", [5, 6], 8)
    scheduler.offers.forget_request("a")
    plan = prefill(scheduler, "b", [6, 9], 8)
    assert plan.dirty == [6]
    assert plan.publish == [(scheduler.key("b", 0), 6), (scheduler.key("b", 1), 9)]
    # 5 still holds what was offered.
    assert scheduler.offers.take_back([5, 6, 9]) == [5, 6, 9]


def test_a_local_hit_is_neither_overwritten_nor_offered_again(scheduler):
    prefill(scheduler, "a", [5, 6], 8)
    scheduler.request("b", 12, chain="a")
    scheduler.cache("b", [5, 6, 7], 12)
    plan = scheduler.step(new=[("b", [5, 6, 7], 8)], scheduled={"b": 4})
    assert plan.dirty == []
    assert plan.publish == [(scheduler.key("b", 2), 7)]


def test_the_block_in_which_computing_begins_is_taken_back(scheduler):
    """A whole prompt that was hit: vLLM computes its last token again, into a block that may be offered."""
    prefill(scheduler, "a", [5, 6], 8)
    scheduler.request("b", 8, chain="a")
    plan = scheduler.step(new=[("b", [5, 6], 7)], scheduled={"b": 1})
    assert plan.dirty == [6]
    assert plan.publish == [(scheduler.key("b", 1), 6)]


def test_a_resumed_request_brings_a_whole_new_table(scheduler):
    prefill(scheduler, "a", [5, 6], 8)
    prefill(scheduler, "b", [6, 7], 8)  # 6 was taken from a, which is preempted
    scheduler.cache("a", [5, 9], 8)
    plan = scheduler.step(cached=[("a", [5, 9], 4)], resumed=["a"], scheduled={"a": 4})
    assert plan.dirty == []
    assert plan.publish == [(scheduler.key("a", 1), 9)]


def test_what_vllm_does_not_vouch_for_waits(scheduler):
    """Speculation or sampling under way: the block has no hash yet, or another one."""
    scheduler.request("a", 8)
    scheduler.cache("a", [5], 4)
    assert [block for _, block in scheduler.step(new=[("a", [5, 6], 0)], scheduled={"a": 8}).publish] == [5]
    scheduler.pool.blocks[6].block_hash = b"something else" + GROUP_SUFFIX
    assert scheduler.step(cached=[("a", None, 8)], scheduled={"a": 1}).publish == []
    scheduler.cache("a", [5, 6], 8)
    assert scheduler.step(cached=[("a", None, 9)], scheduled={"a": 1}).publish == [(scheduler.key("a", 1), 6)]


@pytest.mark.parametrize("more", [{"kv_cache_block_copies": [(5, 6)]}, {"new_block_ids_to_zero": [6]}])
def test_copies_and_zeroing_take_back_their_targets(scheduler, more):
    prefill(scheduler, "a", [5, 6], 8)
    assert scheduler.step(**more).dirty == [6]


def test_a_consumer_offers_nothing():
    assert prefill(Scheduler(enabled=False), "a", [5, 6], 8).publish == []


def test_a_reset_of_the_pool_is_noticed_once(scheduler):
    assert not scheduler.offers.pool_was_reset()
    scheduler.pool.cached_block_hash_to_block = {}
    assert scheduler.offers.pool_was_reset()
    assert not scheduler.offers.pool_was_reset()


def test_after_a_reset_of_the_pool_equal_blocks_are_offered_again(scheduler):
    prefill(scheduler, "a", [5, 6], 8)
    scheduler.offers.forget_request("a")
    scheduler.offers.clear()
    assert len(prefill(scheduler, "a", [5, 6], 8).publish) == 2


def test_void_blocks_stay_void_until_they_hold_something_else(scheduler):
    prefill(scheduler, "a", [5, 6], 8)
    scheduler.offers.forget_request("a")
    scheduler.offers.void()
    # A hit on them, and what is computed behind them, offers nothing.
    scheduler.request("b", 12, chain="a")
    scheduler.cache("b", [5, 6, 7], 12)
    assert scheduler.step(new=[("b", [5, 6, 7], 8)], scheduled={"b": 4}).publish == []
    assert answers(scheduler, "b").held == []
    # Nor does a chain whose first block was computed anew.
    scheduler.cache("b", [8], 4)
    scheduler.cache("b", [8, 6, 9], 12)
    assert scheduler.step(new=[("b", [8, 6, 9], 8)], scheduled={"b": 4}).publish == []
    assert answers(scheduler, "b").held == [(scheduler.key("b", 0), 8)]
    # With new content they are blocks like any other.
    assert [block for _, block in prefill(scheduler, "c", [5, 6], 8).publish] == [5, 6]


def test_a_request_that_runs_while_everything_is_voided_offers_no_more(scheduler):
    prefill(scheduler, "a", [5, 6], 6)
    scheduler.offers.void()
    scheduler.request("a", 12)
    scheduler.cache("a", [5, 6, 7], 12)
    assert scheduler.step(cached=[("a", [7], 6)], scheduled={"a": 6}).publish == []


def test_a_secret_seals_what_is_offered():
    seal = sealer(Secret("a secret of this test"))
    scheduler = Scheduler()
    scheduler.offers.seal = seal
    scheduler.request("a", 8)
    scheduler.cache("a", [3, 4], 8)
    plan = scheduler.step(new=[("a", [3, 4], 0)], scheduled={"a": 8})
    keys = [key for key, _ in plan.publish]
    assert keys == [block_key(scheduler.requests["a"].block_hashes, index, seal) for index in range(2)]
    assert not set(keys) & {scheduler.key("a", index) for index in range(2)}


def test_what_is_overwritten_can_be_kept(scheduler):
    """With the key of the block before it, and no more once it was forgotten."""
    keeping = Scheduler()
    keeping.offers = Offers(BLOCK, enabled=True, keeps=True)
    keeping.offers.bind_pool(keeping.pool)
    prefill(keeping, "a", [5, 6, 7], 12)
    keeping.offers.forget_request("a")
    assert keeping.offers.overwritten() == []
    prefill(keeping, "b", [7, 5], 8)
    keys = [keeping.key("a", index) for index in range(3)]
    assert keeping.offers.overwritten() == [(keys[2], keys[1], 7), (keys[0], None, 5)]
    keeping.offers.take_back([6])
    keeping.offers.void()
    assert keeping.offers.overwritten() == []
    prefill(scheduler, "a", [5, 6, 7], 12)
    scheduler.offers.take_back([5])
    assert scheduler.offers.overwritten() == [], "nothing is remembered where nothing is kept"


# ---- what a request finds in its blocks when it begins


def test_loaded_blocks_are_offered_when_the_first_token_is_out_and_computed_ones_at_once(scheduler):
    plan = begin_held(scheduler)
    assert (plan.publish, plan.held) == ([(scheduler.key("a", 2), 7)], [])
    plan = scheduler.step(cached=[("a", None, 12)], scheduled={"a": 1})  # asynchronous: its token is not known yet
    assert (plan.publish, plan.held) == ([], [])
    plan = answers(scheduler, "a")
    assert (plan.publish, plan.held) == ([], [(scheduler.key("a", 0), 5), (scheduler.key("a", 1), 6)])
    assert answers(scheduler, "a").held == [], "once"
    assert scheduler.offers.take_back([5, 6, 7]) == [5, 6, 7]


def test_a_prompt_that_is_computed_in_chunks_offers_what_was_loaded_behind_its_last(scheduler):
    scheduler.request("a", 20)
    scheduler.cache("a", [5, 6, 7, 8], 16)
    assert scheduler.step(new=[("a", [5, 6, 7, 8], 8)], scheduled={"a": 4}).publish == [(scheduler.key("a", 2), 7)]
    plan = scheduler.step(cached=[("a", None, 12)], scheduled={"a": 4})
    assert (plan.publish, plan.held) == ([(scheduler.key("a", 3), 8)], [])
    assert [block for _, block in answers(scheduler, "a").held] == [5, 6]


@pytest.mark.parametrize("told", ["in this step", "in one before"])
def test_a_request_that_is_over_has_what_was_loaded_for_it_offered(scheduler, told):
    begin_held(scheduler)
    if told == "in this step":
        plan = scheduler.step(finished_req_ids={"a"})
    else:
        scheduler.offers.forget_request("a")
        plan = scheduler.step()
    assert [block for _, block in plan.held] == [5, 6]
    assert scheduler.step(finished_req_ids={"a"}).held == []


def test_loaded_blocks_that_hold_something_else_by_then_are_not_offered(scheduler):
    begin_held(scheduler)
    scheduler.request("b", 4)
    scheduler.cache("b", [6], 4)
    plan = scheduler.step(new=[("b", [6], 0)], scheduled={"b": 4}, finished_req_ids={"a"})
    assert plan.publish == [(scheduler.key("b", 0), 6)]
    assert plan.held == [(scheduler.key("a", 0), 5)]


def test_a_loaded_block_that_a_step_computes_again_is_offered_as_computed(scheduler):
    begin_held(scheduler)
    scheduler.request("b", 8, chain="a")
    plan = scheduler.step(new=[("b", [5, 6], 7)], scheduled={"b": 1}, finished_req_ids={"a"})
    assert plan.publish == [(scheduler.key("a", 1), 6)]
    assert plan.held == [(scheduler.key("a", 0), 5)]


def test_loaded_blocks_are_void_when_all_is_though_their_request_is_over(scheduler):
    """They were neither offered nor in the table of a request when it came, and vLLM has them cached still."""
    begin_held(scheduler)
    scheduler.offers.forget_request("a")
    scheduler.offers.void()
    assert scheduler.step().held == []
    scheduler.request("b", 8, chain="a")
    scheduler.step(new=[("b", [5, 6], 8)], scheduled={"b": 1})
    assert answers(scheduler, "b").held == []


def test_loaded_blocks_are_not_offered_when_the_pool_was_reset(scheduler):
    begin_held(scheduler)
    scheduler.offers.clear()
    assert answers(scheduler, "a").held == []
    begin_held(scheduler, "b", (8, 9, 10))
    scheduler.offers.forget_request("b")
    scheduler.offers.clear()
    assert scheduler.step().held == []


def test_a_request_that_is_preempted_while_it_holds_loaded_blocks(scheduler):
    begin_held(scheduler)
    scheduler.cache("a", [5, 8, 9], 12)
    plan = scheduler.step(cached=[("a", [5, 8, 9], 4)], resumed=["a"], scheduled={"a": 8})
    assert (plan.publish, plan.held) == ([(scheduler.key("a", 1), 8), (scheduler.key("a", 2), 9)], [])
    assert answers(scheduler, "a").held == [(scheduler.key("a", 0), 5)]


def test_a_consumer_puts_nothing_off():
    scheduler = Scheduler(enabled=False)
    begin_held(scheduler)
    assert not scheduler.offers._held
    assert answers(scheduler, "a").held == []
