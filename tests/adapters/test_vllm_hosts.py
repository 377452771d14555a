"""Replicas on two hosts, as far as the network goes: blocks travel through UCX, and no token changes."""

import itertools
import time
from importlib.util import find_spec

import pytest

from kvmarket.testing.networks import DEVICES, hosts_or_skip
from kvmarket.testing.tiny_models import random_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("ucxx") is None, reason="ucxx is not installed")]

BLOCK = 32
PROMPT_TOKENS = 1600
ANSWER_TOKENS = 12
TRIES = 10
SEEDS = itertools.count(9900)
# The two share a kernel, by which UCX would take them for one host; between hosts there is only the wire.
ENVIRON = {
    "KVMARKET_TRANSPORT": "ucx",
    "KVMARKET_FETCH_DEADLINE_S": "10",
    "UCX_TLS": "tcp",
    "VLLM_HOST_IP": "127.0.0.1",
}


@pytest.fixture(scope="module")
def hosts():
    with hosts_or_skip() as names:
        yield names


@pytest.fixture(scope="module")
def pair(hosts, fleet):
    roomy = {"kv_cache_bytes": 192 << 20, "environ": ENVIRON}
    one, other = fleet.start_all(*({**roomy, "network": network} for network in hosts))
    introduce(fleet, one, other)
    introduce(fleet, other, one)
    yield one, other
    fleet.close()  # before their networks go


def introduce(fleet, owner, reader):
    """Let a reader connect: on a busy machine the first attempts may take longer than one may take."""
    for _ in range(TRIES):
        prompt = random_prompt(2 * BLOCK, seed=next(SEEDS))
        fleet.publish(owner, [prompt])
        (answer,) = reader.generate([prompt], max_tokens=1)
        if answer.external_tokens:
            return
        time.sleep(1.0)
    pytest.fail(f"the reader never reached the owner: {reader.log_tail()}")


def tokens(generations):
    return [generation.tokens for generation in generations]


def carried(replica):
    """Return bytes by the way they took."""
    name = "vllm:kvmarket_path_bytes{path="
    found = {key: value for key, value in replica.counters().items() if key.startswith(name)}
    return {key.removeprefix(name).removesuffix("}"): value for key, value in found.items() if value}


@pytest.mark.slow
def test_what_one_host_computed_the_other_fetches_and_no_token_changes(pair, fleet, truth):
    """Both directions, 8 prompts each, every block proven."""
    asked = [[random_prompt(PROMPT_TOKENS, seed=9000 + 100 * turn + i) for i in range(8)] for turn in range(2)]
    right = truth.begin_generate(asked[0] + asked[1], max_tokens=ANSWER_TOKENS)
    for replica, prompts in zip(pair, asked, strict=True):
        fleet.publish(replica, prompts)
    right = right.result(timeout_s=60)
    for turn, (reader, device, prompts) in enumerate(zip(pair[::-1], DEVICES[::-1], asked, strict=True)):
        before = reader.counters()
        fetched = reader.generate(prompts, max_tokens=ANSWER_TOKENS)
        assert tokens(fetched) == tokens(right[8 * turn : 8 * turn + 8])
        loaded = sum(answer.external_tokens for answer in fetched)
        assert min(answer.external_tokens for answer in fetched) >= 0.9 * PROMPT_TOKENS
        counters = reader.counters()
        verified = counters["vllm:kvmarket_blocks_verified"] - before["vllm:kvmarket_blocks_verified"]
        assert counters["vllm:kvmarket_transport_bytes{transport=ucx}"] == counters["vllm:kvmarket_loaded_bytes"] > 0
        assert verified == loaded // BLOCK
        assert counters["vllm:kvmarket_load_failures"] == counters["vllm:kvmarket_errors"] == 0
        assert carried(reader) == {f"am(tcp/{device})": counters["vllm:kvmarket_loaded_bytes"]}


def test_an_owner_that_is_killed_is_recomputed_by_the_other_host(pair, fleet, truth):
    owner, reader = pair
    prompts = [random_prompt(PROMPT_TOKENS, seed=9500 + i) for i in range(2)]
    right = truth.generate(prompts, max_tokens=ANSWER_TOKENS)
    fleet.publish(owner, prompts)
    (fetched,) = reader.generate(prompts[:1], max_tokens=ANSWER_TOKENS)
    owner.kill()
    owner.wait_exit()
    (computed,) = reader.generate(prompts[1:], max_tokens=ANSWER_TOKENS)
    assert fetched.external_tokens >= 0.9 * PROMPT_TOKENS
    assert computed.external_tokens == 0
    assert [fetched.tokens, computed.tokens] == tokens(right)
