"""Wrong bytes do not travel on: a replica that adopts without comparing digests cannot vouch for what it offers."""

import pytest

from kvmarket.testing.tiny_models import random_prompt

pytestmark = pytest.mark.vllm

BLOCK = 32
PROMPT_TOKENS = 1600
HIT_TOKENS = (PROMPT_TOKENS - 1) // BLOCK * BLOCK
UNVERIFIED = "vllm:kvmarket_misses{reason=unverified}"


def test_a_replica_that_verifies_takes_nothing_from_one_that_does_not(fleet, truth):
    """Block 12 is changed at its first owner; a replica in between adopts it, computes more from it, and offers all."""
    trusting = {"environ": {"KVMARKET_VERIFY": "none"}}
    origin, between, careful, careless = fleet.start_all({}, trusting, {}, trusting)
    prompt = random_prompt(PROMPT_TOKENS, seed=6100)
    longer = prompt + random_prompt(300, seed=6101)
    right = [answer.tokens for answer in truth.generate([prompt, longer], max_tokens=16)]
    fleet.publish(origin, [prompt])
    origin.call("vllm_faults:corrupt", index=12)
    (wrong,) = fleet.publish(between, [longer], max_tokens=16)
    assert wrong.external_tokens == PROMPT_TOKENS
    assert wrong.tokens != right[1]
    origin.stop()

    passed_on = careless.generate([prompt, longer], max_tokens=16)
    assert passed_on[0].external_tokens == HIT_TOKENS, "the replica in between does offer it"
    assert [answer.tokens for answer in passed_on] != right, "and it is wrong"
    answers = careful.generate([prompt, longer], max_tokens=16)
    assert [answer.tokens for answer in answers] == right
    assert [answer.external_tokens for answer in answers] == [0, 0]
    counters = careful.counters()
    assert counters[UNVERIFIED] == 2
    assert counters.get("vllm:kvmarket_errors", 0) == 0
