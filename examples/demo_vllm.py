"""The main job on one host: a stock vLLM replica serves a prefix that another replica has computed.

Three stock vLLM engines in three processes: A and B with the connector, C without. A computes a long shared prefix; B,
which has never seen it, fetches its KV cache from A's memory; C shows what the tokens must be. The last line is JSON.

    make demo
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from kvmarket.testing.shared_prefix import CONNECTOR, Round, carried_by, play_round
from kvmarket.testing.tiny_models import BENCH_MODEL, TINY_MODEL, ModelSize, write_model
from kvmarket.testing.vllm_replica import Replica, ReplicaConfig, ReplicaHost

KV_CACHE_BYTES = 512 << 20


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def show(seed: int, played: Round) -> None:
    say(
        f"  prompt {seed}: computed {played.cold.ttft_s * 1e3:7.1f} ms   "
        f"fetched {played.fetched.ttft_s * 1e3:6.1f} ms   local hit {played.local.ttft_s * 1e3:6.1f} ms   "
        f"{played.external_tokens} of {played.prompt_tokens} tokens "
        f"fetched   answers {'identical' if played.identical else 'DIFFER'}"
    )


def start(host: ReplicaHost, size: ModelSize, scratch: Path) -> list[Replica]:
    """Start A and B with the connector and C without."""
    say(f"writing a random {size.num_parameters / 1e6:.0f}M-parameter model (float32, nothing is downloaded)")
    model = write_model(scratch, size)
    say("importing vLLM (once, 5 to 20 s)")
    host.wait_ready(timeout_s=300)
    say("starting three stock vLLM replicas: A and B with the connector, C without")
    runtime = {"KVMARKET_RUNTIME_DIR": str(scratch / "run")}
    market = ReplicaConfig(model=model, connector=CONNECTOR, kv_cache_bytes=KV_CACHE_BYTES, environ=runtime)
    plain = ReplicaConfig(model=model, kv_cache_bytes=KV_CACHE_BYTES)
    replicas = [host.launch(config) for config in (market, market, plain)]
    for name, replica in zip("ABC", replicas, strict=True):
        replica.wait_ready(timeout_s=300)
        say(f"  replica {name} is up (pid {replica.pid})")
    return replicas


def report(rounds: list[Round], transport: str) -> int:
    """Print the outcome for people and for programs; return the exit status."""
    cold, fetched, local = (
        statistics.median(getattr(played, kind).ttft_s for played in rounds) * 1e3
        for kind in ("cold", "fetched", "local")
    )
    identical = all(played.identical for played in rounds)
    external, tokens = min(played.external_tokens for played in rounds), rounds[0].prompt_tokens
    print(f"\ntime to first token, median of {len(rounds)} prompts:")
    print(f"  computed (cold)   {cold:9.1f} ms")
    print(f"  fetched from A    {fetched:9.1f} ms   {cold / fetched:.1f} times faster than computing")
    print(f"  local cache hit   {local:9.1f} ms   fetching costs {fetched - local:+.1f} ms over it")
    print(f"  tokens fetched    {external:9d} of {tokens}, carried by {transport}")
    print(f"  greedy tokens     {'identical to a replica without the connector' if identical else 'DIFFERENT'}")
    outcome = {
        "tokens_identical": identical,
        "external_tokens": external,
        "prompt_tokens": tokens,
        "ttft_cold_ms": round(cold, 2),
        "ttft_fetched_ms": round(fetched, 2),
        "ttft_local_hit_ms": round(local, 2),
        "transport": transport,
        "prompts": len(rounds),
    }
    print(json.dumps(outcome))
    return 0 if identical and external >= 0.9 * tokens and transport != "none" else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=("small", "tiny"), default="small", help="140M or 4M parameters, random weights"
    )
    parser.add_argument("--rounds", type=int, default=3, help="prompts to play (default 3)")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    size = BENCH_MODEL if args.model == "small" else TINY_MODEL
    with tempfile.TemporaryDirectory(prefix="kvmarket-demo-") as scratch, ReplicaHost() as host:
        a, b, c = start(host, size, Path(scratch))
        say("warming up: one prompt through every replica")
        show(0, play_round(a, b, c, seed=0))
        say(f"{args.rounds} prompts that no replica has seen: A computes, B fetches, B has it; C has no kvmarket")
        rounds = []
        for seed in range(1, args.rounds + 1):
            rounds.append(play_round(a, b, c, seed=seed))
            show(seed, rounds[-1])
        transport = carried_by(b)
    return report(rounds, transport)


if __name__ == "__main__":
    sys.exit(main())
