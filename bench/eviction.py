"""Hit ratios and cost of the arena's eviction policies: popular prefixes by Zipf, with and without a scan in between.

The trace is of whole prompts: a prompt hits as many leading blocks as are resident, and is then published whole. The
scan is ten times the arena in prompts that nobody asks for again. Aim: the scan-resistant policy keeps the popular
prefixes (`kept` near 1), at a cost per block that is small beside the copy of the block.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common import log

from kvmarket.region.eviction import POLICIES, EvictionPolicy, make_policy

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCKS = 8
"""Blocks of one prompt."""
ZIPF = 1.0


def prompt(kind: str, number: int) -> list[bytes]:
    """Return the block keys of a prompt."""
    return [f"{kind}-{number}-{block}".encode() for block in range(BLOCKS)]


def zipf_trace(prompts: int, length: int, rng: random.Random) -> list[list[bytes]]:
    """Return `length` requests for `prompts` different prompts."""
    weights = [1 / (rank + 1) ** ZIPF for rank in range(prompts)]
    return [prompt("hot", number) for number in rng.choices(range(prompts), weights, k=length)]


@dataclass
class Cache:
    """What an arena does with its policy, without the memory."""

    policy: EvictionPolicy
    capacity: int

    def ask(self, keys: Sequence[bytes]) -> int:
        """Serve one prompt, publish it whole, and return the blocks that were there."""
        policy = self.policy
        hit = next((i for i, key in enumerate(keys) if key not in policy), len(keys))
        policy.touch(keys)
        new = [(key, parent) for key, parent in zip(keys, [None, *keys[:-1]], strict=True) if key not in policy]
        for key in keys[:hit]:
            policy.protect(key)
        while len(policy) + len(new) > self.capacity:
            policy.evict()
        for key in keys[:hit]:
            policy.unprotect(key)
        for key, parent in reversed(new):
            policy.insert(key, parent)
        return hit

    def ratio(self, trace: Sequence[Sequence[bytes]]) -> float:
        """Return the part of all blocks of a trace that was there."""
        return sum(self.ask(keys) for keys in trace) / sum(map(len, trace))


def measure(name: str, capacity: int, length: int, seed: int) -> dict[str, float]:
    """Return one policy's figures."""
    rng = random.Random(seed)
    prompts = capacity // BLOCKS * 2
    cache = Cache(make_policy(name, capacity), capacity)
    cache.ratio(zipf_trace(prompts, length, rng))
    began = time.perf_counter()
    steady = cache.ratio(zipf_trace(prompts, length, rng))
    seconds = time.perf_counter() - began
    scan = [prompt("scan", number) for number in range(10 * capacity // BLOCKS)]
    began_scan = time.perf_counter()
    cache.ratio(scan)
    scan_seconds = time.perf_counter() - began_scan
    after = cache.ratio(zipf_trace(prompts, capacity // BLOCKS, rng))
    return {
        "steady": round(steady, 4),
        "after_scan": round(after, 4),
        "kept": round(after / steady, 4),
        "ns_per_block": round(seconds / (length * BLOCKS) * 1e9),
        "ns_per_scanned_block": round(scan_seconds / (len(scan) * BLOCKS) * 1e9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small, for tests")
    parser.add_argument("--seed", type=int, default=1)
    quick, seed = (arguments := parser.parse_args()).quick, arguments.seed
    capacity, length = (800, 2000) if quick else (32_768, 40_000)
    result: dict[str, object] = {"bench": "eviction", "quick": quick, "capacity": capacity, "seed": seed}
    for name in POLICIES:
        log(f"{name}: {length} prompts of {BLOCKS} blocks, arena of {capacity} blocks")
        result[name] = measure(name, capacity, length, seed)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
