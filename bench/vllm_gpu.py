"""Stock vLLM replicas on cards of one host: a 15,000-token prefix computed, fetched over CUDA IPC, and found locally.

Replicas of a random Llama shape (bfloat16): A and B with the connector, P and Q without (Q not for the large shape).
A and P run on the card of the source, B and Q on the other, if there is another; each sees its own card alone, or both.
Decoding runs as CUDA graphs, so that a step is what the card takes and not what the host does; where that does not
start, or with --eager, it does not. Prompt by prompt and interleaved, each of 64 answer tokens: P, Q and A compute the
prompt (A publishes), B fetches it, then everybody, B first, asks again and hits its own cache. Then all decode after a
short prompt, for what publishing costs a step, and last A, or P and Q for comparison, decode while B fetches. Medians,
and ratios of medians; Q against P is what replicas differ without any connector. Hosts slow down by half for
seconds, so the aim for the first token (1.15 x local hit + 3 ms) and the publisher are also compared prompt by prompt,
and steps round by round. With --shape 8b the weights are vLLM's own dummies: times only, its tokens say nothing. The
last line is JSON.

    python bench/vllm_gpu.py [--shape 1b|8b] [--eager] [--prompts 12] [--prefix 15000] [--quick]
                             [--card 0 --source-card 1 [--hide]]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import parse_with_cards

from kvmarket.testing.shared_prefix import answer, carried_by, wait_announced
from kvmarket.testing.tiny_models import TINY_MODEL, ModelSize, random_prompt, write_model
from kvmarket.testing.vllm_gpu import BLOCK_SIZE, gpu_replica
from kvmarket.testing.vllm_replica import Generation, Replica, ReplicaError, ReplicaHost

if TYPE_CHECKING:
    from collections.abc import Iterable

MODEL_1B = ModelSize("1b", 2048, 8192, 16, 32, 8, 64, max_positions=20_000)
MODEL_8B = ModelSize("8b", 4096, 14336, 32, 32, 8, 128, max_positions=20_000)
SHAPES = {"1b": MODEL_1B, "8b": MODEL_8B}
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
"""vLLM's ``compilation_config``: nothing is compiled, decoding steps are captured."""
STEADY_TOKENS = 400
TAIL_TOKENS, ANSWER_TOKENS, WARM_UP = 64, 64, 2
START_S = 280
Answers = dict[str, list[Generation]]
HookTimes = dict[str, tuple[int, float]]


@dataclass(frozen=True)
class Setting:
    """What all replicas have in common, and where they run.

    Attributes:
        model, scratch: directories.
        size: of the model.
        prefix: tokens.
        card, source_card: of the reader, and of the publisher.
        hide: each replica sees its own card alone.
    """

    model: Path
    scratch: Path
    size: ModelSize
    prefix: int
    card: int
    source_card: int
    hide: bool

    def cards(self, name: str) -> str:
        """Return what replica `name` sees, its own card first, as in ``CUDA_VISIBLE_DEVICES``."""
        own, other = (self.card, self.source_card) if name in "BQ" else (self.source_card, self.card)
        return str(own) if self.hide or own == other else f"{own},{other}"


def card_name() -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def start(host: ReplicaHost, setting: Setting, *, graphs: bool) -> dict[str, Replica]:
    """Start the replicas at the same time; each has room for a few prompts."""
    size, prefix = setting.size, setting.prefix
    large = size is MODEL_8B
    room = (2 if large else 6) * (prefix + TAIL_TOKENS + ANSWER_TOKENS + BLOCK_SIZE) * size.kv_bytes_per_token(2)
    fields: dict[str, Any] = {
        "dtype": "bfloat16",
        "kv_cache_bytes": room,
        "max_model_len": min(size.max_positions, prefix + 512),
        "max_batched_tokens": 16_384,
    }
    args: dict[str, Any] = {"enforce_eager": False, "compilation_config": GRAPHS} if graphs else {}
    if large:
        args["load_format"] = "dummy"
    names = "ABP" if large else "ABPQ"
    replicas = {
        name: host.launch(
            gpu_replica(
                setting.model,
                setting.scratch / "run",
                plain=name in "PQ",
                cards=setting.cards(name),
                engine_args=args,
                **fields,
            )
        )
        for name in names
    }
    for replica in replicas.values():
        replica.wait_ready(timeout_s=START_S)
    return replicas


