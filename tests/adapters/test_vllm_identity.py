"""The main job on real engines: what one replica computed another one fetches, and its tokens do not change."""

from itertools import chain

import pytest

from kvmarket.testing.tiny_models import random_prompt

pytestmark = pytest.mark.vllm

BLOCK = 32
PREFIX_TOKENS = 1536
PROMPT_TOKENS = 1600
ANSWER_TOKENS = 12
SHARED = 8, 20


@pytest.fixture(scope="module")
def pair(fleet):
    roomy = {"kv_cache_bytes": 192 << 20}  # nothing is evicted here: that is another test's subject
    return fleet.start_all(roomy, roomy)


def prompts(count, first_seed):
    return [random_prompt(PROMPT_TOKENS, seed=first_seed + i) for i in range(count)]


def tokens(generations):
    return [generation.tokens for generation in generations]


def side_by_side(*work):
    """Have several replicas answer at the same time: each item is a replica and its prompts."""
    pending = [replica.begin_generate(asked, max_tokens=ANSWER_TOKENS) for replica, asked in work]
    return [each.result(timeout_s=60) for each in pending]


@pytest.mark.slow
def test_a_cold_replica_fetches_and_answers_the_same(pair, truth, at_length):
    """Both directions at once, several prompts each."""
    count = at_length(*SHARED)
    one, other = pair
    first, second = prompts(count, 1000), prompts(count, 1100)
    right = truth.begin_generate(first + second, max_tokens=ANSWER_TOKENS)
    computed = [*chain(*side_by_side((one, first), (other, second)))]
    for replica in pair:
        replica.call("vllm_faults:flush")
    before = [replica.counters() for replica in pair]
    fetched = [*chain(*side_by_side((other, first), (one, second)))]
    after = [replica.counters() for replica in pair]
    local = [*chain(*side_by_side((other, first), (one, second)))]
    right = right.result(timeout_s=60)

    assert [answer.external_tokens for answer in computed] == [0] * 2 * count
    assert min(answer.external_tokens for answer in fetched) >= 0.9 * PROMPT_TOKENS
    assert tokens(computed) == tokens(right)
    assert tokens(fetched) == tokens(right)
    assert tokens(local) == tokens(right)
    assert len({answer.tokens for answer in right}) == 2 * count
    grown = [{name: end[name] - start.get(name, 0) for name in end} for start, end in zip(before, after, strict=True)]
    loaded = sum(answer.external_tokens for answer in fetched) // 2
    for counters in grown:
        assert counters["vllm:kvmarket_loaded_tokens"] == counters["vllm:external_prefix_cache_hits"] == loaded
        assert counters["vllm:kvmarket_loads"] == count
        assert counters["vllm:kvmarket_blocks_verified"] == loaded // BLOCK
        assert counters["vllm:kvmarket_transport_bytes{transport=shm}"] == counters["vllm:kvmarket_loaded_bytes"]
        assert counters["vllm:kvmarket_load_failures"] == counters["vllm:kvmarket_errors"] == 0


def test_a_shared_prefix_hits_under_another_tail(fleet, pair, truth):
    publisher, reader = pair
    prefixes = [random_prompt(PREFIX_TOKENS, seed=2000 + i) for i in range(4)]
    one = [prefix + random_prompt(512, seed=2100 + i) for i, prefix in enumerate(prefixes)]
    other = [prefix + random_prompt(512, seed=2200 + i) for i, prefix in enumerate(prefixes)]
    right, *_ = side_by_side((truth, other), (publisher, one))
    publisher.call("vllm_faults:flush")
    fetched = reader.generate(other, max_tokens=ANSWER_TOKENS)

    assert [answer.external_tokens for answer in fetched] == [PREFIX_TOKENS] * 4
    assert tokens(fetched) == tokens(right)
    assert tokens(right) != tokens(publisher.generate(one, max_tokens=ANSWER_TOKENS))


def test_what_was_decoded_is_shared_too(fleet, pair, truth):
    """A conversation goes on elsewhere: the first answer is part of the second prompt."""
    publisher, reader = pair
    question = random_prompt(600, seed=2300)
    (first,) = fleet.publish(publisher, [question], max_tokens=200)
    follow_up = [*question, *first.tokens, *random_prompt(40, seed=2301)]
    (right,) = truth.generate([follow_up], max_tokens=ANSWER_TOKENS)
    (fetched,) = reader.generate([follow_up], max_tokens=ANSWER_TOKENS)

    # The KV of the last token decoded was never computed.
    assert fetched.external_tokens == (600 + 199) // BLOCK * BLOCK
    assert fetched.tokens == right.tokens


def test_a_partial_local_hit_is_extended_by_what_a_peer_has(fleet, pair, truth):
    publisher, reader = pair
    prompt = random_prompt(PROMPT_TOKENS, seed=2400)
    fleet.publish(publisher, [prompt])
    reader.generate([prompt[:400]], max_tokens=1)
    (right,) = truth.generate([prompt], max_tokens=ANSWER_TOKENS)
    (fetched,) = reader.generate([prompt], max_tokens=ANSWER_TOKENS)

    assert fetched.cached_tokens == (PROMPT_TOKENS - 1) // BLOCK * BLOCK
    assert fetched.external_tokens == fetched.cached_tokens - 400 // BLOCK * BLOCK
    assert fetched.tokens == right.tokens


def test_a_prompt_computed_in_chunks_is_shared(fleet, pair, truth):
    """Blocks are offered step by step while a long prompt is computed in pieces that end inside blocks."""
    _, reader = pair
    chunked = fleet.start(max_batched_tokens=200)
    asked = prompts(2, 2500)
    right, computed = side_by_side((truth, asked), (chunked, asked))
    chunked.call("vllm_faults:flush")
    fetched = reader.generate(asked, max_tokens=ANSWER_TOKENS)
    chunked.stop()

    assert tokens(computed) == tokens(right)
    assert [answer.external_tokens for answer in fetched] == [1568] * 2
    assert tokens(fetched) == tokens(right)


def test_several_prompts_at_once(fleet, pair, truth):
    publisher, reader = pair
    asked = prompts(8, 2600)
    right = truth.begin_generate(asked, max_tokens=ANSWER_TOKENS)
    fleet.publish(publisher, asked, together=True)
    right = right.result(timeout_s=60)
    fetched = reader.generate(asked, max_tokens=ANSWER_TOKENS, together=True)

    assert [answer.external_tokens for answer in fetched] == [1568] * 8
    assert tokens(fetched) == tokens(right)


def test_short_and_uneven_prompts(fleet, pair, truth):
    """Shorter than a block, exactly blocks, one token more and one less."""
    publisher, reader = pair
    lengths = [1, 31, 32, 33, 63, 64, 65, 320, 321]
    asked = [random_prompt(length, seed=2700 + length) for length in lengths]
    right = truth.generate(asked, max_tokens=ANSWER_TOKENS)
    fleet.publish(publisher, asked)
    fetched = reader.generate(asked, max_tokens=ANSWER_TOKENS)

    assert [answer.external_tokens for answer in fetched] == [(length - 1) // BLOCK * BLOCK for length in lengths]
    assert tokens(fetched) == tokens(right)
