"""What the scheduler role plans, step by step, without an engine."""

import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.distributed.kv_transfer.kv_connector.v1.metrics")

from kvmarket.config import MarketConfig
from kvmarket.testing.waiting import until
from kvmarket_vllm.messages import Load, StepPlan
from kvmarket_vllm.offers import GROUP_SUFFIX
from kvmarket_vllm.scheduler import SchedulerRole

RANK = (0, 0)


def scheduling(core, number_of_blocks):
    """A scheduler role with one request of 16 tokens, in blocks of 4, and the output of the step that computes it."""
    engine = SimpleNamespace(cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"))
    role = SchedulerRole(engine, MarketConfig(), 4, fetches=True, publishes=True)
    role._opening = SimpleNamespace(get=lambda: {RANK: core}, failed=False)
    hashes = [bytes([number]) * 32 for number in range(number_of_blocks)]
    request = SimpleNamespace(request_id="a", block_hashes=hashes, num_tokens=17, num_output_tokens=0)
    blocks = [SimpleNamespace(block_hash=block_hash + GROUP_SUFFIX) for block_hash in hashes]
    role.bind_pool(SimpleNamespace(blocks=blocks, cached_block_hash_to_block=None))
    output = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id="a", block_ids=([0, 1, 2, 3],), num_computed_tokens=0)],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[]),
        num_scheduled_tokens={"a": 16},
        total_num_scheduled_tokens=16,
        finished_req_ids=(),
    )
    return role, request, output


def goes_on(output, computed, new_blocks=None):
    """Make `output` that of a step in which the request goes on."""
    output.scheduled_new_reqs = []
    output.scheduled_cached_reqs = SimpleNamespace(
        req_ids=["a"], new_block_ids=[new_blocks], num_computed_tokens=[computed]
    )


@pytest.fixture
def decoding():
    """A role whose one request was computed, and what plans a step that decodes on."""
    role, request, output = scheduling(SimpleNamespace(epoch_hint=lambda: 1), 6)
    role._requests["a"] = request
    first = role.plan_step(output)
    assert not first.quiet
    assert len(first.publish) == 4
    output.num_scheduled_tokens, output.total_num_scheduled_tokens = {"a": 1}, 1

    def step(computed, new_blocks=None):
        goes_on(output, computed, new_blocks)
        return role.plan_step(output)

    return role, step


def test_a_step_is_quiet_only_if_a_worker_has_nothing_to_do(decoding):
    role, step = decoding
    plan = step(16, ([4],))
    assert plan.quiet, "a new block that nobody was offered changes nothing"
    assert step(17).quiet
    plan = step(19)
    assert (plan.quiet, len(plan.publish)) == (False, 1), "a block is complete"
    assert step(20, ([5],)).quiet
    plan = step(21, ([2],))
    assert (plan.quiet, plan.dirty) == (False, [2]), "vLLM writes to what was offered"
    assert step(22).quiet
    role._plan.dirty.append(3)
    assert not step(22).quiet, "what an allocation took back before the step"
    role._plan.loads.append(Load("b", [1], {}))
    assert not step(22).quiet
    role._plan.forget = True
    assert not step(22).quiet
    assert not StepPlan(held=[(b"key", 1)]).quiet


def test_while_a_reset_is_owed_nothing_is_fetched_or_offered():
    go_on = threading.Event()
    core = SimpleNamespace(bump_epoch=lambda: go_on.wait(10), epoch_hint=lambda: 1)
    role, request, output = scheduling(core, 4)

    began = time.monotonic()
    assert not role.reset()
    assert time.monotonic() - began < 1.0
    assert not role.reset(), "nor does asking again make it so"
    assert role.match(request, 0) == (0, False)
    plan = role.plan_step(output)
    assert (plan.publish, plan.forget) == ([], True)
    go_on.set()
    until(role._cores, "both resets are made")
    assert role.deltas.totals["resets"] == 2
    goes_on(output, 16)
    plan = role.plan_step(output)
    assert plan.forget, "workers begin in the new epoch"
    assert plan.publish == [], "what was computed before it is not offered"


@pytest.fixture
def holding():
    """A role whose one request began with two blocks loaded and has its first token, the next output, and the core."""
    core = SimpleNamespace(epoch_hint=lambda: 1, bump_epoch=lambda: None)
    role, request, output = scheduling(core, 4)
    role._requests["a"] = request
    output.scheduled_new_reqs[0].num_computed_tokens, output.num_scheduled_tokens = 8, {"a": 8}
    plan = role.plan_step(output)
    assert ([block for _, block in plan.publish], plan.held) == ([2, 3], [])
    goes_on(output, 16)
    output.num_scheduled_tokens, request.num_output_tokens = {"a": 1}, 1
    return role, output, core


def test_the_step_behind_a_first_token_offers_what_was_loaded(holding):
    role, output, _ = holding
    plan = role.plan_step(output)
    assert (plan.publish, [block for _, block in plan.held], plan.quiet) == ([], [0, 1], False)


def test_a_request_with_one_token_has_what_was_loaded_offered_in_the_step_that_says_so(holding):
    role, output, _ = holding
    role._requests["a"].num_output_tokens = 0
    goes_on(output, 16)
    output.scheduled_cached_reqs = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[])
    output.num_scheduled_tokens, output.total_num_scheduled_tokens, output.finished_req_ids = {}, 0, {"a"}
    plan = role.plan_step(output)
    assert ([block for _, block in plan.held], plan.idle) == ([0, 1], True)
    output.finished_req_ids = ()
    assert role.plan_step(output).quiet


@pytest.mark.parametrize("how", ["by another process", "here", "owed"])
def test_what_was_loaded_is_not_offered_once_all_was_to_be_forgotten(holding, how):
    role, output, core = holding
    if how == "by another process":
        core.epoch_hint = lambda: 2
    elif how == "here":
        assert role.reset()
    else:
        role._resets.owe()
        role._resets.go_on = lambda cores: False
    plan = role.plan_step(output)
    assert (plan.held, plan.publish) == ([], [])
    assert plan.forget or how == "owed"
    assert role._offers.take_back([0, 1, 2, 3]) == []
