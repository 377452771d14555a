"""vLLM replicas over a registry server: they share, and go on while it is away, hangs or has lost everything."""

import time

import pytest

pytest.importorskip("redis", reason="the extra 'redis' is not installed")

from kvmarket.testing.redis_server import WHERE_FROM, RedisServer, find_server
from kvmarket.testing.tiny_models import random_prompt

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_server() is None, reason=WHERE_FROM),
]

PROMPT_TOKENS = 800
ANSWER_TOKENS = 4
LEASE_S = 3.0
BACK_WITHIN_S = 30.0
TOKENS = "vllm:kvmarket_loaded_tokens"
AWAY = "vllm:kvmarket_misses{reason=registry_unavailable}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def replicas(fleet, server):
    environ = {"KVMARKET_REGISTRY": f"{server.url}?lease_s={LEASE_S}&timeout_s=1"}
    return fleet.start_all({"environ": environ}, {"environ": environ})


@pytest.fixture
def prompts():
    """New ones for every test."""
    seed = time.monotonic_ns() % 2**31
    return [random_prompt(PROMPT_TOKENS, seed=seed + number) for number in range(4)]


@pytest.fixture
def right(truth, prompts):
    return [answer.tokens for answer in truth.generate(prompts, max_tokens=ANSWER_TOKENS)]


def ask(replica, prompts):
    return [answer.tokens for answer in replica.generate(prompts, max_tokens=ANSWER_TOKENS)]


def loaded(replica):
    return replica.counters().get(TOKENS, 0)


def test_what_one_computes_the_other_loads(fleet, replicas, prompts, right):
    owner, reader = replicas
    fleet.publish(owner, prompts)
    before = loaded(reader)
    assert ask(reader, prompts) == right
    assert loaded(reader) - before >= len(prompts) * (PROMPT_TOKENS - 64)


def test_a_reset_reaches_the_other_replica(fleet, replicas, prompts, right):
    owner, reader = replicas
    fleet.publish(owner, prompts)
    assert owner.reset_prefix_cache(connector=True)
    before = loaded(reader)
    assert ask(reader, prompts) == right
    assert loaded(reader) == before


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_answers_stay_right_while_the_server_is_away_and_shared_when_it_is_back(replicas, server, prompts, right, how):
    owner, reader = replicas
    owner.generate(prompts[:2], max_tokens=1)
    owner.call("vllm_faults:flush")
    before, missed = loaded(reader), reader.counters().get(AWAY, 0)
    server.kill() if how == "killed" else server.stop()
    try:
        assert ask(reader, prompts[2:]) == right[2:]
        assert reader.counters().get(AWAY, 0) > missed
        assert loaded(reader) == before
    finally:
        server.start() if how == "killed" else server.go_on()
    time.sleep(LEASE_S)  # owners tell it what it lost, and then it is served
    end = time.monotonic() + BACK_WITHIN_S
    while not loaded(reader) > before:
        assert time.monotonic() < end, f"nothing is shared again: {reader.counters()}"
        (fresh,) = [random_prompt(PROMPT_TOKENS, seed=time.monotonic_ns() % 2**31)]
        owner.generate([fresh], max_tokens=1)
        time.sleep(0.2)
        ask(reader, [fresh])
    assert ask(reader, prompts[:2]) == right[:2]
