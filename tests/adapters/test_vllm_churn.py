"""Pages that change hands while peers read them: small KV caches on both sides, and copies torn on purpose.

Nobody verifies digests here: what keeps answers right is the generations alone.
"""

import random

import pytest

from kvmarket.testing.tiny_models import random_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(300)]

BLOCK = 32
PAGE_BYTES = 64 << 10
ANSWER_TOKENS = 6
PROMPTS = 48
FETCHES = 80, 540
ROUNDS_MAX = 240
TORN = "vllm:kvmarket_blocks_refused{reason=torn}"
STALE = "vllm:kvmarket_blocks_refused{reason=stale_generation}"
LOADS = "vllm:kvmarket_loads"


def small(blocks, **options):
    settings = {"max_model_len": 1024, "max_batched_tokens": 1024, "environ": {"KVMARKET_VERIFY": "none"}}
    return {"kv_cache_bytes": blocks * PAGE_BYTES, **settings, **options}


@pytest.fixture(scope="module")
def replicas(fleet):
    """One that computes, one that fetches, and one that fetches without its second look at the generations."""
    return fleet.start_all(small(80), small(64), small(64, role="kv_consumer"))


@pytest.fixture(scope="module")
def prompts():
    """Prompts of 9 to 12 blocks: six times what the computing replica can hold."""
    return [random_prompt(random.Random(seed).randrange(288, 400), seed=4000 + seed) for seed in range(PROMPTS)]


@pytest.fixture(scope="module")
def right(truth, prompts):
    return [answer.tokens for answer in truth.generate(prompts, max_tokens=ANSWER_TOKENS)]


def play(owner, reader, prompts, right, *, until):
    """Have `reader` ask for what `owner` has just computed, while that computes on; return the wrong answers."""
    rng = random.Random(7)
    wrong, answers = [], 0
    recent = rng.sample(range(PROMPTS), 10)
    owner.generate([prompts[i] for i in recent], max_tokens=1)
    for round_number in range(ROUNDS_MAX):
        if until(reader.counters()):
            break
        following = rng.sample(range(PROMPTS), 12)
        busy = owner.begin_generate([prompts[i] for i in following], max_tokens=ANSWER_TOKENS)
        asked = rng.sample(recent[-6:], 6)
        together = round_number % 3 == 2
        got = reader.generate([prompts[i] for i in asked], max_tokens=ANSWER_TOKENS, together=together)
        done = busy.result(timeout_s=60)
        pairs = [*zip(asked, got, strict=True), *zip(following, done, strict=True)]
        wrong += [i for i, answer in pairs if answer.tokens != right[i]]
        answers += len(pairs)
        recent = following
    return wrong, answers


def test_torn_reads_are_caught_and_every_answer_is_right(replicas, prompts, right, at_length):
    fetches = at_length(*FETCHES)
    owner, reader, _ = replicas
    reader.call("vllm_faults:tear_copies", every=4)
    wrong, answers = play(owner, reader, prompts, right, until=lambda now: now[LOADS] >= fetches)
    counters, injected = reader.counters(), reader.call("vllm_faults:torn_copies")
    print(
        f"{answers} answers, {counters[LOADS]} fetches, torn {counters.get(TORN)}, stale {counters.get(STALE)}",
        injected,
    )

    assert wrong == []
    assert counters[LOADS] >= fetches
    assert injected["torn"] >= 10
    assert counters[TORN] >= injected["torn"]
    assert counters["vllm:kvmarket_load_failures"] >= injected["torn"]
    assert counters["vllm:kvmarket_blocks_verified"] == counters["vllm:kvmarket_errors"] == 0
    # It was not all refused: whole prefixes still arrived while pages changed hands around them.
    assert counters["vllm:kvmarket_loaded_tokens"] >= fetches // 2 * 9 * BLOCK
    assert owner.counters()["vllm:kvmarket_blocks_retracted"] >= 3 * fetches


def test_without_the_second_look_answers_are_wrong(replicas, prompts, right):
    """The control: the tears that the other test injects do change tokens where nobody looks for them."""
    owner, _, reader = replicas
    reader.call("vllm_faults:tear_copies", every=1, blind=True)
    torn = []

    def enough(_):
        torn.append(reader.call("vllm_faults:torn_copies")["torn"])
        return torn[-1] >= 12

    wrong, _ = play(owner, reader, prompts, right, until=enough)
    assert torn[-1] >= 12, reader.log_tail()
    assert wrong
    assert reader.counters().get(TORN, 0) == 0
