"""Two processes, one model of transformers: one computes a prompt, the other continues from what the first published.

    python examples/hf_share.py                                     # a small random model, on the CPU
    python examples/hf_share.py --model DIRECTORY --device cuda     # any causal model with full attention

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

import kvmarket
from kvmarket.testing.tiny_models import ModelSize, random_prompt, write_model
from kvmarket_hf import CacheMarket

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = ModelSize("example", 512, 1408, 8, 8, 4, 64)


def load(options: argparse.Namespace) -> Any:
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    return model.to(options.device).eval()


def generate(model: Any, prompt: list[int], cache: Any = None, new_tokens: int = 16) -> tuple[list[int], Any]:
    """Return the greedy continuation and its cache."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    return output.sequences[0].tolist(), output.past_key_values


def serve(options: argparse.Namespace, prompt: list[int]) -> None:
    """The first process: compute, publish, and wait until nobody needs it any more."""
    model = load(options)
    with CacheMarket(model, config=settings(options)) as market:
        sequence, cache = generate(model, prompt)
        print(market.publish(sequence, cache), flush=True)
        sys.stdin.read()


def continue_from(options: argparse.Namespace, prompt: list[int]) -> dict[str, Any]:
    """The second process: the same prompt, alone and with what the first one published."""
    model = load(options)
    alone, _ = generate(model, prompt)
    with CacheMarket(model, config=settings(options)) as market:
        fetched = market.fetch(prompt)
        shared, _ = generate(model, prompt, fetched.cache)
        alone_s = timed(lambda: generate(model, prompt, None, 1))
        shared_s = timed(lambda: generate(model, prompt, market.fetch(prompt).cache, 1))
    return {
        "tokens": len(prompt),
        "tokens_fetched": fetched.tokens,
        "reason": str(fetched.reason),
        "transport": [f"{transfer.transport}: {transfer.path}" for transfer in fetched.transfers],
        "fetch_ms": round(fetched.seconds * 1e3, 2),
        "first_token_computed_ms": round(alone_s * 1e3, 1),
        "first_token_fetched_ms": round(shared_s * 1e3, 1),
        "tokens_identical": alone == shared,
    }


def timed(work: Callable[[], object]) -> float:
    """Return the least seconds of three."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def settings(options: argparse.Namespace) -> kvmarket.MarketConfig:
    return kvmarket.MarketConfig.from_env(runtime_dir=options.runtime_dir, fetch_deadline_s=10.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint directory; default: a small random model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--runtime-dir", help=argparse.SUPPRESS)
    options = parser.parse_args()
    prompt = random_prompt(options.tokens, seed=1, size=SMALL)
    if options.runtime_dir:
        serve(options, prompt)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        options.runtime_dir = str(Path(scratch) / "runtime")
        options.model = options.model or str(write_model(scratch, SMALL))
        names = ("model", "device", "dtype", "tokens", "runtime_dir")
        arguments = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
        command = [sys.executable, __file__, *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
            try:
                assert first.stdout  # noqa: S101 - for the type checker
                published = first.stdout.readline()
                if not published.strip():
                    print("the first process did not publish anything", file=sys.stderr)
                    return 1
                result = {"tokens_published": int(published), **continue_from(options, prompt)}
            finally:
                first.kill()
    print(json.dumps(result))
    return 0 if result["tokens_identical"] and result["tokens_fetched"] else 1


if __name__ == "__main__":
    sys.exit(main())
