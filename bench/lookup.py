"""How long does it take to find the longest published prefix in a registry of 1,000,000 blocks?

Another process announces the blocks of token chains (16 tokens a block, SHA-256) into an embedded registry and stays
alive; this one looks prefixes of 256 blocks up. Two shapes of traffic:

    chats   64 system prompts of 64 blocks, each continued by conversations of 192 blocks
    hot     one system prompt of 150 blocks with thousands of tails of 106: they part in the middle of a run of blocks

Measured for a prompt that is held whole, half, or not at all: `registry.lookup` given the keys; the fetcher's look-up,
which on a miss also says why; `await marketplace.match(tokens)`, which hashes the tokens too; and beside them the same
question to a plain dict of this process, the limit of anything written in Python. Aim: p50 of `registry.lookup`, all
256 blocks found, of at most 0.2 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import finish, in_memory, log, percentile

from kvmarket import KVCacheSpec, MarketConfig, Marketplace
from kvmarket.hashing import hash_blocks
from kvmarket.registry import block_keys
from kvmarket.registry.records import make_records

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from multiprocessing.connection import Connection as Pipe

SPEC = KVCacheSpec(32, 8, 128, "bfloat16", block_size=16)
BLOCKS, QUICK_BLOCKS = 1_000_000, 20_000
ASKED = 256
LOOKUPS, QUICK_LOOKUPS = 2000, 40
ANNOUNCE_BATCH = 256
AIM_S = 0.2e-3
START_S = 300.0
REGISTRY_BYTES = 1 << 30


@dataclass(frozen=True)
class Shape:
    """A forest of token chains: `stems` shared prefixes, each followed by its share of tails."""

    name: str
    stems: int
    stem_blocks: int

    def tails(self, blocks: int) -> int:
        """How many tails make `blocks` blocks in all."""
        return max(1, (blocks - self.stems * self.stem_blocks) // (ASKED - self.stem_blocks))

    def tokens(self, tail: int) -> np.ndarray:
        """The tokens of one chain of `ASKED` blocks."""
        stem = np.random.default_rng((1, tail % self.stems)).integers(0, 128_000, 16 * self.stem_blocks, np.uint32)
        own = np.random.default_rng((2, tail)).integers(0, 128_000, 16 * (ASKED - self.stem_blocks), np.uint32)
        return np.concatenate([stem, own])

    def new_keys(self, root: bytes, blocks: int) -> Iterator[list[bytes]]:
        """The keys that each chain adds to those before it."""
        for tail in range(self.tails(blocks)):
            keys = block_keys(hash_blocks(self.tokens(tail), SPEC.block_size, root=root))
            yield keys if tail < self.stems else keys[self.stem_blocks :]


SHAPES = (Shape("chats", 64, 64), Shape("hot", 1, 150))


def market(shape: Shape, directory: str) -> Marketplace:
    """A marketplace of this process on the registry of one shape."""
    config = MarketConfig(registry=f"lmdb://{directory}/{shape.name}", registry_bytes=REGISTRY_BYTES, transport="shm")
    return Marketplace("bench", SPEC, config=config)


# ---- the owner's process


def own(directory: str, shape: Shape, blocks: int, pipe: Pipe) -> None:
    """Announce all blocks, report how fast, and stay alive until told to stop."""
    marketplace = market(shape, directory)
    registry, digest, owner = marketplace.core.registry, marketplace.namespace.digest, marketplace.core.owner.owner
    chains = [key for keys in shape.new_keys(digest, blocks) for key in keys]
    rng = np.random.default_rng(3)
    spent = 0.0
    for start in range(0, len(chains), ANNOUNCE_BATCH):
        keys = chains[start : start + ANNOUNCE_BATCH]
        digests = [rng.bytes(16) for _ in keys]
        began = time.perf_counter()
        pages = np.arange(start, start + len(keys))
        records = make_records(owner, 0, pages, np.full(len(keys), 2, np.uint64), digests)
        announced = registry.announce(digest, registry.epoch(digest), keys, records)
        spent += time.perf_counter() - began
        if not announced:
            raise SystemExit("the registry refused")
        if start % (100 * ANNOUNCE_BATCH) == 0:
            log(f"  announced {start:,}")
    pipe.send((len(chains), spent))
    with contextlib.suppress(EOFError):
        pipe.recv()
    asyncio.run(marketplace.aclose())


# ---- the process that looks up


def prompts(shape: Shape, blocks: int, share: float) -> Iterator[np.ndarray]:
    """Endless prompts of `ASKED` blocks whose leading `share` is published."""
    choose = random.Random(4)
    for number in range(1 << 30):
        tokens = shape.tokens(choose.randrange(shape.tails(blocks)))
        known = int(ASKED * share) * SPEC.block_size
        fresh = np.random.default_rng((5, number)).integers(0, 128_000, len(tokens) - known, np.uint32)
        yield np.concatenate([tokens[:known], fresh])


async def measure(shape: Shape, blocks: int, marketplace: Marketplace, count: int) -> dict[str, Any]:
    """Time every kind of look-up on prompts that were not asked for before."""
    registry, digest = marketplace.core.registry, marketplace.namespace.digest
    index = {key: number for number, key in enumerate(_all_keys(shape, digest, blocks))}
    result: dict[str, Any] = {}
    for kind, share in (("hit", 1.0), ("half", 0.5), ("miss", 0.0)):
        source = prompts(shape, blocks, share)
        asked = [next(source) for _ in range(count)]
        keys = [block_keys(hash_blocks(tokens, SPEC.block_size, root=digest)) for tokens in asked]
        expected = int(ASKED * share)
        result[kind] = {
            "registry": _time(keys, lambda k: registry.lookup(digest, k).blocks, expected),
            "fetcher": _time(keys, lambda k: marketplace.core.fetcher.lookup(k)[0].blocks, expected),
            "match": await _time_async(asked, marketplace.match, expected),
            "dict": _time(keys, lambda k: _longest(index, k), expected),
        }
    return result


def _all_keys(shape: Shape, digest: bytes, blocks: int) -> Iterator[bytes]:
    for keys in shape.new_keys(digest, blocks):
        yield from keys


def _longest(index: dict[bytes, int], keys: list[bytes]) -> int:
    for number, key in enumerate(keys):
        if key not in index:
            return number
    return len(keys)


def _time(questions: list[list[bytes]], ask: Callable[[list[bytes]], int], expected: int) -> dict[str, float]:
    seconds = []
    for question in questions:
        began = time.perf_counter()
        found = ask(question)
        seconds.append(time.perf_counter() - began)
        if found != expected:
            raise SystemExit(f"found {found} blocks, expected {expected}")
    return _summary(seconds)


async def _time_async(
    prompts: list[np.ndarray], match: Callable[[np.ndarray], Awaitable[Any]], expected: int
) -> dict[str, float]:
    seconds = []
    for tokens in prompts:
        began = time.perf_counter()
        report = await match(tokens)
        seconds.append(time.perf_counter() - began)
        if report.blocks != expected:
            raise SystemExit(f"matched {report.blocks} blocks, expected {expected}")
    return _summary(seconds)


def _summary(seconds: list[float]) -> dict[str, float]:
    return {"p50_ms": percentile(seconds, 50) * 1e3, "p99_ms": percentile(seconds, 99) * 1e3}


def _file_bytes(registry_directory: Path) -> int:
    """Bytes the registry file takes on its file system."""
    return sum(path.stat().st_blocks * 512 for path in registry_directory.glob("registry.lmdb"))


def run_shape(shape: Shape, directory: str, blocks: int, count: int) -> dict[str, Any]:
    """Fill one registry from another process, measure, print."""
    log(f"{shape.name}: announcing {blocks:,} blocks")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    owner = context.Process(target=own, args=(directory, shape, blocks, there), daemon=True)
    owner.start()
    there.close()
    try:
        if not here.poll(START_S):
            raise SystemExit(f"the owner did not announce within {START_S:g} s")
        announced, seconds = here.recv()
        log(f"{shape.name}: looking up")
        result = asyncio.run(_looked_up(shape, directory, blocks, count))
        result["blocks"] = announced
        result["announce_blocks_per_s"] = announced / seconds
        result["bytes_per_block"] = _file_bytes(Path(directory) / shape.name) / announced
    finally:
        here.close()
        owner.join(5)
        if owner.is_alive():
            owner.kill()
    _table(shape, result)
    return result


async def _looked_up(shape: Shape, directory: str, blocks: int, count: int) -> dict[str, Any]:
    async with market(shape, directory) as marketplace:
        return await measure(shape, blocks, marketplace, count)


def _table(shape: Shape, result: dict[str, Any]) -> None:
    print(
        f"\n{shape.name}: {result['blocks']:,} blocks, {result['bytes_per_block']:.0f} bytes of file per block, "
        f"announced {result['announce_blocks_per_s']:,.0f} blocks/s"
    )
    print(f"  {'p50 / p99, ms':14}{'registry':>16}{'fetcher':>16}{'match':>16}{'dict':>16}")
    for kind in ("hit", "half", "miss"):
        cells = "".join(f"{row['p50_ms']:9.3f}/{row['p99_ms']:6.3f}" for row in result[kind].values())
        print(f"  {kind:14}{cells}")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small registry: shows that it works")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="blocks per registry (default: %(default)s)")
    parser.add_argument("--lookups", type=int, default=LOOKUPS, help="look-ups of each kind (default: %(default)s)")
    parser.add_argument("--shape", choices=[shape.name for shape in SHAPES], action="append", help="only this shape")
    args = parser.parse_args()
    blocks, count = (QUICK_BLOCKS, QUICK_LOOKUPS) if args.quick else (args.blocks, args.lookups)
    directory = tempfile.mkdtemp(prefix="kvmarket-bench-", dir=in_memory())
    try:
        result = {
            shape.name: run_shape(shape, directory, blocks, count)
            for shape in SHAPES
            if not args.shape or shape.name in args.shape
        }
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print()
    for name, shape_result in result.items():
        reached = shape_result["hit"]["registry"]["p50_ms"]
        verdict = "reached" if reached <= AIM_S * 1e3 else "MISSED"
        print(f"{name}: registry.lookup p50 {reached:.3f} ms, aim {AIM_S * 1e3} ms {verdict}")
    finish({"bench": "lookup", "quick": args.quick, "aim_ms": AIM_S * 1e3, "asked_blocks": ASKED, **result})


if __name__ == "__main__":
    _main()
