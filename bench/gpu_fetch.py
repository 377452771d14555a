"""Fetching KV pages between two processes, of one card or of two, beside a plain copy of the same bytes in that run.

1 GiB of KV is 512 blocks of 16 tokens of an 8B model (32 layers, 8 KV heads of 128, bfloat16), in 64 slices of 32 KiB a
block, scattered on both sides. Interleaved rounds, medians; ratios are taken round by round. Beside that, the same
calls in a row. The last line is JSON.

    python bench/gpu_fetch.py [--rounds 30] [--quick] [--peers] [--prefill] [--card 0 --source-card 1]

``--peers`` also runs NIXL with GET enabled and ucxx's tags, each between two processes of their own (gpu_peers.py), if
they are installed; ``--prefill`` computes 8,192 tokens with a random model of that shape (gpu_prefill.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from common import parse_with_cards
from gpu_beside import beside, cost

from kvmarket import Marketplace
from kvmarket.config import MarketConfig, default_runtime_dir
from kvmarket.core import MarketCore
from kvmarket.cuda import cuda_pages
from kvmarket.deadline import Deadline
from kvmarket.hashing import hash_blocks, token_array
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.prefix_keys import PrefixKeys
from kvmarket.region.pages import PageLayout, Segment
from kvmarket.registry import block_keys
from kvmarket.spec import KVCacheSpec
from kvmarket.testing.peers import PeerPool
from kvmarket.transport import ReadRequest
from kvmarket.transport.cuda_runtime import load_cuda

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    from kvmarket.region.cuda import CudaPagedMemory

LARGE = KVCacheSpec(32, 8, 128, "bfloat16", 16, layout="LKNHC")
SMALL = KVCacheSpec(32, 8, 128, "bfloat16", 8, layout="LKNHC")
"""One block of it is 1 MiB."""
MIB, GIB = 1 << 20, 1 << 30
SLICE_COPIES = 2048
LEVELS = ("kernel", "kernel_sum", "read", "read_found", "fetch_again", "fetch", "market_fetch")
"""One launch; one with digests; the transport's read; reading, verifying and liveness of blocks looked up before; that
with a look-up, of a prompt hashed before; that with hashing, as for the first time; the asyncio facade, into one packed
tensor, of a prompt that it has hashed before."""


def engine_pages(spec: KVCacheSpec, num_pages: int, seed: int, card: int = 0) -> tuple[CudaPagedMemory, list[Any]]:
    """Make one tensor per layer, (2, pages, tokens, heads, width), filled at random, as engines keep their KV cache."""
    import torch

    device = torch.device("cuda", card)
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (2, num_pages, spec.block_size, spec.num_kv_heads, spec.head_size)
    tensors = []
    for _ in range(spec.num_layers):
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        tensor.view(torch.int16).random_(generator=generator)
        tensors.append(tensor)
    torch.cuda.synchronize(device)
    half = spec.page_bytes // spec.num_layers // 2
    segments = [Segment(i, kv * num_pages * half, half, half) for i in range(spec.num_layers) for kv in range(2)]
    return cuda_pages(PageLayout(num_pages, tuple(segments)), tensors), tensors


def settings(runtime_dir: str) -> MarketConfig:
    return MarketConfig(runtime_dir=runtime_dir, fetch_deadline_s=20)


def namespace(spec: KVCacheSpec) -> Namespace:
    return Namespace(ModelIdentity("bench"), spec, "sha256")


def tokens_of(spec: KVCacheSpec, blocks: int) -> np.ndarray:
    return np.arange(blocks * spec.block_size, dtype=np.int64)


def keys_of(spec: KVCacheSpec, blocks: int) -> list[bytes]:
    hashes = hash_blocks(tokens_of(spec, blocks), spec.block_size, root=namespace(spec).digest, algorithm="sha256")
    return block_keys(hashes)


def publish(state: SimpleNamespace, runtime_dir: str, sizes: dict[str, int], card: int) -> dict[str, list[int]]:
    """In the owner: lend memory twice the size of what is published, in random pages; return which."""
    state.kept, placed = [], {}
    for name, blocks in sizes.items():
        spec = {"large": LARGE, "small": SMALL}[name]
        core = MarketCore(namespace(spec), settings(runtime_dir))
        pages, tensors = engine_pages(spec, 2 * blocks, blocks, card)
        publisher = core.publisher(core.lend(pages))
        order = np.random.default_rng(blocks).permutation(2 * blocks)[:blocks].tolist()
        began = time.perf_counter()
        publisher.offer(keys_of(spec, blocks), order)
        publisher.flush(Deadline(30))
        state.kept.append((core, tensors, time.perf_counter() - began))
        placed[name] = order
    return placed


def require(holds: bool, what: object) -> None:  # noqa: FBT001 - like an assertion
    if not holds:
        raise RuntimeError(str(what))


class Side:
    """The reader's side of one spec: a market, a connection below it, and scattered pages to read into."""

    def __init__(self, spec: KVCacheSpec, runtime_dir: str, blocks: int, pages: list[int], card: int) -> None:
        import torch

        self.card, self.stages = card, {}
        self.spec, self.blocks, self.nbytes = spec, blocks, blocks * spec.page_bytes
        self.market = Marketplace(ModelIdentity("bench"), spec, config=settings(runtime_dir))
        self.core = self.market.core
        self.local, self.tensors = engine_pages(spec, 2 * blocks, 0, card)
        self.local_pages = np.random.default_rng(7).permutation(2 * blocks)[:blocks]
        self.tokens = tokens_of(spec, blocks)
        self.prefix_keys = PrefixKeys(self.core.namespace.digest, spec.block_size, "sha256")
        self.out = torch.empty((blocks, spec.page_bytes), dtype=torch.uint8, device=self.tensors[0].device)
        found, reason, detail = self.core.fetcher.lookup(keys_of(spec, blocks))
        require(found.blocks == blocks, (reason, detail))
        owner = found.owners[int(found.records["owner"][0])]
        self.connection = self.core.fetcher._connect(owner, int(found.records["region"][0]))  # noqa: SLF001
        self.request = ReadRequest(
            np.array(pages), found.records["generation"].astype(np.uint64), self.local, self.local_pages
        )

    def read(self) -> None:
        """The transport alone: generations, launches, generations."""
        report = self.connection.read(self.request, deadline=Deadline(20))
        require(report.pages == self.blocks, report.refused)

    def fetch(self) -> None:
        """Everything: hash the tokens, look them up, read into scattered pages, verify."""
        self.prefix_keys.clear()
        self._whole_fetch("fetch")

    def fetch_again(self) -> None:
        """The same for a prompt that was hashed before, as in `Marketplace`."""
        self._whole_fetch("fetch_again")

    def _whole_fetch(self, level: str) -> None:
        groups = self.prefix_keys.groups(token_array(self.tokens))
        outcome = self.core.fetcher.fetch(groups, self.local, self.local_pages, Deadline(20)).outcome
        require(outcome.blocks == self.blocks, outcome)
        for name, seconds in outcome.stages.items():
            self.stages.setdefault(f"{level} {name}", []).append(seconds)

    def read_found(self) -> None:
        """What of `fetch` comes behind the look-up."""
        found, _, _ = self._found
        outcome = self.core.fetcher.read(found, self.local, self.local_pages, Deadline(20))
        require(outcome.blocks == self.blocks, outcome)

    def look_up(self) -> None:
        """Once, for `read_found`."""
        self._found = self.core.fetcher.lookup(keys_of(self.spec, self.blocks))

    async def market_fetch(self) -> None:
        """`Marketplace.fetch` into one packed tensor."""
        result = await self.market.fetch(self.tokens, out=self.out)
        require(result.report.blocks_adopted == self.blocks, result.report)

    def check(self, placed: list[int]) -> None:
        """Compare what was read with what the owner's generator makes of the same seed."""
        import torch

        _, expected = engine_pages(self.spec, 2 * self.blocks, self.blocks, self.card)
        device = self.tensors[0].device
        order, local = torch.tensor(placed, device=device), torch.tensor(self.local_pages, device=device)
        for tensor, wanted in zip(self.tensors, expected, strict=True):
            same = torch.equal(tensor[:, local].view(torch.int16), wanted[:, order].view(torch.int16))
            require(same, "other bytes arrived than were published")


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def on_card(cupy: Any, stream: Any, idle: Any, work: Callable[[], object]) -> float:
    """Return the seconds that `work`, launched on `stream`, takes by the card's clock.

    The card is kept busy while the host launches, so that the host's part is not counted.
    """
    start, end, runtime = cupy.cuda.Event(), cupy.cuda.Event(), cupy.cuda.runtime
    with stream:
        runtime.memsetAsync(idle.data.ptr, 0, idle.nbytes, stream.ptr)
        start.record(stream)
        work()
        end.record(stream)
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3


