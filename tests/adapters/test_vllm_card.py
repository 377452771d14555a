"""Real engines whose KV cache passes for a card's memory: what the connector does on a GPU, without one.

See tests/gpu/test_vllm.py for the real thing.
"""

import pytest

from kvmarket.testing.tiny_models import random_prompt

pytestmark = pytest.mark.vllm

PROMPT_TOKENS, HIT_TOKENS, BLOCK = 800, 768, 32
ANSWER_TOKENS = 8
CARD = {"prepare": "card_on_host:install"}


@pytest.fixture(scope="module")
def pair(fleet):
    return fleet.start_all(CARD, CARD)


def prompts(count, first_seed):
    return [random_prompt(PROMPT_TOKENS, seed=first_seed + i) for i in range(count)]


def tokens(answers):
    return [answer.tokens for answer in answers]


def test_blocks_go_from_card_to_card_and_tokens_do_not_change(fleet, pair, truth):
    publisher, reader = pair
    asked = prompts(4, 8100)
    right = truth.generate(asked, max_tokens=ANSWER_TOKENS)
    fleet.publish(publisher, asked)
    fetched = reader.generate(asked, max_tokens=ANSWER_TOKENS)

    assert [answer.external_tokens for answer in fetched] == [HIT_TOKENS] * 4
    assert tokens(fetched) == tokens(right)
    reader.call("vllm_faults:flush")
    assert reader.call("vllm_faults:offered") >= 4 * HIT_TOKENS // BLOCK  # what it fetched others can fetch from it
    counters = reader.counters()
    assert counters["vllm:kvmarket_transport_bytes{transport=cuda_ipc}"] == counters["vllm:kvmarket_loaded_bytes"] > 0
    assert counters["vllm:kvmarket_path_bytes{path=kernel(cuda_ipc)}"] == counters["vllm:kvmarket_loaded_bytes"]
    assert counters["vllm:kvmarket_blocks_verified"] == 4 * HIT_TOKENS // BLOCK
    assert counters["vllm:kvmarket_load_failures"] == counters["vllm:kvmarket_errors"] == 0
    assert reader.call("card_on_host:seen")["loaded_behind"] == 4
    assert publisher.call("card_on_host:seen")["published_behind"] >= 4


def test_the_time_of_hooks_is_counted_step_by_step_and_told(pair):
    publisher, _ = pair
    before = publisher.call("kvmarket_vllm.inspect:hook_times")
    publisher.generate(prompts(1, 8900), max_tokens=64)
    after = publisher.call("kvmarket_vllm.inspect:hook_times")
    counters = publisher.counters()
    assert set(after) == {"scheduler", "worker"}
    for role, (steps, seconds) in after.items():
        assert 64 <= steps - before[role][0] <= 70
        assert 0 < seconds - before[role][1] < 5
        assert 0 < counters[f"vllm:kvmarket_hook_steps{{role={role}}}"] <= steps
        assert 0 < counters[f"vllm:kvmarket_hook_seconds{{role={role}}}"] <= seconds


def test_blocks_are_readable_only_when_their_kernels_have_ended(fleet, pair, truth):
    publisher, reader = pair
    (asked,) = prompts(1, 8200)
    right = truth.generate([asked], max_tokens=ANSWER_TOKENS)
    readable = publisher.call("vllm_faults:readable")
    publisher.call("card_on_host:hold")
    publisher.generate([asked], max_tokens=1)
    assert publisher.call("vllm_faults:readable") <= readable
    early = reader.generate([asked[: PROMPT_TOKENS // 2]], max_tokens=1)
    assert early[0].external_tokens == 0
    publisher.call("card_on_host:release")
    publisher.call("vllm_faults:flush")
    (fetched,) = reader.generate([asked], max_tokens=ANSWER_TOKENS)
    assert fetched.external_tokens == HIT_TOKENS - PROMPT_TOKENS // 2 // BLOCK * BLOCK
    assert tokens([fetched]) == tokens(right)


def test_blocks_overwritten_before_their_kernels_ended_stay_unreadable(fleet, pair, truth):
    """The publisher's cache is far too small for what it computes while no kernel ends."""
    _, reader = pair
    publisher = fleet.start(**CARD, kv_cache_bytes=3 << 20, max_model_len=1024, max_batched_tokens=1024)
    asked = prompts(3, 8300)
    right = truth.generate(asked, max_tokens=ANSWER_TOKENS)
    publisher.call("card_on_host:hold")
    publisher.generate(asked, max_tokens=1)
    publisher.call("card_on_host:release")
    publisher.call("vllm_faults:flush")
    assert 0 < publisher.call("vllm_faults:readable") <= 48
    fetched = reader.generate(asked, max_tokens=ANSWER_TOKENS)
    assert tokens(fetched) == tokens(right)
    assert fetched[0].external_tokens == 0
    assert fetched[-1].external_tokens == HIT_TOKENS
    publisher.stop()


def test_a_reset_and_a_killed_owner_are_misses(fleet, pair, truth):
    owner, reader = pair
    asked = prompts(3, 8400)
    right = truth.generate(asked, max_tokens=ANSWER_TOKENS)
    fleet.publish(owner, asked[:2])
    assert reader.reset_prefix_cache(connector=True)
    (fetched,) = reader.generate(asked[:1], max_tokens=ANSWER_TOKENS)
    assert (fetched.external_tokens, fetched.tokens) == (0, right[0].tokens)
    owner.reset_prefix_cache(connector=True)
    fleet.publish(owner, asked[1:])
    owner.kill()
    owner.wait_exit()
    fetched = reader.generate(asked[1:], max_tokens=ANSWER_TOKENS)
    assert [answer.external_tokens for answer in fetched] == [0, 0]
    assert tokens(fetched) == tokens(right[1:])
