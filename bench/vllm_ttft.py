"""Time to first token of a stock vLLM replica: computed, fetched from another replica, and found in its own cache.

Interleaved in one run, prompt by prompt; medians. "Fetched minus local" is what kvmarket costs over a perfect local
hit; beside it stands the physical limit, one memcpy of the same bytes in the same run. The last line is JSON.

    python bench/vllm_ttft.py [--model tiny|small] [--prompts 15] [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from common import MemcpyReference

from kvmarket.testing.shared_prefix import CONNECTOR, Round, carried_by, play_round
from kvmarket.testing.tiny_models import BENCH_MODEL, TINY_MODEL, write_model
from kvmarket.testing.vllm_replica import ReplicaConfig, ReplicaHost

MODELS = {"tiny": TINY_MODEL, "small": BENCH_MODEL}
PREFIX_TOKENS, TAIL_TOKENS = 1536, 32


def play(model: str, prompts: int) -> tuple[list[Round], list[float], str]:
    """Play the prompts; return the rounds, the memcpy seconds taken between them, and the transport."""
    size = MODELS[model]
    nbytes = PREFIX_TOKENS * size.kv_bytes_per_token()
    memcpy = MemcpyReference(nbytes)
    rounds: list[Round] = []
    copies: list[float] = []
    with tempfile.TemporaryDirectory(prefix="kvmarket-bench-") as scratch, ReplicaHost() as host:
        host.wait_ready(timeout_s=300)
        config = ReplicaConfig(
            model=write_model(Path(scratch), size),
            connector=CONNECTOR,
            kv_cache_bytes=4 * nbytes + (64 << 20),
            environ={"KVMARKET_RUNTIME_DIR": str(Path(scratch, "run"))},
        )
        a, b = host.launch(config), host.launch(config)
        for replica in (a, b):
            replica.wait_ready(timeout_s=300)
        for seed in range(prompts + 2):
            played = play_round(
                a, b, None, seed=seed, prefix_tokens=PREFIX_TOKENS, tail_tokens=TAIL_TOKENS, answer_tokens=2
            )
            copies.append(memcpy.contiguous())
            if seed >= 2:  # the first two warm up
                rounds.append(played)
            print(f"  {seed + 1}/{prompts + 2}", end="\r", file=sys.stderr, flush=True)
        transport = carried_by(b)
    return rounds, copies[2:], transport


def summary(model: str, rounds: list[Round], copies: list[float], transport: str) -> dict[str, object]:
    def median_ms(kind: str) -> float:
        return statistics.median(getattr(played, kind).ttft_s for played in rounds) * 1e3

    extra = statistics.median(played.fetched.ttft_s - played.local.ttft_s for played in rounds) * 1e3
    cold, fetched, local = median_ms("cold"), median_ms("fetched"), median_ms("local")
    return {
        "model": model,
        "kv_mib": round(PREFIX_TOKENS * MODELS[model].kv_bytes_per_token() / 2**20, 1),
        "external_tokens": min(played.external_tokens for played in rounds),
        "tokens_identical": all(played.identical for played in rounds),
        "ttft_cold_ms": round(cold, 2),
        "ttft_fetched_ms": round(fetched, 2),
        "ttft_local_hit_ms": round(local, 2),
        "fetched_minus_local_ms": round(extra, 2),
        "memcpy_ms": round(statistics.median(copies) * 1e3, 2),
        "cold_over_fetched": round(cold / fetched, 2),
        "fetched_over_local": round(fetched / local, 3),
        "transport": transport,
        "prompts": len(rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=(*MODELS, "both"), default="both", help="4M or 140M parameters, or both (default)"
    )
    parser.add_argument("--prompts", type=int, default=15, help="prompts per model (default 15)")
    parser.add_argument("--quick", action="store_true", help="the tiny model and three prompts")
    args = parser.parse_args()
    models = ["tiny"] if args.quick else list(MODELS) if args.model == "both" else [args.model]
    results = []
    for model in models:
        print(f"{model}: 1,536 + {TAIL_TOKENS} tokens, two replicas", file=sys.stderr)
        results.append(summary(model, *play(model, 3 if args.quick else args.prompts)))
    columns = {
        "model": ("model", 6),
        "KV MiB": ("kv_mib", 7),
        "cold ms": ("ttft_cold_ms", 9),
        "fetched": ("ttft_fetched_ms", 9),
        "local": ("ttft_local_hit_ms", 9),
        "fetched-local": ("fetched_minus_local_ms", 14),
        "memcpy": ("memcpy_ms", 8),
        "cold/fetched": ("cold_over_fetched", 13),
    }
    print(" ".join(f"{title:>{width}}" for title, (_, width) in columns.items()))
    for result in results:
        print(" ".join(f"{result[key]:>{width}}" for key, width in columns.values()))
    print(json.dumps({"bench": "vllm_ttft", "results": results}))


if __name__ == "__main__":
    main()
