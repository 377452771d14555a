"""The replicas that the vLLM tests stand on, without a connector."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmarket.testing.tiny_models import random_prompt
from kvmarket.testing.vllm_replica import Generation, Replica, ReplicaConfig, ReplicaError

pytestmark = pytest.mark.vllm

PROMPT_TOKENS = 1600
HIT_TOKENS = (PROMPT_TOKENS - 1) // 32 * 32


def hook(engine, start, *, factor):
    """Run inside a replica by `Replica.call`."""
    if factor == 0:
        raise ValueError("no factor")
    return start * factor * engine.vllm_config.cache_config.block_size


@pytest.fixture(scope="module")
def config(tiny_model):
    return ReplicaConfig(model=tiny_model)


@pytest.fixture(scope="module")
def host(vllm_host):
    return vllm_host


@pytest.fixture(scope="module")
def replicas(host, config):
    pair = host.launch(config), host.launch(config)
    for replica in pair:
        replica.wait_ready()
    yield pair
    for replica in pair:
        replica.close()


def one(replica: Replica, prompt: list[int], **options) -> Generation:
    (result,) = replica.generate([prompt], **options)
    return result


def test_two_engines_agree_computed_or_cached(replicas):
    first, second = replicas
    prompts = [random_prompt(PROMPT_TOKENS, seed=seed) for seed in range(4)]
    cold = first.generate(prompts)
    other = second.generate(prompts)
    cached = first.generate(prompts)
    together = second.generate(prompts, together=True)

    assert [result.cached_tokens for result in cold + other] == [0] * 8
    assert [result.cached_tokens for result in cached + together] == [HIT_TOKENS] * 8
    tokens = [result.tokens for result in cold]
    assert [result.tokens for result in other] == tokens
    assert [result.tokens for result in cached] == tokens
    assert [result.tokens for result in together] == tokens
    assert all(result.external_tokens == 0 for result in cold + cached)
    assert min(result.ttft_s for result in cold) > 2 * max(result.ttft_s for result in cached)


def test_outputs_vary_and_depend_on_one_block_far_back(replicas):
    replica, _ = replicas
    prompt = random_prompt(PROMPT_TOKENS, seed=100)
    changed = prompt[:320] + random_prompt(32, seed=101) + prompt[352:]
    original, other = replica.generate([prompt, changed], max_tokens=24)

    assert len(set(original.tokens)) > 12
    assert sum(a != b for a, b in zip(original.tokens, other.tokens, strict=True)) > 12


def test_a_salt_isolates_and_a_reset_forgets(replicas):
    replica, _ = replicas
    prompt = random_prompt(200, seed=200)
    assert one(replica, prompt).cached_tokens == 0
    assert one(replica, prompt, cache_salt="other").cached_tokens == 0
    assert one(replica, prompt).cached_tokens == 192
    assert replica.reset_prefix_cache(connector=True)
    assert one(replica, prompt).cached_tokens == 0


def test_counters_follow_the_requests(replicas):
    replica, _ = replicas
    before = replica.counters()
    prompt = random_prompt(200, seed=300)
    replica.generate([prompt, prompt])
    after = replica.counters()
    name = "vllm:prompt_tokens_by_source{source=local_cache_hit}"
    assert after[name] - before[name] == 192
    assert after["vllm:prompt_tokens"] - before["vllm:prompt_tokens"] == 400


def test_a_hook_runs_in_the_replica_and_its_failure_is_reported(replicas):
    replica, _ = replicas
    assert replica.call("test_vllm_replica:hook", 2, factor=3) == 192
    with pytest.raises(ReplicaError, match="no factor"):
        replica.call("test_vllm_replica:hook", 2, factor=0)
    assert replica.call("test_vllm_replica:hook", 1, factor=1) == 32


def test_a_missed_deadline_inside_the_engine_leaves_it_usable(replicas):
    replica, _ = replicas
    prompt = random_prompt(100, seed=400)
    with pytest.raises(ReplicaError, match="unfinished at the deadline"):
        replica.generate([prompt], max_tokens=3000, timeout_s=0.2)
    assert len(one(replica, prompt).tokens) == 16


def test_a_stopped_replica_misses_the_deadline_and_can_go_on(replicas):
    _, replica = replicas
    replica.kill(signal.SIGSTOP)
    pending = replica.begin_generate([random_prompt(100, seed=500)], max_tokens=4)
    began = time.monotonic()
    with pytest.raises(ReplicaError, match="took longer"):
        pending.result(timeout_s=0.5)
    assert time.monotonic() - began < 2
    assert replica.alive
    replica.kill(signal.SIGCONT)
    (result,) = pending.result(timeout_s=20)
    assert len(result.tokens) == 4


def test_a_killed_replica_is_reported_and_leaves_the_others_alone(host, config, replicas):
    victim = host.start(config)
    pending = victim.begin_generate([random_prompt(PROMPT_TOKENS, seed=600)], max_tokens=2000)
    victim.kill()
    with pytest.raises(ReplicaError, match="died during 'generate'"):
        pending.result(timeout_s=10)
    victim.wait_exit()
    assert not victim.alive
    with pytest.raises(ReplicaError):
        victim.counters()
    assert len(one(replicas[0], random_prompt(100, seed=601)).tokens) == 16


def test_stop_ends_the_process(host, config):
    replica = host.start(config)
    replica.stop()
    assert not replica.alive


def test_a_failed_start_shows_why(host, config):
    replica = host.launch(ReplicaConfig(model=config.model, block_size=16))
    with pytest.raises(ReplicaError, match="No common block size for 16"):
        replica.wait_ready()


@pytest.mark.slow
def test_nothing_outlives_the_process_that_started_it(config):
    script = """if True:
        import os, sys
        from kvmarket.testing.vllm_replica import ReplicaConfig, ReplicaHost
        host = ReplicaHost()
        print(host.start(ReplicaConfig(model=sys.argv[1])).pid, host.scratch, flush=True)
        os.kill(os.getpid(), 9)
    """
    command = [sys.executable, "-c", script, str(config.model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, scratch = done.stdout.split()
    end = time.monotonic() + 15
    while Path(f"/proc/{pid}").exists() or Path(scratch).exists():
        assert time.monotonic() < end, "the replica still runs, or left its files"
        time.sleep(0.05)


def test_importing_the_harness_imports_neither_vllm_nor_torch():
    script = "import sys, kvmarket.testing.vllm_replica; print(sorted({'vllm', 'torch'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"