def kernel_launch(side: Side, *, digest: bool = False) -> Callable[[], None]:
    """Return a function that launches the copy kernel for all pages, with its tables on the card already."""
    cuda = load_cuda()
    source = side.connection._source(side.card)  # noqa: SLF001
    return cuda.work.launcher(source, side.request.pages, side.local, side.request.local_pages, digest=digest)


def d2d(cupy: Any, nbytes: int, stream: Any, source_card: int) -> Callable[[], None]:
    """Return what copies to this process's card from `source_card`: within the card, or from peer to peer."""
    runtime = cupy.cuda.runtime
    with cupy.cuda.Device(source_card):
        a = cupy.zeros(nbytes, cupy.uint8)
        a.reshape(-1, MIB)[:] = cupy.asarray(np.frombuffer(np.random.default_rng(0).bytes(MIB), np.uint8))
        cupy.cuda.runtime.deviceSynchronize()
    b = cupy.zeros(nbytes, cupy.uint8)
    return lambda: runtime.memcpyAsync(b.data.ptr, a.data.ptr, nbytes, runtime.memcpyDeviceToDevice, stream.ptr)


def per_slice(cupy: Any, nbytes: int, stream: Any) -> float:
    """Return the seconds of `SLICE_COPIES` copies of 32 KiB, one call each."""
    runtime, size = cupy.cuda.runtime, 32 << 10
    a, b = cupy.zeros(nbytes, cupy.uint8), cupy.zeros(nbytes, cupy.uint8)
    order = np.random.default_rng(3).permutation(nbytes // size)[:SLICE_COPIES].tolist()
    cupy.cuda.runtime.deviceSynchronize()
    began = time.perf_counter()
    for number, at in enumerate(order):
        runtime.memcpyAsync(
            b.data.ptr + number * size, a.data.ptr + at * size, size, runtime.memcpyDeviceToDevice, stream.ptr
        )
    stream.synchronize()
    return time.perf_counter() - began


async def measure(large: Side, small: Side, rounds: int, source_card: int) -> dict[str, Any]:
    cupy = load_cuda().cupy
    stream = cupy.cuda.Stream(non_blocking=True)
    copy, kernel = d2d(cupy, large.nbytes, stream, source_card), kernel_launch(large)
    kernel_sum, small_kernel_sum = kernel_launch(large, digest=True), kernel_launch(small, digest=True)
    small_copy, small_kernel = d2d(cupy, small.nbytes, stream, source_card), kernel_launch(small)
    seconds: dict[str, list[float]] = {}
    idle = cupy.zeros(256 * MIB, cupy.uint8)

    def note(name: str, value: float, number: int) -> None:
        if number >= 3:  # the first rounds warm up
            seconds.setdefault(name, []).append(value)

    small.look_up()
    large.look_up()
    for number in range(rounds + 3):
        note("d2d", on_card(cupy, stream, idle, copy), number)
        note("kernel", on_card(cupy, stream, idle, kernel), number)
        note("kernel_sum", on_card(cupy, stream, idle, kernel_sum), number)
        note("read", timed(large.read), number)
        note("read_found", timed(large.read_found), number)
        note("fetch_again", timed(large.fetch_again), number)
        note("fetch", timed(large.fetch), number)
        began = time.perf_counter()
        await large.market_fetch()
        note("market_fetch", time.perf_counter() - began, number)
        note("d2d_wall", timed(lambda: (copy(), stream.synchronize())), number)
    for number in range(10 * rounds + 3):
        note("small_d2d", on_card(cupy, stream, idle, small_copy), number)
        note("small_kernel", on_card(cupy, stream, idle, small_kernel), number)
        note("small_kernel_sum", on_card(cupy, stream, idle, small_kernel_sum), number)
        note("small_read", timed(small.read), number)
        note("small_read_found", timed(small.read_found), number)
        note("small_fetch_again", timed(small.fetch_again), number)
        note("small_fetch", timed(small.fetch), number)
        began = time.perf_counter()
        await small.market_fetch()
        note("small_market_fetch", time.perf_counter() - began, number)
    seconds["per_slice"] = [per_slice(cupy, large.nbytes, stream) for _ in range(4)][1:]
    return seconds


def in_a_row(side: Side, rounds: int) -> dict[str, float]:
    """Return the microseconds of each level called again and again, when caches hold what it needs: medians."""
    levels = (side.read, side.read_found, side.fetch_again, side.fetch)
    return {level.__name__: 1e6 * statistics.median(timed(level) for _ in range(rounds)) for level in levels}


def summary(seconds: dict[str, list[float]], large: Side, small: Side) -> dict[str, Any]:
    import torch

    def paired(name: str, reference: str) -> float:
        return statistics.median(r / s for r, s in zip(seconds[reference], seconds[name], strict=True))

    median = {name: statistics.median(values) for name, values in seconds.items()}
    scale = large.nbytes / 1e9
    result: dict[str, Any] = {
        "card": torch.cuda.get_device_name(0),
        "bytes": large.nbytes,
        "slices": large.blocks * 64,
        "gb_per_s": {name: scale / median[name] for name in ("d2d", "d2d_wall", *LEVELS)},
        "ratio_to_d2d": {name: paired(name, "d2d") for name in LEVELS},
        "fetch_ms": median["fetch"] * 1e3,
        "in_a_row_us": {"1 GiB": in_a_row(large, 30), "1 MiB": in_a_row(small, 100)},
        "cost": {"1 GiB": cost(large.fetch_again), "1 MiB": cost(small.fetch_again)},
        "stages_us": {
            name: {stage: statistics.median(values) * 1e6 for stage, values in side.stages.items()}
            for name, side in (("1 GiB", large), ("1 MiB", small))
        },
        "per_slice_memcpy_gb_per_s": SLICE_COPIES * (32 << 10) / 1e9 / median["per_slice"],
        "small_bytes": small.nbytes,
        "small_us": {name.removeprefix("small_"): median[name] * 1e6 for name in median if name.startswith("small_")},
        "small_p99_us": {
            name.removeprefix("small_"): float(np.percentile(seconds[name], 99)) * 1e6
            for name in median
            if name.startswith("small_")
        },
    }
    return result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="64 MiB and 3 rounds, to see that it runs")
    parser.add_argument("--peers", action="store_true", help="NIXL and ucxx beside it")
    parser.add_argument("--prefill", action="store_true", help="the prefill of the same tokens beside it")
    return parse_with_cards(parser)