def play(replicas: dict[str, Replica], seed: int, prefix: int, size: ModelSize) -> dict[str, Generation]:
    """Play one prompt that nobody has seen before."""
    prompt = random_prompt(prefix, seed=seed, size=size) + random_prompt(TAIL_TOKENS, seed=10_000 + seed, size=size)
    played: dict[str, Generation] = {}
    order = [name for name in ("PAQ" if seed % 2 else "QAP") if name in replicas]
    before = replicas["A"].call("kvmarket_vllm.inspect:announced_blocks")
    for name in order:
        played[f"{name} cold"] = answer(replicas[name], prompt, ANSWER_TOKENS)
    wait_announced(replicas["A"], before + len(prompt) // BLOCK_SIZE)
    played["B fetched"] = answer(replicas["B"], prompt, ANSWER_TOKENS)
    for name in ("B", *order):  # B first: what it is compared with is measured in the same moment
        played[f"{name} local"] = answer(replicas[name], prompt, ANSWER_TOKENS)
    return played


def steady_rounds(replicas: dict[str, Replica], rounds: int, size: ModelSize) -> tuple[dict[str, list[float]], Any]:
    """Have A, P and Q in turn decode after a short prompt; return seconds per step, and A's hooks in them."""
    names = [name for name in "PAQ" if name in replicas]
    steps: dict[str, list[float]] = {name: [] for name in names}
    before: HookTimes = replicas["A"].call("kvmarket_vllm.inspect:hook_times")
    for number in range(rounds):
        prompt = random_prompt(200, seed=40_000 + number, size=size)
        for name in names if number % 2 else reversed(names):
            steps[name].append(step_s(answer(replicas[name], prompt, STEADY_TOKENS)))
    after: HookTimes = replicas["A"].call("kvmarket_vllm.inspect:hook_times")
    return steps, hook_us(before, after)


def hook_us(before: HookTimes, after: HookTimes) -> dict[str, float]:
    """Return microseconds per engine step that each role's hooks took between two looks."""
    return {
        role: round(1e6 * (after[role][1] - before[role][1]) / max(1, after[role][0] - before[role][0]), 2)
        for role in after
    }


def busy_rounds(replicas: dict[str, Replica], rounds: int, prefix: int, size: ModelSize) -> dict[str, list[float]]:
    """Have A, P and Q in turn decode while B fetches a prompt from A; return seconds per round and replica."""
    names = [name for name in "QPA" if name in replicas]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    short = random_prompt(256, seed=77, size=size)
    for number in range(rounds):
        for turn, name in enumerate(reversed(names) if number % 2 else names):
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


def summary(answers: Answers, busy: dict[str, list[float]], steady: dict[str, list[float]]) -> dict[str, Any]:
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
    steps = {name: median_ms(each) for name, each in steady.items()}
    same = [a.tokens == b.tokens for a, b in zip(answers["B fetched"], answers["B local"], strict=True)]
    control = [a.tokens == b.tokens for a, b in zip(answers["P cold"], answers["P local"], strict=True)]
    return {
        "phases": phases,
        "fetched_over_local_ttft": round(ttft["B fetched"] / ttft["B local"], 3),
        "fetched_minus_local_ttft_ms": round(ttft["B fetched"] - ttft["B local"], 3),
        "aim_ttft_ms": round(1e3 * aim_s(ttft["B local"] / 1e3), 3),
        **paired(answers["B fetched"], answers["B local"]),
        "cold_over_fetched_ttft": round(ttft["P cold"] / ttft["B fetched"], 3),
        "total_over_plain_cold": {name: round(each / total["P cold"], 4) for name, each in total.items()},
        "publisher_over_plain_cold_ttft": round(ttft["A cold"] / ttft["P cold"], 4),
        "paired_cold_total_over_plain": {
            name: over([each.total_s for each in answers[f"{name} cold"]], [each.total_s for each in answers["P cold"]])
            for name in steady
        },
        "steady_step_ms": steps,
        "steady_step_over_plain": {name: round(each / steps["P"], 4) for name, each in steps.items()},
        "paired_step_over_plain": {name: over(each, steady["P"]) for name, each in steady.items()},
        "while_b_fetches_ms": {name: median_ms(values) for name, values in busy.items()},
        "identical_fetched_and_local_hit": f"{sum(same)}/{len(same)}",
        "identical_control_cold_and_local_hit_without_connector": f"{sum(control)}/{len(control)}",
        "external_tokens": min(each.external_tokens or 0 for each in answers["B fetched"]),
    }


def over(values: list[float], reference: list[float]) -> float:
    """Return the median of ratios, pair by pair."""
    return round(statistics.median(a / b for a, b in zip(values, reference, strict=True)), 4)


def aim_s(local_s: float) -> float:
    """Return how long a fetched first token may take, given that of a local hit."""
    return 1.15 * local_s + 3e-3


def paired(fetched: list[Generation], local: list[Generation]) -> dict[str, Any]:
    """Compare each fetched first token with the local hit of the same prompt right behind it; return medians."""
    pairs = [(a.ttft_s, b.ttft_s) for a, b in zip(fetched, local, strict=True)]
    over_aim = statistics.median(a / aim_s(b) for a, b in pairs)
    return {
        "paired_fetched_minus_local_ms": median_ms(a - b for a, b in pairs),
        "paired_fetched_over_aim": round(over_aim, 3),
        "pairs_within_aim": f"{sum(a <= aim_s(b) for a, b in pairs)}/{len(pairs)}",
    }


def started(host: ReplicaHost, setting: Setting, *, graphs: bool) -> tuple[dict[str, Replica], bool]:
    """Start the replicas, without CUDA graphs if they do not start with them; return also whether they have some."""
    try:
        return start(host, setting, graphs=graphs), graphs
    except ReplicaError as error:
        if not graphs:
            raise
        print(f"without CUDA graphs, since: {str(error)[-800:]}", file=sys.stderr)
        host.stop_all()
        return start(host, setting, graphs=False), False


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="of the model (default 1b)")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--prompts", type=int, default=12, help="prompts (default 12)")
    parser.add_argument("--prefix", type=int, default=15_000, help="tokens of the prefix (default 15,000)")
    parser.add_argument("--hide", action="store_true", help="let each replica see its own card alone")
    parser.add_argument("--models", type=Path, help="directory that keeps the checkpoint for the next run")
    parser.add_argument("--logs", type=Path, help="directory for what the replicas print")
    parser.add_argument("--quick", action="store_true", help="the tiny model, a short prefix and three prompts")
    return parse_with_cards(parser)


