"""How close does fetching come to memcpy? Two processes of one host, shared memory, pages published in place.

Every figure is a ratio to one thread's memcpy of as many bytes, taken in the same rounds: 1.0 is as fast as memcpy.

    copy      `copy_pages` from the mapped peer into this process, nothing else
    read      `Connection.read`: generations checked before and after every group
    scattered the fetcher's read into scattered pages: random ones, and for large pages one run per layer and K/V
    fetch     the whole `await marketplace.fetch(tokens)`: hashing, look-up, read, digests, liveness, report;
              ``known``: of a prompt whose hashes are remembered

Cases: 64 MiB as 32 pages of 2 MiB and as 2,048 pages of 32 KiB that lie in order; 1,000 pages of 32 KiB in random
places of a 128 MiB pool; one page of 4 KiB for the latency. Blocks are 16 tokens, hashed with SHA-256.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from common import MemcpyReference, Samples, finish, in_memory, interleave, log, percentile, timed

from kvmarket import FetchReport, KVCacheSpec, MarketConfig, Marketplace
from kvmarket.deadline import Deadline
from kvmarket.hashing import hash_blocks
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.region.memory import map_peer_memory, private_huge_pages
from kvmarket.region.pages import PagedMemory, PageLayout, Segment, copy_pages
from kvmarket.registry import block_keys
from kvmarket.transport import ReadRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection as Pipe

MODEL = "bench"
VERIFY = ("full", "sampled", "none")
ROUNDS, QUICK_ROUNDS = 25, 2
LATENCY_ROUNDS, QUICK_LATENCY_ROUNDS = 2000, 50
DEADLINE_S = 60.0
START_S = 60.0
AIMS = {"contiguous": 0.95, "blocks": 0.85}


@dataclass(frozen=True)
class Case:
    """One prompt: `blocks` pages of `spec`, in order or in random places of a pool of `pool` pages."""

    name: str
    spec: KVCacheSpec
    blocks: int
    pool: int
    random: bool

    @property
    def nbytes(self) -> int:
        return self.blocks * self.spec.page_bytes

    @property
    def tokens(self) -> np.ndarray:
        return np.random.default_rng(7).integers(0, 128_000, self.blocks * self.spec.block_size, np.uint32)

    @property
    def pages(self) -> np.ndarray:
        if self.random:
            return np.random.default_rng(8).permutation(self.pool)[: self.blocks]
        return np.arange(self.blocks) + (self.pool - self.blocks) // 2

    def contents(self) -> np.ndarray:
        """(pool, page_bytes): what the owner's pages hold, known to both sides without telling."""
        data = np.random.default_rng(9).bytes(self.pool * self.spec.page_bytes)
        return np.frombuffer(data, np.uint8).reshape(self.pool, self.spec.page_bytes)


def _spec(num_layers: int, num_kv_heads: int, head_size: int) -> KVCacheSpec:
    return KVCacheSpec(num_layers, num_kv_heads, head_size, "bfloat16", block_size=16)


CASES = (
    Case("contiguous", _spec(32, 8, 128), 32, 40, random=False),
    Case("small_pages", _spec(8, 1, 64), 2048, 2080, random=False),
    Case("blocks", _spec(8, 1, 64), 1000, 4096, random=True),
    Case("latency", _spec(1, 1, 64), 1, 64, random=True),
)


# ---- the owner's process


def own(directory: str, pipe: Pipe) -> None:
    """Publish every case in place, then do nothing until told to stop; answer with the CPU seconds spent meanwhile."""
    config = MarketConfig(registry=f"lmdb://{directory}", transport="shm")
    marketplaces = [_publish(case, config) for case in CASES]
    pipe.send("ready")
    began = time.process_time()
    pipe.recv()
    pipe.send(time.process_time() - began)
    for marketplace in marketplaces:
        asyncio.run(marketplace.aclose())


def _publish(case: Case, config: MarketConfig) -> Marketplace:
    marketplace = Marketplace(f"{MODEL}-{case.name}", case.spec, config=config)
    memory, pages = marketplace.allocate(case.pool)
    pages[:] = case.contents()
    core = marketplace.core
    region = core.lend(PagedMemory(PageLayout.packed(*pages.shape), (memory.array,)), [memory])
    publisher = core.publisher(region)
    publisher.offer(_keys(marketplace, case), case.pages.tolist())
    publisher.flush(Deadline(DEADLINE_S))
    return marketplace


def _keys(marketplace: Marketplace, case: Case) -> list[bytes]:
    return block_keys(hash_blocks(case.tokens, case.spec.block_size, root=marketplace.namespace.digest))


# ---- the reader


