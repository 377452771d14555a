"""Forgetting: one replica is told that its caches are void, and nobody adopts what was computed before."""

import pytest

from kvmarket.testing.tiny_models import random_prompt

pytestmark = pytest.mark.vllm

PROMPT_TOKENS = 800
HIT_TOKENS = (PROMPT_TOKENS - 1) // 32 * 32
HIT_BLOCKS = HIT_TOKENS // 32
ANSWER_TOKENS = 8


@pytest.fixture(scope="module")
def replicas(fleet):
    """Their markets are open: they open with the first request, beside the engine."""
    replicas = fleet.start_all({}, {}, {})
    for number, replica in enumerate(replicas):
        fleet.publish(replica, [random_prompt(100, seed=6900 + number)])
    return replicas


@pytest.fixture
def prompts(request):
    """Prompts that no other test uses."""
    first = 7000 + 100 * sum(map(ord, request.node.name))
    return [random_prompt(PROMPT_TOKENS, seed=first + i) for i in range(5)]


def ask(replica, prompt):
    (answer,) = replica.generate([prompt], max_tokens=ANSWER_TOKENS)
    return answer


def test_a_reset_reaches_every_process_and_an_idle_owner(fleet, replicas, truth, prompts):
    owner, resetter, third = replicas
    right = [answer.tokens for answer in truth.generate(prompts, max_tokens=ANSWER_TOKENS)]
    fleet.publish(owner, prompts[:4])
    assert ask(resetter, prompts[0]).external_tokens == ask(third, prompts[0]).external_tokens == HIT_TOKENS

    assert resetter.reset_prefix_cache(connector=True)
    # The owner has been idle since. What it published is out of reach for the one and for the other.
    for replica, index in ((resetter, 1), (third, 2)):
        answer = ask(replica, prompts[index])
        assert (answer.external_tokens, answer.tokens) == (0, right[index])
    assert resetter.counters()["vllm:kvmarket_resets"] >= 1

    # What is computed from now on is shared again, from the first block on.
    (answer,) = fleet.publish(owner, prompts[4:], max_tokens=ANSWER_TOKENS)
    assert (answer.external_tokens, answer.tokens) == (0, right[4])
    for replica in (resetter, third):
        answer = ask(replica, prompts[4])
        assert (answer.external_tokens, answer.tokens) == (HIT_TOKENS, right[4])
    # The owner serves its own requests from what it has, but that stays void for others: not even a hit renews it.
    (answer,) = fleet.publish(owner, prompts[3:4], max_tokens=ANSWER_TOKENS)
    assert (answer.cached_tokens, answer.tokens) == (HIT_TOKENS, right[3])
    answer = ask(third, prompts[3])
    assert (answer.external_tokens, answer.tokens) == (0, right[3])


def test_a_reset_of_the_owner_itself(fleet, replicas, truth, prompts):
    owner, reader, _ = replicas
    right = [answer.tokens for answer in truth.generate(prompts[:2], max_tokens=ANSWER_TOKENS)]
    fleet.publish(owner, prompts[:2])
    assert owner.reset_prefix_cache(connector=True)
    assert ask(reader, prompts[0]).external_tokens == 0
    (answer,) = fleet.publish(owner, prompts[1:2], max_tokens=ANSWER_TOKENS)
    assert (answer.cached_tokens, answer.tokens) == (0, right[1])
    answer = ask(reader, prompts[1])
    assert (answer.external_tokens, answer.tokens) == (HIT_TOKENS, right[1])


def test_a_fetch_that_a_reset_overtakes_is_void(fleet, replicas, truth, prompts):
    owner, reader, _ = replicas
    right = ask(truth, prompts[0]).tokens
    fleet.publish(owner, prompts[:1])
    before = reader.counters()
    reader.call("vllm_faults:reset_during_copy")
    answer = ask(reader, prompts[0])
    after = reader.counters()

    assert answer.tokens == right
    assert after["vllm:kvmarket_loads"] - before["vllm:kvmarket_loads"] == 1
    assert after["vllm:kvmarket_load_failures"] - before["vllm:kvmarket_load_failures"] == 1
    assert after["vllm:kvmarket_loaded_tokens"] == before["vllm:kvmarket_loaded_tokens"]


def test_a_local_reset_takes_effect_with_the_next_step(fleet, replicas, prompts):
    """vLLM tells no connector of a reset without the connector, yet it may mean new weights."""
    owner, reader, _ = replicas
    fleet.publish(owner, prompts[:2])
    assert ask(reader, prompts[0]).external_tokens == HIT_TOKENS
    assert owner.call("vllm_faults:readable") >= 2 * HIT_BLOCKS

    assert owner.reset_prefix_cache(connector=False)
    fleet.publish(owner, [prompts[2][:64]])
    assert owner.call("vllm_faults:readable") == 2
    (answer,) = fleet.publish(reader, prompts[1:2])
    assert answer.external_tokens == 0
    # What others published is none of its business: that needs a reset of the connector.
    assert ask(owner, prompts[1]).external_tokens == HIT_TOKENS


def test_a_reset_before_the_first_request_succeeds(fleet):
    replica = fleet.start()
    assert replica.reset_prefix_cache(connector=True)
    assert ask(replica, random_prompt(100, seed=7999)).external_tokens == 0
    replica.close()
