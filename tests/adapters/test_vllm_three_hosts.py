"""Three replicas on three hosts, as far as the network goes, over a registry server and UCX; one is killed."""

import itertools
import time
from importlib.util import find_spec

import pytest

pytest.importorskip("redis", reason="the extra 'redis' is not installed")

from kvmarket.testing.networks import SWITCHED_DEVICE, NetworksUnavailableError, switched_hosts
from kvmarket.testing.redis_server import WHERE_FROM, RedisServer, find_server
from kvmarket.testing.tiny_models import random_prompt

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("ucxx") is None, reason="ucxx is not installed"),
    pytest.mark.skipif(find_server() is None, reason=WHERE_FROM),
]

BLOCK = 32
PROMPT_TOKENS, ANSWER_TOKENS = 800, 8
LEASE_S = 3.0
MEET_WITHIN_S = 30.0
SEEDS = itertools.count(31_000)
FAILURES = ("vllm:kvmarket_load_failures", "vllm:kvmarket_errors")
GONE = {"owner_gone", "unreachable", "not_published"}


@pytest.fixture(scope="module")
def network():
    try:
        with switched_hosts(3) as (names, address):
            yield names, address
    except NetworksUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def trio(network, fleet, tmp_path_factory):
    names, address = network
    options = ["--bind", "127.0.0.1", address, "--protected-mode", "no"]
    with RedisServer(tmp_path_factory.mktemp("server"), options) as server:
        environ = {
            "KVMARKET_REGISTRY": f"redis://{address}:{server.port}?lease_s={LEASE_S}&timeout_s=1",
            "KVMARKET_TRANSPORT": "ucx",
            "KVMARKET_FETCH_DEADLINE_S": "10",
            "UCX_TLS": "tcp",  # they share a kernel, by which UCX would take them for one host
            "VLLM_HOST_IP": "127.0.0.1",
        }
        replicas = fleet.start_all(*({"environ": environ, "network": name} for name in names))
        for owner in replicas:
            introduce(fleet, owner, [other for other in replicas if other is not owner])
        yield replicas
        fleet.close()  # before their networks go


def prompts(count):
    return [random_prompt(PROMPT_TOKENS, seed=next(SEEDS)) for _ in range(count)]


def introduce(fleet, owner, readers):
    """Let readers connect: on a busy machine the first attempts may take longer than one may take."""
    end = time.monotonic() + MEET_WITHIN_S
    waiting = list(readers)
    while waiting:
        assert time.monotonic() < end, f"an owner was never reached: {waiting[0].log_tail()}"
        asked = [random_prompt(2 * BLOCK, seed=next(SEEDS))]
        fleet.publish(owner, asked)
        waiting = [reader for reader in waiting if not reader.generate(asked, max_tokens=1)[0].external_tokens]


def tokens(answers):
    return [answer.tokens for answer in answers]


def misses(replica, before):
    """Misses by reason since `before`."""
    name = "vllm:kvmarket_misses{reason="
    now = replica.counters()
    found = {key: now[key] - before.get(key, 0) for key in now if key.startswith(name)}
    return {key.removeprefix(name).removesuffix("}"): count for key, count in found.items() if count}


def test_every_replica_serves_both_others_and_no_token_changes(trio, fleet, truth):
    asked = [prompts(2) for _ in trio]
    right = [tokens(truth.generate(each, max_tokens=ANSWER_TOKENS)) for each in asked]
    for owner, own in zip(trio, asked, strict=True):
        fleet.publish(owner, own)
    for number, reader in enumerate(trio):
        for other in {0, 1, 2} - {number}:
            fetched = reader.generate(asked[other], max_tokens=ANSWER_TOKENS)
            assert tokens(fetched) == right[other]
            assert min(answer.external_tokens for answer in fetched) >= 0.9 * PROMPT_TOKENS
        counters = reader.counters()
        carried = counters[f"vllm:kvmarket_path_bytes{{path=am(tcp/{SWITCHED_DEVICE})}}"]
        assert carried == counters["vllm:kvmarket_loaded_bytes"] > 0
        assert [counters[name] for name in FAILURES] == [0, 0]


def test_one_is_killed_under_load_and_no_request_of_the_others_fails(trio, fleet, truth):
    victim, *others = trio
    held, fresh, later = prompts(6), prompts(4), prompts(2)
    right = tokens(truth.generate(held + fresh + later, max_tokens=ANSWER_TOKENS))
    fleet.publish(victim, held)
    before = [other.counters() for other in others]
    # Both ask for what the victim holds and for what nobody has, while the victim itself computes.
    load = victim.begin_generate(fresh, max_tokens=64)
    first = [other.begin_generate(held[:3] + fresh[:2], max_tokens=ANSWER_TOKENS) for other in others]
    time.sleep(0.15)
    victim.kill()
    victim.wait_exit()
    expected = right[:3] + right[6:8]
    for other, begun in zip(others, first, strict=True):
        assert tokens(begun.result(timeout_s=60)) == expected, other.log_tail()
    with pytest.raises(Exception, match=r"(?i)exit|end|kill|closed|died|gone"):
        load.result(timeout_s=10)
    time.sleep(LEASE_S + 0.5)
    for other in others:
        answers = other.generate(held[3:], max_tokens=ANSWER_TOKENS)
        assert tokens(answers) == right[3:6]
    # Who is left goes on sharing.
    one, two = others
    fleet.publish(one, later)
    shared = two.generate(later, max_tokens=ANSWER_TOKENS)
    assert tokens(shared) == right[10:12]
    assert min(answer.external_tokens for answer in shared) >= 0.9 * PROMPT_TOKENS
    for other, counters in zip(others, before, strict=True):
        assert other.alive
        explained = misses(other, counters)
        assert explained, "requests for what nobody has any more missed"
        assert set(explained) <= GONE, explained
        assert other.counters()["vllm:kvmarket_errors"] == counters["vllm:kvmarket_errors"]