def main() -> None:
    args = arguments()
    size, prefix, count = (TINY_MODEL, 2048, 3) if args.quick else (SHAPES[args.shape], args.prefix, args.prompts)
    answers: Answers = {}
    with (
        tempfile.TemporaryDirectory(prefix="kvmarket-bench-") as name,
        ReplicaHost(preload=False, log_dir=args.logs) as host,
    ):
        model = write_model(args.models or Path(name), size, weights=size is not MODEL_8B)
        setting = Setting(model, Path(name), size, prefix, args.card, args.source_card, args.hide)
        replicas, graphs = started(host, setting, graphs=not args.eager)
        for seed in range(count + WARM_UP):
            played = play(replicas, seed, prefix, size)
            for phase, generation in played.items() if seed >= WARM_UP else ():
                answers.setdefault(phase, []).append(generation)
            print(f"  {seed + 1}/{count + WARM_UP}", end="\r", file=sys.stderr, flush=True)
        steady, steady_hooks = steady_rounds(replicas, max(2, count // 2), size)
        busy = busy_rounds(replicas, max(2, count // 2), prefix, size)
        counters = replicas["B"].counters()
        transport = carried_by(replicas["B"])
    result = summary(answers, busy, steady)
    result["steady_hook_us_per_step"] = steady_hooks
    result["steady_hooks_over_step"] = round(sum(steady_hooks.values()) / 1e3 / result["steady_step_ms"]["A"], 4)
    loads = max(counters["vllm:kvmarket_loads"], 1)
    result["load_ms_mean"] = round(1e3 * counters["vllm:kvmarket_load_seconds"] / loads, 3)
    result |= {"transport": transport, "prefix_tokens": prefix, "kv_mib": prefix * size.kv_bytes_per_token(2) >> 20}
    result |= {"card_number": args.card, "source_card": args.source_card, "hidden": args.hide}
    result |= {"model_parameters": size.num_parameters, "prompts": count, "cuda_graphs": graphs}
    for phase, values in result["phases"].items():
        print(f"{phase:10}", *(f"{key} {value:>9.2f}" for key, value in values.items()))
    for key, value in result.items():
        if key != "phases":
            print(f"{key:56} {value}")
    print(json.dumps({"bench": "vllm_gpu", "card": card_name(), **result}))


if __name__ == "__main__":
    main()
