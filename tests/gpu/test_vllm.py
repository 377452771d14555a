"""Stock vLLM replicas as processes: what one computed another fetches over CUDA IPC.

Readers run on the second card where there is one: one of them sees both cards, the others see their own alone. Else all
share a card.

Tokens are compared in float32 (Triton attention without TensorFloat-32; FlashAttention has no float32). In bfloat16
(FlashAttention) an answer depends on where chunks of the prompt end: there the right one is that of a replica that hits
its own cache.
"""

import random
import time

import pytest

from kvmarket.testing.shared_prefix import wait_announced
from kvmarket.testing.tiny_models import TINY_MODEL, random_prompt, write_model
from kvmarket.testing.vllm_gpu import BLOCK_SIZE, gpu_replica
from kvmarket.testing.vllm_replica import ReplicaHost

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(400)]

PROMPT_TOKENS = 1600
HIT_TOKENS = (PROMPT_TOKENS - 1) // BLOCK_SIZE * BLOCK_SIZE
ANSWER_TOKENS = 12
START_S = 240
CHURN_ROUNDS = 60
SMALL = {"kv_cache_bytes": 120 * BLOCK_SIZE * TINY_MODEL.kv_bytes_per_token(), "max_model_len": 1024}


@pytest.fixture(scope="module")
def replicas(request, gpu, vllm_installed, tmp_path_factory):
    """All replicas of this file, started together: they meet in one directory."""
    both, hidden = ("1,0", "1") if gpu.cupy.cuda.runtime.getDeviceCount() > 1 else ("", "")
    scratch = tmp_path_factory.mktemp("vllm")
    model, meeting = write_model(scratch, TINY_MODEL), scratch / "run"
    exact = {"kv_cache_bytes": 512 << 20, "max_batched_tokens": 8192}
    bf16 = {**exact, "dtype": "bfloat16"}
    configs = {
        "truth": gpu_replica(model, meeting, plain=True, **exact),
        "owner": gpu_replica(model, meeting, **exact),
        "reader": gpu_replica(model, meeting, cards=both, **exact),
        "small owner": gpu_replica(model, meeting, **SMALL),
        "small reader": gpu_replica(model, meeting, cards=hidden, **SMALL),
        "bf16 owner": gpu_replica(model, meeting, **bf16),
        "bf16 reader": gpu_replica(model, meeting, cards=hidden, **bf16),
    }
    with ReplicaHost(preload=False, log_dir=scratch / "logs", python_path=[request.path.parent]) as host:
        started = {name: host.launch(config) for name, config in configs.items()}
        for replica in started.values():
            replica.wait_ready(timeout_s=START_S)
        yield started


def prompts(count, first_seed, tokens=PROMPT_TOKENS):
    return [random_prompt(tokens, seed=first_seed + i) for i in range(count)]


