"""Loads among everything else that a scheduler does: equal prefixes at once, aborts, preemption, chunks."""

import pytest

from kvmarket.testing.tiny_models import random_prompt

pytestmark = pytest.mark.vllm

BLOCK = 32
PAGE_BYTES = 64 << 10
PROMPT_TOKENS = 1600
HIT_TOKENS = (PROMPT_TOKENS - 1) // BLOCK * BLOCK
ANSWER_TOKENS = 8
LOADS = "vllm:kvmarket_loads"


@pytest.fixture(scope="module")
def pair(fleet):
    return fleet.start_all({}, {})


def test_equal_prefixes_at_once_are_loaded_once(fleet, pair, truth):
    publisher, reader = pair
    prefix = random_prompt(PROMPT_TOKENS, seed=8000)
    asked = [prefix + random_prompt(50, seed=8001 + i) for i in range(3)]
    right = truth.begin_generate(asked, max_tokens=ANSWER_TOKENS)
    fleet.publish(publisher, [prefix])
    before = reader.counters()
    answers = reader.generate(asked, max_tokens=ANSWER_TOKENS, together=True)
    after = reader.counters()

    assert [a.tokens for a in answers] == [a.tokens for a in right.result(timeout_s=60)]
    assert [a.cached_tokens for a in answers] == [PROMPT_TOKENS] * 3
    assert sorted(a.external_tokens for a in answers) == [0, 0, PROMPT_TOKENS]
    assert after[LOADS] - before[LOADS] == 1
    assert after["vllm:kvmarket_loaded_tokens"] - before["vllm:kvmarket_loaded_tokens"] == PROMPT_TOKENS


@pytest.mark.parametrize("whom", ["leader", "follower"])
def test_an_abort_while_a_load_runs(fleet, pair, truth, whom):
    publisher, reader = pair
    prompt = random_prompt(PROMPT_TOKENS, seed=8100 + len(whom))
    right = truth.begin_generate([prompt], max_tokens=ANSWER_TOKENS)
    fleet.publish(publisher, [prompt])
    busy = random_prompt(40, seed=8200)
    answers, held, everything_free = reader.call("vllm_faults:abort_while_loading", prompt=prompt, busy=busy, whom=whom)
    (right,) = right.result(timeout_s=60)
    went_on = "follower" if whom == "leader" else "leader"

    assert held is (whom == "leader")
    assert everything_free
    assert answers[went_on] == right.tokens
    assert whom not in answers
    assert reader.counters()["vllm:kvmarket_errors"] == 0


def test_preempted_requests_answer_the_same(fleet, pair, truth):
    """Two prompts fit while they start, but not while they grow: one is preempted and comes back."""
    publisher, reader = pair
    small = fleet.start(kv_cache_bytes=64 * PAGE_BYTES, max_model_len=1536)
    asked = [random_prompt(800, seed=8300 + i) for i in range(2)]
    right = truth.begin_generate(asked, max_tokens=420)
    fleet.publish(publisher, asked)
    answers = small.generate(asked, max_tokens=420, together=True)
    counters = small.counters()

    assert counters["vllm:num_preemptions"] >= 1
    assert counters[LOADS] >= 2
    assert counters["vllm:kvmarket_errors"] == 0
    right = right.result(timeout_s=60)
    assert [a.tokens for a in answers] == [a.tokens for a in right]
    # What it computed before and after the preemption is offered under the right names.
    small.call("vllm_faults:flush")
    longer = [[*prompt, *answer.tokens[:400]] for prompt, answer in zip(asked, right, strict=True)]
    continued = reader.generate(longer, max_tokens=ANSWER_TOKENS)
    small.close()
    assert [a.tokens for a in continued] == [a.tokens[400 : 400 + ANSWER_TOKENS] for a in right]
    assert max(a.external_tokens for a in continued) > 800  # more than the publisher has


def test_a_prompt_that_outgrows_the_free_blocks_waits_and_is_right(fleet, pair, truth):
    """Loads that cannot be allocated at once are asked for again, and what was found may be gone by then."""
    publisher, _ = pair
    small = fleet.start(kv_cache_bytes=64 * PAGE_BYTES, max_model_len=1536)
    asked = [random_prompt(1000, seed=8400 + i) for i in range(6)]
    right = truth.begin_generate(asked, max_tokens=ANSWER_TOKENS)
    fleet.publish(publisher, asked)
    answers = small.generate(asked, max_tokens=ANSWER_TOKENS, together=True)
    small.close()

    assert [a.tokens for a in answers] == [a.tokens for a in right.result(timeout_s=60)]
    assert [a.external_tokens for a in answers] == [992] * 6
