"""Engines of several workers (tensor parallel): each rank fetches its part from the same rank of a peer.

What one rank cannot prove, no rank adopts.
"""

import os
import select
import signal
from functools import partial

import pytest

from kvmarket.testing.shared_prefix import answer
from kvmarket.testing.tiny_models import random_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(240)]

BLOCK = 32
PROMPT_TOKENS = 1600
HIT_BLOCKS = (PROMPT_TOKENS - 1) // BLOCK
ANSWER_TOKENS = 12
RANKS = 2


def of_two_ranks(**options):
    args = {"tensor_parallel_size": RANKS, "distributed_executor_backend": "mp"}
    return {"engine_args": args, "prepare": "vllm_ranks:start_quickly", **options}


@pytest.fixture(scope="module")
def replicas(fleet):
    """A publisher, a reader, and one without the connector."""
    return fleet.start_all(of_two_ranks(), of_two_ranks(), of_two_ranks(plain=True))


def in_ranks(replica, name, **arguments):
    return replica.call("vllm_ranks:in_ranks", name, **arguments)


ask = partial(answer, max_tokens=ANSWER_TOKENS)


def publish(publisher, prompt):
    computed = ask(publisher, prompt)
    in_ranks(publisher, "flush")
    return computed


def test_every_rank_fetches_its_own_part_and_tokens_do_not_change(replicas):
    publisher, reader, plain = replicas
    prompt = random_prompt(PROMPT_TOKENS, seed=9700)
    right = ask(plain, prompt)
    computed = publish(publisher, prompt)
    fetched = ask(reader, prompt)
    local = ask(reader, prompt)

    assert right.tokens == computed.tokens == fetched.tokens == local.tokens
    assert fetched.external_tokens == HIT_BLOCKS * BLOCK
    assert local.external_tokens == 0
    assert len({*in_ranks(publisher, "namespace")}) == RANKS
    assert in_ranks(publisher, "namespace") == in_ranks(reader, "namespace")
    counters = reader.counters()
    assert counters["vllm:kvmarket_loads"] == 1
    assert counters["vllm:kvmarket_loaded_tokens"] == HIT_BLOCKS * BLOCK
    assert counters["vllm:kvmarket_blocks_verified"] == HIT_BLOCKS * RANKS
    assert counters["vllm:kvmarket_load_failures"] == counters["vllm:kvmarket_errors"] == 0
    adopted = [rank["blocks_adopted"] for rank in in_ranks(reader, "counters")]
    assert adopted == [HIT_BLOCKS] * RANKS


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_what_one_rank_cannot_prove_no_rank_adopts(replicas, ranks):
    publisher, reader, plain = replicas
    prompt = random_prompt(PROMPT_TOKENS, seed=9710 + sum(ranks) + len(ranks))
    right = ask(plain, prompt)
    publish(publisher, prompt)
    in_ranks(publisher, "corrupt", ranks=ranks, index=12)
    before = reader.counters()
    recomputed = ask(reader, prompt)
    after = reader.counters()

    assert recomputed.tokens == right.tokens
    assert after["vllm:kvmarket_load_failures"] - before["vllm:kvmarket_load_failures"] == len(ranks)
    refused = "vllm:kvmarket_blocks_refused{reason=digest_mismatch}"
    assert after[refused] - before.get(refused, 0) == len(ranks)
    # What was adopted is the part before it, and what follows was computed: a second look finds it right.
    assert ask(reader, prompt).tokens == right.tokens


def test_other_numbers_of_ranks_share_nothing(fleet, replicas, truth):
    publisher, _, _ = replicas
    single = fleet.start()
    prompt = random_prompt(PROMPT_TOKENS, seed=9720)
    publish(publisher, prompt)
    alone = ask(single, prompt)
    single.stop()

    assert alone.external_tokens == 0
    assert alone.tokens == ask(truth, prompt).tokens


def test_a_killed_rank_is_a_miss(fleet, replicas):
    _, reader, plain = replicas
    victim = fleet.start(**of_two_ranks())
    prompt = random_prompt(PROMPT_TOKENS, seed=9730)
    right = ask(plain, prompt)
    publish(victim, prompt)
    rank = os.pidfd_open(in_ranks(victim, "pid")[1])
    signal.pidfd_send_signal(rank, signal.SIGKILL)
    assert select.select([rank], [], [], 10.0)[0]  # until it has ended it is an owner like any other
    os.close(rank)
    missed = ask(reader, prompt)

    assert missed.external_tokens == 0
    assert missed.tokens == right.tokens
    assert reader.counters()["vllm:kvmarket_errors"] == 0