def publish(replica, asked, **options):
    """Have a replica compute prompts, and wait until peers can find them."""
    before = replica.call("kvmarket_vllm.inspect:announced_blocks")
    answers = replica.generate(asked, max_tokens=ANSWER_TOKENS, **options)
    wait_announced(replica, before + sum(len(prompt) // BLOCK_SIZE for prompt in asked))
    return answers


def tokens(answers):
    return [answer.tokens for answer in answers]


def external(answers):
    return [answer.external_tokens for answer in answers]


def loaded_counters(replica):
    counters = replica.counters()
    nbytes = counters["vllm:kvmarket_loaded_bytes"]
    assert nbytes > 0
    assert counters["vllm:kvmarket_transport_bytes{transport=cuda_ipc}"] == nbytes
    assert counters["vllm:kvmarket_path_bytes{path=kernel(cuda_ipc)}"] == nbytes
    assert counters["vllm:kvmarket_load_failures"] == counters["vllm:kvmarket_errors"] == 0
    return counters


def test_float32_tokens_are_identical(replicas):
    truth, owner, reader = (replicas[name] for name in ("truth", "owner", "reader"))
    asked = prompts(8, 100)
    right = truth.generate(asked, max_tokens=ANSWER_TOKENS)
    computed = publish(owner, asked)
    fetched = reader.generate(asked, max_tokens=ANSWER_TOKENS)
    print("layout (pages, bytes, segments, memories, kind):", owner.call("gpu_faults:layout"))
    assert len({answer.tokens for answer in right}) == 8
    assert tokens(computed) == tokens(right)
    assert tokens(fetched) == tokens(right)
    assert external(fetched) == [HIT_TOKENS] * 8
    assert loaded_counters(reader)["vllm:kvmarket_blocks_verified"] == 8 * HIT_TOKENS // BLOCK_SIZE


def test_several_prompts_at_once(replicas):
    truth, owner, reader = (replicas[name] for name in ("truth", "owner", "reader"))
    asked = prompts(8, 200)
    right = truth.generate(asked, max_tokens=ANSWER_TOKENS)
    publish(owner, asked, together=True)
    fetched = reader.generate(asked, max_tokens=ANSWER_TOKENS, together=True)
    assert external(fetched) == [HIT_TOKENS] * 8
    assert tokens(fetched) == tokens(right)


def test_bfloat16_tokens_are_those_of_a_local_hit(replicas):
    owner, reader = replicas["bf16 owner"], replicas["bf16 reader"]
    asked = prompts(12, 300)
    computed = publish(owner, asked)
    fetched = reader.generate(asked, max_tokens=ANSWER_TOKENS)
    control = owner.generate(asked, max_tokens=ANSWER_TOKENS)  # hits its own cache
    print("layout (pages, bytes, segments, memories, kind):", owner.call("gpu_faults:layout"))
    same = sum(a == b for a, b in zip(tokens(computed), tokens(control), strict=True))
    print(f"bfloat16 control: {same} of {len(asked)} answers of a local hit are those of one pass without it")
    assert external(fetched) == [HIT_TOKENS] * 12
    assert [answer.cached_tokens for answer in control] == [HIT_TOKENS] * 12
    assert tokens(fetched) == tokens(control)
    loaded_counters(reader)


def test_misses_say_why(replicas):
    truth, owner, reader, other = (replicas[name] for name in ("truth", "owner", "reader", "bf16 reader"))
    asked = prompts(2, 400)
    (answer,) = reader.generate(asked[:1], max_tokens=1)
    assert answer.external_tokens == 0
    assert reader.counters()["vllm:kvmarket_misses{reason=not_published}"] >= 1
    publish(owner, asked[1:])
    (answer,) = other.generate(asked[1:], max_tokens=1)  # its KV cache has another dtype
    assert answer.external_tokens == 0
    right = truth.generate(asked[1:], max_tokens=ANSWER_TOKENS)
    owner.call("gpu_faults:corrupt", pages=10_000)
    (answer,) = reader.generate(asked[1:], max_tokens=ANSWER_TOKENS)
    assert answer.tokens == right[0].tokens
    counters = reader.counters()
    assert counters["vllm:kvmarket_blocks_refused{reason=digest_mismatch}"] >= 1
    assert "digest_mismatch" in reader.log_tail(200)


def test_a_reset_reaches_every_replica(replicas):
    truth, owner, reader = (replicas[name] for name in ("truth", "owner", "reader"))
    asked = prompts(3, 500)
    right = truth.generate(asked, max_tokens=ANSWER_TOKENS)
    publish(owner, asked[:2])
    assert external(reader.generate(asked[:1], max_tokens=ANSWER_TOKENS)) == [HIT_TOKENS]
    assert reader.reset_prefix_cache(connector=True)
    fetched = reader.generate(asked[:2], max_tokens=ANSWER_TOKENS)
    assert external(fetched) == [0, 0]
    assert tokens(fetched) == tokens(right[:2])
    publish(owner, asked[2:])
    fetched = reader.generate(asked[2:], max_tokens=ANSWER_TOKENS)
    assert (external(fetched), tokens(fetched)) == ([HIT_TOKENS], tokens(right[2:]))


def test_pages_overwritten_while_peers_read_them(replicas):
    """Caches of 120 blocks on both sides. What the generations let pass has the digest that was announced."""
    truth, owner, reader = (replicas[name] for name in ("truth", "small owner", "small reader"))
    rng = random.Random(7)
    asked = [random_prompt(rng.randrange(300, 500), seed=600 + i) for i in range(32)]
    right = tokens(truth.generate(asked, max_tokens=6))
    wrong, answers, recent = [], 0, rng.sample(range(32), 4)
    owner.generate([asked[i] for i in recent], max_tokens=1)
    for _ in range(CHURN_ROUNDS):
        following = rng.sample(range(32), 6)
        busy = owner.begin_generate([asked[i] for i in following], max_tokens=6)
        wanted = rng.sample(recent[-4:], 3)
        got = reader.generate([asked[i] for i in wanted], max_tokens=6)
        done = busy.result(timeout_s=60)
        pairs = [*zip(wanted, got, strict=True), *zip(following, done, strict=True)]
        wrong += [(i, len(asked[i]), answer) for i, answer in pairs if answer.tokens != right[i]]
        answers += len(pairs)
        recent = following
    counters = reader.counters()
    refused = {name: value for name, value in counters.items() if name.startswith("vllm:kvmarket_blocks_refused{")}
    loads, verified = counters["vllm:kvmarket_loads"], counters["vllm:kvmarket_blocks_verified"]
    print(f"{answers} answers, {len(wrong)} wrong, {loads:.0f} loads, {verified:.0f} verified, refused {refused}")
    assert "vllm:kvmarket_blocks_refused{reason=digest_mismatch}" not in refused
    assert wrong == []
    assert loads >= 20
    assert counters["vllm:kvmarket_loaded_tokens"] >= 20 * 16 * BLOCK_SIZE
    assert owner.counters()["vllm:kvmarket_blocks_retracted"] >= 300
    assert counters["vllm:kvmarket_errors"] == 0


def test_owners_killed_under_load_are_misses(replicas):
    """One in the middle of a copy, one at any moment while the reader fetches and it computes itself."""
    truth, owner, reader = (replicas[name] for name in ("truth", "owner", "reader"))
    asked = prompts(8, 700)
    right = truth.generate(asked, max_tokens=ANSWER_TOKENS)
    publish(owner, asked)
    owner.begin_generate(prompts(20, 800), max_tokens=ANSWER_TOKENS)  # it is at work when it dies
    fetched = reader.generate(asked[:2], max_tokens=ANSWER_TOKENS)
    assert external(fetched) == [HIT_TOKENS] * 2
    reader.call("gpu_faults:kill_owner_in_copy", pid=owner.pid)
    began = time.monotonic()
    fetched += reader.generate(asked[2:], max_tokens=ANSWER_TOKENS)
    spent = time.monotonic() - began
    assert reader.call("gpu_faults:killed")
    assert not owner.alive
    assert tokens(fetched) == tokens(right)
    assert external(fetched)[3:] == [0] * 5
    assert spent < 20
    counters = reader.counters()
    assert counters["vllm:kvmarket_load_failures"] >= 1
    assert counters["vllm:kvmarket_errors"] == 0
    print(f"{len(asked) - 2} prompts in {spent:.2f} s around a kill")

    victim, other = replicas["bf16 owner"], replicas["bf16 reader"]
    asked = prompts(16, 900)
    publish(victim, asked)
    right = victim.generate(asked, max_tokens=ANSWER_TOKENS)  # local hits
    pending = other.begin_generate(asked, max_tokens=ANSWER_TOKENS)
    time.sleep(0.3)
    victim.kill()
    fetched = pending.result(timeout_s=60)
    hits = [i for i, answer in enumerate(fetched) if answer.external_tokens]
    print(f"{len(hits)} of {len(asked)} prompts were fetched before the kill")
    assert len(hits) < len(asked)
    assert other.counters()["vllm:kvmarket_errors"] == 0
