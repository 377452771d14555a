"""Wrong bytes never reach an answer: pages changed behind the owner's back are found out, and recomputed."""

import pytest

from kvmarket.testing.tiny_models import random_prompt

pytestmark = pytest.mark.vllm

BLOCK = 32
PROMPT_TOKENS = 1600
HIT_BLOCKS = (PROMPT_TOKENS - 1) // BLOCK
ANSWER_TOKENS = 16
MISMATCHES = "vllm:kvmarket_blocks_refused{reason=digest_mismatch}"


@pytest.fixture(scope="module")
def replicas(fleet):
    """A publisher, two readers that verify (the default), and one that trusts generations and publishes nothing."""
    trusting = {"environ": {"KVMARKET_VERIFY": "none"}, "role": "kv_consumer"}
    return fleet.start_all({}, {}, {}, trusting)


def ask(replica, prompt):
    (answer,) = replica.generate([prompt], max_tokens=ANSWER_TOKENS)
    return answer


class Growth:
    """How much a replica's counters grow while this is entered."""

    def __init__(self, replica):
        self._replica = replica

    def __enter__(self):
        self._before = self._replica.counters()
        return self

    def __exit__(self, *_):
        self._after = self._replica.counters()

    def __getitem__(self, name):
        name = name if name.startswith("vllm:") else f"vllm:kvmarket_{name}"
        return self._after.get(name, 0) - self._before.get(name, 0)


def test_the_test_has_teeth_and_verification_draws_them(fleet, replicas, truth):
    publisher, careful, _, trusting = replicas
    prompt = random_prompt(PROMPT_TOKENS, seed=3000)
    right = ask(truth, prompt).tokens
    fleet.publish(publisher, [prompt])
    publisher.call("vllm_faults:corrupt", index=12)
    with Growth(trusting) as trusted:
        wrong = ask(trusting, prompt)
    with Growth(careful) as refused:
        answer = ask(careful, prompt)

    assert wrong.external_tokens == HIT_BLOCKS * BLOCK
    assert wrong.tokens != right
    assert trusted["load_failures"] == trusted["blocks_verified"] == trusted["blocks_offered"] == 0
    assert answer.tokens == right
    assert refused[MISMATCHES] == refused["load_failures"] == 1
    assert refused["loaded_tokens"] == 12 * BLOCK
    assert refused["errors"] == 0


@pytest.mark.parametrize("index", [0, 1, HIT_BLOCKS // 2, HIT_BLOCKS - 1])
def test_a_bad_block_costs_the_blocks_after_it(fleet, replicas, truth, index):
    publisher, reader, _, _ = replicas
    prompt = random_prompt(PROMPT_TOKENS, seed=3100 + index)
    right = ask(truth, prompt).tokens
    fleet.publish(publisher, [prompt])
    publisher.call("vllm_faults:corrupt", index=index)
    with Growth(reader) as growth:
        answer = ask(reader, prompt)
    again = ask(reader, prompt)

    assert answer.tokens == right
    assert growth["loads"] == growth["load_failures"] == growth[MISMATCHES] == 1
    assert growth["loaded_tokens"] == index * BLOCK
    assert (again.cached_tokens, again.external_tokens) == (HIT_BLOCKS * BLOCK, 0)
    assert again.tokens == right


def test_a_bad_first_block_after_a_local_hit(fleet, replicas, truth):
    """The first block that is fetched is bad, but it is not the request's first: the local hit is kept."""
    publisher, reader, _, _ = replicas
    prompt = random_prompt(PROMPT_TOKENS, seed=3200)
    right = ask(truth, prompt).tokens
    ask(reader, prompt[:330])
    fleet.publish(publisher, [prompt])
    publisher.call("vllm_faults:corrupt", index=10)
    with Growth(reader) as growth:
        answer = ask(reader, prompt)

    assert answer.tokens == right
    assert growth["load_failures"] == growth[MISMATCHES] == 1
    assert growth["loaded_tokens"] == 0


def test_another_owner_steps_in_for_a_bad_block(fleet, replicas, truth):
    publisher, reader, second_owner, _ = replicas
    prompt = random_prompt(PROMPT_TOKENS, seed=3300)
    right = ask(truth, prompt).tokens
    fleet.publish(publisher, [prompt])
    assert ask(second_owner, prompt).external_tokens == HIT_BLOCKS * BLOCK
    second_owner.call("vllm_faults:flush")
    publisher.call("vllm_faults:corrupt", index=20)
    with Growth(reader) as growth:
        answer = ask(reader, prompt)

    assert answer.tokens == right
    assert growth["loaded_tokens"] == HIT_BLOCKS * BLOCK
    assert growth["load_failures"] == 0
    assert growth[MISMATCHES] <= 1  # none if the second owner was asked first


def test_bad_blocks_of_several_prompts_at_once(fleet, replicas, truth):
    publisher, reader, _, _ = replicas
    asked = [random_prompt(PROMPT_TOKENS, seed=3400 + i) for i in range(4)]
    right = truth.begin_generate(asked, max_tokens=ANSWER_TOKENS)
    for index, prompt in zip((0, 7, 40), asked, strict=False):
        fleet.publish(publisher, [prompt])
        publisher.call("vllm_faults:corrupt", index=index)
    fleet.publish(publisher, asked[3:])
    with Growth(reader) as growth:
        answers = reader.generate(asked, max_tokens=ANSWER_TOKENS, together=True)

    assert [a.tokens for a in answers] == [a.tokens for a in right.result(timeout_s=60)]
    assert growth["loads"] == 4
    assert growth["load_failures"] == growth[MISMATCHES] == 3
    assert growth["loaded_tokens"] == (0 + 7 + 40 + HIT_BLOCKS) * BLOCK