class Reader:
    """The operations of one case, with everything set up, touched and proven right once."""

    def __init__(self, case: Case, directory: str) -> None:
        self.case, self.tokens = case, case.tokens
        self.markets = {
            verify: Marketplace(
                f"{MODEL}-{case.name}",
                case.spec,
                config=MarketConfig(
                    registry=f"lmdb://{directory}", transport="shm", verify=verify, fetch_deadline_s=DEADLINE_S
                ),
            )
            for verify in VERIFY
        }
        self.out = private_huge_pages(case.nbytes).reshape(case.blocks, case.spec.page_bytes)
        self.local = PagedMemory.packed(self.out)
        self.reports: dict[str, FetchReport] = {}
        self.copy_seconds: list[float] = []

    async def prove(self) -> None:
        """Fetch once in every way and compare the bytes with what the owner wrote."""
        expected = self.case.contents()[self.case.pages]
        for verify, market in self.markets.items():
            result = await market.fetch(self.tokens, out=self.out)
            if result.report.blocks_adopted != self.case.blocks or not np.array_equal(result.kv, expected):
                raise SystemExit(f"{self.case.name}, verify={verify}: wrong result: {result.report}")

    def fetch(self, verify: str, out: np.ndarray | None, *, known: bool = False) -> Callable[[], Any]:
        market = self.markets[verify]
        name = f"fetch_{verify}" + ("" if out is None else "_out") + ("_known" if known else "")

        async def run() -> float:
            if not known:
                market._prefix_keys.clear()  # noqa: SLF001 - a prompt that was never seen has to be hashed
            began = time.perf_counter()
            result = await market.fetch(self.tokens, out=out)
            seconds = time.perf_counter() - began
            self.reports[name] = result.report
            if result.report.blocks_adopted != self.case.blocks:
                raise SystemExit(f"{self.case.name}: not all was fetched: {result.report}")
            return seconds

        return run

    def operations(self) -> dict[str, Callable[[], Any]]:
        core = self.markets["full"].core
        found, _, _ = core.fetcher.lookup(_keys(self.markets["full"], self.case))
        owner = next(iter(found.owners.values()))
        region = int(found.records["region"][0])
        wire = core.registry.region(owner.owner, region)
        if wire is None:
            raise SystemExit("the owner is gone")
        descriptor = RegionDescriptor.from_wire(wire)
        peer = PagedMemory(descriptor.layout, tuple(map_peer_memory(address) for address in descriptor.memories))
        connection = core.transports.connection(owner, region, lambda: descriptor)
        pages, generations = found.records["page"].copy(), found.records["generation"].copy()
        order = np.arange(self.case.blocks)
        request = ReadRequest(pages, generations, self.local, order)
        scattered, scattered_pages = self._scattered()
        none = self.markets["none"].core.fetcher

        def read() -> float:
            report = connection.read(request, deadline=Deadline(DEADLINE_S))
            self.copy_seconds.append(report.copy_seconds)
            return report.seconds

        fetches = {
            f"fetch_{verify}" + ("" if out is None else "_out"): self.fetch(verify, out)
            for verify in VERIFY
            for out in (self.out, None)
        }
        return {
            "copy": timed(lambda: copy_pages(peer, pages, self.local, order)),
            "read": read,
            "scattered": timed(lambda: none.read(found, scattered, scattered_pages, Deadline(DEADLINE_S))),
            **fetches,
            "fetch_full_out_known": self.fetch("full", self.out, known=True),
        }

    def _scattered(self) -> tuple[PagedMemory, np.ndarray]:
        """A destination like an engine's: random pages, and for large pages one run per layer and K/V."""
        case = self.case
        runs = 2 * case.spec.num_layers if case.spec.page_bytes > 1 << 20 else 1
        nbytes = case.spec.page_bytes // runs
        segments = tuple(Segment(0, i * case.blocks * nbytes, nbytes, nbytes) for i in range(runs))
        memory = PagedMemory(PageLayout(case.blocks, segments), (private_huge_pages(case.nbytes),))
        return memory, np.random.default_rng(10).permutation(case.blocks)

    async def close(self) -> None:
        for market in self.markets.values():
            await market.aclose()


async def measure(case: Case, directory: str, rounds: int) -> dict[str, Any]:
    """Measure one case and print its table."""
    reader = Reader(case, directory)
    await reader.prove()
    reference = MemcpyReference(case.nbytes)
    operations = reader.operations()
    if case.random:
        operations["memcpy_blocks"] = reference.blocks(np.random.default_rng(11).permutation(case.blocks))
    samples = await interleave(operations, reference.contiguous, rounds)
    result = {name: samples.ratio(name) for name in operations}
    _table(case, samples, reader)
    stages = {name: {k: v * 1e3 for k, v in report.stages.items()} for name, report in reader.reports.items()}
    await reader.close()
    gbps = case.nbytes / statistics.median(samples.reference) / 1e9
    cpu = {name: statistics.median(samples.cpu[name]) for name in ("fetch_full_out", "fetch_none_out")}
    return {**result, "memcpy_gbps": gbps, "cpu_s": cpu, "last_stages_ms": stages["fetch_full_out"]}