def require_cards(card: int, source_card: int) -> None:
    """Refuse cards that this host has not, or that do not reach each other."""
    cuda = load_cuda()
    count = cuda.cupy.cuda.runtime.getDeviceCount()
    if not 0 <= min(card, source_card) <= max(card, source_card) < count:
        raise SystemExit(
            f"--card {card} and --source-card {source_card}: this host has {count} card(s), numbered from 0"
        )
    if not cuda.peer_access(card, source_card):
        raise SystemExit(f"cards {card} and {source_card} have no peer access to each other")


async def main() -> None:
    options = arguments()
    require_cards(options.card, options.source_card)
    load_cuda().cupy.cuda.Device(options.card).use()
    blocks, rounds = (32, 3) if options.quick else (GIB // LARGE.page_bytes, options.rounds)
    with PeerPool() as pool, tempfile.TemporaryDirectory(dir=default_runtime_dir().parent) as runtime_dir:
        owner = pool.spawn()
        placed = owner.call(publish, runtime_dir, {"large": blocks, "small": 1}, options.source_card, timeout_s=120)
        large = Side(LARGE, runtime_dir, blocks, placed["large"], options.card)
        small = Side(SMALL, runtime_dir, 1, placed["small"], options.card)
        for side, name in ((large, "large"), (small, "small")):
            side.fetch()
            side.check(placed[name])
        seconds = await measure(large, small, rounds, options.source_card)
        for side, name in ((large, "large"), (small, "small")):
            side.check(placed[name])
        result = summary(seconds, large, small) | {"card_number": options.card, "source_card": options.source_card}
        await large.market.aclose()
        await small.market.aclose()
    del large, small
    load_cuda().cupy.get_default_memory_pool().free_all_blocks()
    result |= beside(options)
    for name, value in sorted(seconds.items()):
        median, low, high = (f(value) * 1e6 for f in (statistics.median, min, max))
        print(f"{name:20} {median:12.1f} us  (min {low:.1f}, max {high:.1f})")
    if "ms" in result.get("prefill", {}):
        ratio = result["prefill"]["ms"] / result["fetch_ms"]
        print(f"prefill {result['prefill']['ms']:.1f} ms, fetch {result['fetch_ms']:.2f} ms: {ratio:.0f} x")
    print(json.dumps({k: _rounded(v) for k, v in result.items()}))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    asyncio.run(main())
