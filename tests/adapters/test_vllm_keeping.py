"""What a small engine overwrites stays published from an arena of copies: for others, and for itself."""

import pytest

from kvmarket.testing.tiny_models import random_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

BLOCK, PAGE_BYTES = 32, 64 << 10
PROMPT_BLOCKS = 12
ANSWER_TOKENS = 8
ENGINE_BLOCKS, KEPT_BLOCKS = 40, 200
HOST = "vllm:kvmarket_tier_bytes{tier=host}"
ENGINE = "vllm:kvmarket_tier_bytes{tier=engine}"
LOADED = PROMPT_BLOCKS * BLOCK


def small(blocks=ENGINE_BLOCKS, **extra):
    return {
        "kv_cache_bytes": blocks * PAGE_BYTES,
        "max_model_len": 1024,
        "max_batched_tokens": 1024,
        "extra": extra,
    }


@pytest.fixture(scope="module")
def replicas(fleet):
    """One that keeps what it overwrites, and one that fetches."""
    return fleet.start_all(small(keep_bytes=KEPT_BLOCKS * PAGE_BYTES), small(200))


def prompts(first_seed, count=8):
    return [random_prompt(LOADED + 10, seed=first_seed + i) for i in range(count)]


def compute(replica, asked):
    answers = replica.generate(asked, max_tokens=ANSWER_TOKENS)
    replica.call("vllm_faults:flush")
    return answers


def tokens(answers):
    return [answer.tokens for answer in answers]


def test_what_was_overwritten_is_fetched_from_the_arena(replicas, truth):
    keeper, reader = replicas
    asked = prompts(9000)
    right = truth.begin_generate(asked, max_tokens=ANSWER_TOKENS)
    computed = compute(keeper, asked)  # three prompts fit: the first five are overwritten
    kept = keeper.call("vllm_faults:flush_kept")
    assert kept["arena_resident_bytes"] >= 4 * PROMPT_BLOCKS * PAGE_BYTES
    assert keeper.counters()["vllm:kvmarket_blocks_kept"] >= 4 * PROMPT_BLOCKS

    fetched = reader.generate(asked[:4], max_tokens=ANSWER_TOKENS)
    counters = reader.counters()
    again = keeper.generate(asked[:4], max_tokens=ANSWER_TOKENS)
    right = tokens(right.result(timeout_s=60))

    assert tokens(computed) == right
    assert tokens(fetched) == tokens(again) == right[:4]
    assert [answer.external_tokens for answer in fetched] == [LOADED] * 4
    assert [answer.external_tokens for answer in again] == [LOADED] * 4
    assert counters[HOST] == 4 * PROMPT_BLOCKS * PAGE_BYTES
    assert counters.get(ENGINE, 0) == 0
    assert counters["vllm:kvmarket_blocks_verified"] == 4 * PROMPT_BLOCKS
    assert keeper.counters()[HOST] >= 3 * PROMPT_BLOCKS * PAGE_BYTES
    assert keeper.counters()["vllm:kvmarket_errors"] == 0
    assert keeper.counters().get("vllm:kvmarket_arena_evicted{reason=capacity}", 0) == 0


def test_a_copy_that_is_not_what_was_announced_is_refused(replicas, truth):
    """The copy is announced with the digest that the block had: what was damaged since then is adopted by nobody."""
    keeper, reader = replicas
    asked = prompts(9100, 6)
    compute(keeper, asked[:1])
    keeper.call("vllm_faults:corrupt", index=PROMPT_BLOCKS - 1)
    compute(keeper, asked[1:])
    keeper.call("vllm_faults:flush_kept")
    before = reader.counters()
    (fetched,) = reader.generate(asked[:1], max_tokens=ANSWER_TOKENS)
    after = reader.counters()
    assert fetched.tokens == truth.generate(asked[:1], max_tokens=ANSWER_TOKENS)[0].tokens
    name = "vllm:kvmarket_blocks_refused{reason=digest_mismatch}"
    assert after.get(name, 0) - before.get(name, 0) == 1
    name = "vllm:kvmarket_loaded_tokens"
    assert after[name] - before[name] == (PROMPT_BLOCKS - 1) * BLOCK


def test_a_reset_forgets_what_was_kept(replicas, truth):
    keeper, reader = replicas
    asked = prompts(9200, 6)
    compute(keeper, asked)
    keeper.call("vllm_faults:flush_kept")
    assert keeper.reset_prefix_cache(connector=True)
    keeper.generate(prompts(9300, 1), max_tokens=1)
    assert keeper.call("vllm_faults:flush_kept")["arena_resident_bytes"] == 0
    (answer,) = reader.generate(asked[:1], max_tokens=ANSWER_TOKENS)
    assert answer.external_tokens == 0
    assert answer.tokens == truth.generate(asked[:1], max_tokens=ANSWER_TOKENS)[0].tokens


def test_a_keeper_that_is_killed_is_a_miss(replicas, truth):
    keeper, reader = replicas
    asked = prompts(9400, 6)
    compute(keeper, asked)
    keeper.call("vllm_faults:flush_kept")
    keeper.kill()
    keeper.wait_exit()
    (answer,) = reader.generate(asked[:1], max_tokens=ANSWER_TOKENS)
    assert answer.external_tokens == 0
    assert answer.tokens == truth.generate(asked[:1], max_tokens=ANSWER_TOKENS)[0].tokens


def test_a_replica_that_was_killed_comes_back_with_what_was_on_its_disk(replicas, fleet, truth, tmp_path):
    """The newest blocks of its log are published again from its arena; another replica fetches them, too."""
    disk = {"keep_bytes": KEPT_BLOCKS * PAGE_BYTES, "disk_bytes": 64 << 20, "disk_dir": str(tmp_path / "disk")}
    first = fleet.start(**small(**disk))
    asked = prompts(9500, 6)
    compute(first, asked)
    first.call("vllm_faults:flush_kept")
    first.kill()
    first.wait_exit()
    second = fleet.start(**small(**disk))
    second.generate(prompts(9600, 1), max_tokens=1)  # a replica opens its market with its first request
    assert second.call("vllm_faults:promoted", blocks=2 * PROMPT_BLOCKS) >= 2 * PROMPT_BLOCKS
    right = tokens(truth.generate(asked[:2], max_tokens=ANSWER_TOKENS))
    for replica in (replicas[1], second):
        answers = replica.generate(asked[:2], max_tokens=ANSWER_TOKENS)
        assert [answer.external_tokens for answer in answers] == [LOADED] * 2
        assert tokens(answers) == right