def _table(case: Case, samples: Samples, reader: Reader) -> None:
    memcpy = statistics.median(samples.reference)
    print(f"\n{case.name}: {case.blocks:,} pages of {case.spec.page_bytes >> 10:,} KiB, {case.nbytes / 2**20:.1f} MiB")
    print(f"  {'':18}{'ms':>8}{'GB/s':>8}{'of memcpy':>11}{'CPU ms':>8}   stages of the last one, ms")
    print(f"  {'memcpy':18}{memcpy * 1e3:8.3f}{case.nbytes / memcpy / 1e9:8.2f}{1:11.3f}{memcpy * 1e3:8.2f}")
    for name in samples.seconds:
        seconds, cpu = samples.median(name), statistics.median(samples.cpu[name])
        line = f"  {name:18}{seconds * 1e3:8.3f}{case.nbytes / seconds / 1e9:8.2f}{samples.ratio(name):11.3f}"
        stages = reader.reports[name].stages if name in reader.reports else {}
        shown = " ".join(f"{stage} {value * 1e3:.3f}" for stage, value in stages.items())
        print(f"{line}{cpu * 1e3:8.2f}   {shown}")
    within = statistics.median(reader.copy_seconds[-len(samples.reference) :])
    print(f"  (inside read, the copies alone: {within * 1e3:.3f} ms, {memcpy / within:.3f} of memcpy)")


async def latency(case: Case, directory: str, rounds: int) -> dict[str, Any]:
    """Measure a small fetch."""
    reader = Reader(case, directory)
    await reader.prove()
    result: dict[str, Any] = {}
    print(f"\n{case.name}: one page of {case.spec.page_bytes >> 10} KiB, {rounds} fetches")
    for name, out in (("fetch_full_out", reader.out), ("fetch_full", None)):
        run = reader.fetch("full", out)
        cpu = time.process_time()
        seconds = [await run() for _ in range(rounds)]
        cpu_each = (time.process_time() - cpu) / rounds
        result[name] = {"p50_us": percentile(seconds, 50) * 1e6, "p99_us": percentile(seconds, 99) * 1e6}
        result[name]["cpu_us"] = cpu_each * 1e6
        shown = " ".join(f"{stage} {value * 1e6:.0f}" for stage, value in reader.reports[name].stages.items())
        print(f"  {name:18}" + "  ".join(f"{k} {v:.0f}" for k, v in result[name].items()) + f"   us: {shown}")
    await reader.close()
    return result


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it works, not how fast it is")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds per case (default: %(default)s)")
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append", help="only this case")
    args = parser.parse_args()
    rounds = QUICK_ROUNDS if args.quick else args.rounds
    directory = tempfile.mkdtemp(prefix="kvmarket-bench-", dir=in_memory())
    here, there = multiprocessing.get_context("spawn").Pipe()
    owner = multiprocessing.get_context("spawn").Process(target=own, args=(directory, there), daemon=True)
    try:
        log("starting the owner")
        owner.start()
        there.close()
        if not here.poll(START_S):
            raise SystemExit(f"the owner did not publish within {START_S:g} s")
        here.recv()
        result = asyncio.run(_all(args.case, directory, rounds, quick=args.quick))
        here.send("stop")
        result["owner_cpu_s"] = here.recv()
        owner.join(10)
    finally:
        if owner.is_alive():
            owner.kill()
        shutil.rmtree(directory, ignore_errors=True)
    _verdict(result)
    finish({"bench": "fetch", "quick": args.quick, "aims": AIMS, **result})


async def _all(only: list[str] | None, directory: str, rounds: int, *, quick: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for case in CASES:
        if only and case.name not in only:
            continue
        log(f"measuring {case.name}")
        if case.name == "latency":
            result[case.name] = await latency(case, directory, QUICK_LATENCY_ROUNDS if quick else LATENCY_ROUNDS)
        else:
            result[case.name] = await measure(case, directory, rounds)
    return result


def _verdict(result: dict[str, Any]) -> None:
    print()
    for name, aim in AIMS.items():
        for what in ("copy", "fetch_full_out"):
            if name in result:
                reached = result[name][what]
                print(f"{name}, {what}: {reached:.3f} of memcpy, aim {aim} {'reached' if reached >= aim else 'MISSED'}")


if __name__ == "__main__":
    _main()
