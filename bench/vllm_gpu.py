"""Stock vLLM replicas on one card: a 15,000-token prefix computed, fetched over CUDA IPC, and found in the own cache.

Four replicas of a random 1B Llama shape (bfloat16, eager): A and B with the connector, P and Q without. Prompt by
prompt and interleaved, each of 64 answer tokens: P, Q and A compute the prompt (A publishes), B fetches it, then
everybody asks again and hits its own cache. Then A, or P for comparison, decodes while B fetches. Medians, and ratios
of medians; Q against P is what replicas differ without any connector. The last line is JSON.

    python bench/vllm_gpu.py [--prompts 12] [--prefix 15000] [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmarket.testing.shared_prefix import answer, carried_by, wait_announced
from kvmarket.testing.tiny_models import TINY_MODEL, ModelSize, random_prompt, write_model
from kvmarket.testing.vllm_gpu import BLOCK_SIZE, gpu_replica
from kvmarket.testing.vllm_replica import Generation, Replica, ReplicaHost

if TYPE_CHECKING:
    from collections.abc import Iterable

MODEL_1B = ModelSize("1b", 2048, 8192, 16, 32, 8, 64, max_positions=20_000)
TAIL_TOKENS, ANSWER_TOKENS, WARM_UP = 64, 64, 2
START_S = 280
Answers = dict[str, list[Generation]]


def card_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def start(host: ReplicaHost, model: Path, scratch: Path, size: ModelSize, prefix: int) -> dict[str, Replica]:
    """Start the four replicas at the same time; each has room for six prompts."""
    room = 6 * (prefix + TAIL_TOKENS + ANSWER_TOKENS) * size.kv_bytes_per_token(2)
    fields: dict[str, Any] = {
        "dtype": "bfloat16",
        "kv_cache_bytes": room,
        "max_model_len": min(size.max_positions, prefix + 512),
        "max_batched_tokens": 16_384,
    }
    replicas = {name: host.launch(gpu_replica(model, scratch / "run", plain=name in "PQ", **fields)) for name in "ABPQ"}
    for replica in replicas.values():
        replica.wait_ready(timeout_s=START_S)
    return replicas


def play(replicas: dict[str, Replica], seed: int, prefix: int) -> dict[str, Generation]:
    """Play one prompt that nobody has seen before."""
    size = MODEL_1B if prefix > TINY_MODEL.max_positions else TINY_MODEL
    prompt = random_prompt(prefix, seed=seed, size=size) + random_prompt(TAIL_TOKENS, seed=10_000 + seed, size=size)
    played: dict[str, Generation] = {}
    order = "PAQ" if seed % 2 else "QAP"
    before = replicas["A"].call("kvmarket_vllm.inspect:announced_blocks")
    for name in order:
        played[f"{name} cold"] = answer(replicas[name], prompt, ANSWER_TOKENS)
    wait_announced(replicas["A"], before + len(prompt) // BLOCK_SIZE)
    played["B fetched"] = answer(replicas["B"], prompt, ANSWER_TOKENS)
    for name in (*order, "B"):
        played[f"{name} local"] = answer(replicas[name], prompt, ANSWER_TOKENS)
    return played


def busy_rounds(replicas: dict[str, Replica], rounds: int, prefix: int) -> dict[str, list[float]]:
    """Have A, P and Q in turn decode while B fetches a prompt from A; return seconds per round and replica."""
    size = MODEL_1B if prefix > TINY_MODEL.max_positions else TINY_MODEL
    seconds: dict[str, list[float]] = {name: [] for name in "APQ"}
    short = random_prompt(256, seed=77, size=size)
    for number in range(rounds):
        for turn, name in enumerate(("A", "P", "Q") if number % 2 else ("Q", "P", "A")):
            prompt = random_prompt(prefix, seed=20_000 + 3 * number + turn, size=size)
            before = replicas["A"].call("kvmarket_vllm.inspect:announced_blocks")
            answer(replicas["A"], prompt, 1)
            wait_announced(replicas["A"], before + len(prompt) // BLOCK_SIZE)
            pending = replicas[name].begin_generate([short], max_tokens=96)
            time.sleep(0.05)
            fetched = answer(replicas["B"], prompt, 8)
            if not fetched.external_tokens:
                raise RuntimeError("nothing was fetched\n" + replicas["B"].log_tail())
            (generation,) = pending.result(timeout_s=60)
            seconds[name].append(generation.total_s)
    return seconds


def median_ms(values: Iterable[float]) -> float:
    return round(statistics.median(values) * 1e3, 3)


def step_s(generation: Generation) -> float:
    """Seconds per decoding step."""
    return (generation.total_s - generation.ttft_s) / (len(generation.tokens) - 1)


def summary(answers: Answers, busy: dict[str, list[float]]) -> dict[str, Any]:
    phases = {
        name: {
            "ttft_ms": median_ms(each.ttft_s for each in of_phase),
            "total_ms": median_ms(each.total_s for each in of_phase),
            "step_ms": median_ms(map(step_s, of_phase)),
        }
        for name, of_phase in sorted(answers.items())
    }
    ttft = {name: phase["ttft_ms"] for name, phase in phases.items()}
    total = {name: phase["total_ms"] for name, phase in phases.items()}
    steps = {
        name: statistics.median(step_s(each) for kind in ("cold", "local") for each in answers[f"{name} {kind}"])
        for name in "APQ"
    }
    while_serving = {name: median_ms(values) for name, values in busy.items()}
    same = [a.tokens == b.tokens for a, b in zip(answers["B fetched"], answers["A local"], strict=True)]
    control = [a.tokens == b.tokens for a, b in zip(answers["P cold"], answers["P local"], strict=True)]
    return {
        "phases": phases,
        "fetched_over_local_ttft": round(ttft["B fetched"] / ttft["B local"], 3),
        "fetched_minus_local_ttft_ms": round(ttft["B fetched"] - ttft["B local"], 3),
        "aim_ttft_ms": round(1.15 * ttft["B local"] + 3, 3),
        "cold_over_fetched_ttft": round(ttft["P cold"] / ttft["B fetched"], 3),
        "fetched_over_cold_total": round(total["B fetched"] / total["P cold"], 4),
        "publisher_over_plain_cold_total": round(total["A cold"] / total["P cold"], 4),
        "publisher_over_plain_cold_ttft": round(ttft["A cold"] / ttft["P cold"], 4),
        "plain_over_plain_cold_total": round(total["Q cold"] / total["P cold"], 4),
        "publisher_over_plain_step": round(steps["A"] / steps["P"], 4),
        "plain_over_plain_step": round(steps["Q"] / steps["P"], 4),
        "while_b_fetches_ms": while_serving,
        "identical_fetched_and_local_hit": f"{sum(same)}/{len(same)}",
        "identical_control_cold_and_local_hit_without_connector": f"{sum(control)}/{len(control)}",
        "external_tokens": min(each.external_tokens or 0 for each in answers["B fetched"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="prompts (default 12)")
    parser.add_argument("--prefix", type=int, default=15_000, help="tokens of the prefix (default 15,000)")
    parser.add_argument("--models", type=Path, help="directory that keeps the checkpoint for the next run")
    parser.add_argument("--logs", type=Path, help="directory for what the replicas print")
    parser.add_argument("--quick", action="store_true", help="the tiny model, a short prefix and three prompts")
    args = parser.parse_args()
    size, prefix, count = (TINY_MODEL, 2048, 3) if args.quick else (MODEL_1B, args.prefix, args.prompts)
    answers: Answers = {}
    with (
        tempfile.TemporaryDirectory(prefix="kvmarket-bench-") as name,
        ReplicaHost(preload=False, log_dir=args.logs) as host,
    ):
        model = write_model(args.models or Path(name), size)
        replicas = start(host, model, Path(name), size, prefix)
        for seed in range(count + WARM_UP):
            played = play(replicas, seed, prefix)
            for phase, generation in played.items() if seed >= WARM_UP else ():
                answers.setdefault(phase, []).append(generation)
            print(f"  {seed + 1}/{count + WARM_UP}", end="\r", file=sys.stderr, flush=True)
        busy = busy_rounds(replicas, max(2, count // 2), prefix)
        counters = replicas["B"].counters()
        transport = carried_by(replicas["B"])
    result = summary(answers, busy)
    loads = max(counters["vllm:kvmarket_loads"], 1)
    result["load_ms_mean"] = round(1e3 * counters["vllm:kvmarket_load_seconds"] / loads, 3)
    result |= {"transport": transport, "prefix_tokens": prefix, "kv_mib": prefix * size.kv_bytes_per_token(2) >> 20}
    result |= {"model_parameters": size.num_parameters, "prompts": count}
    for phase, values in result["phases"].items():
        print(f"{phase:10}", *(f"{key} {value:>9.2f}" for key, value in values.items()))
    for key, value in result.items():
        if key != "phases":
            print(f"{key:56} {value}")
    print(json.dumps({"bench": "vllm_gpu", "card": card_name(), **result}))


if __name__ == "__main__":
    main()
