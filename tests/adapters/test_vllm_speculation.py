"""Generated tokens are shared, too, and of speculated ones only those that were accepted."""

import pytest

from kvmarket.testing.tiny_models import random_prompt

pytestmark = pytest.mark.vllm

BLOCK = 32
GUESSES = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
ENGINES = {"plain": {}, "speculation": {"speculative_config": GUESSES}}


@pytest.mark.parametrize("engine_args", ENGINES.values(), ids=ENGINES.keys())
def test_generated_blocks_are_those_of_the_tokens_that_were_kept(fleet, truth, engine_args):
    publisher, reader = fleet.start_all({"engine_args": engine_args}, {"engine_args": engine_args})
    repeated = random_prompt(20, seed=9000) * 8  # so that guesses are made, some of them right
    prompts = [repeated + random_prompt(7, seed=9001 + i) for i in range(4)]
    first = truth.generate(prompts, max_tokens=150)
    published = fleet.publish(publisher, prompts, max_tokens=150, together=True)
    assert [answer.tokens for answer in published] == [answer.tokens for answer in first]
    if "speculative_config" in engine_args:
        counters = publisher.counters()
        guessed, kept = (counters[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
        assert 0 < kept < guessed

    turns = [prompt + list(answer.tokens) + [5, 6, 7] for prompt, answer in zip(prompts, first, strict=True)]
    answers = reader.generate(turns, max_tokens=30, together=True)
    right = truth.generate(turns, max_tokens=30)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in right]
    # All blocks that were full when the last token but one had been computed.
    full = (len(prompts[0]) + 150 - 2) // BLOCK * BLOCK
    assert min(answer.cached_tokens for answer in answers) >= full - BLOCK
    assert sum(answer.external_tokens for answer in answers) >= 4 * (full - BLOCK) - 3 * 160
    assert reader.counters()["vllm:kvmarket_errors"] == 0
