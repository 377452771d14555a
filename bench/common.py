"""What the benchmarks share: interleaved timing against a memcpy of the same run, medians, and the JSON last line."""

from __future__ import annotations

import asyncio
import inspect
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.config import default_runtime_dir
from kvmarket.region.memory import private_huge_pages

REST_S = 0.005
"""Between operations, so that each starts on an idle machine and not in the wake of the one before."""

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable, Sequence

    Operation = Callable[[], float | Awaitable[float]]
    """Does one measured thing and returns the seconds that it took."""


def log(message: str) -> None:
    """Say how far it is; standard output is for results."""
    print(message, file=sys.stderr, flush=True)


def in_memory() -> str | None:
    """Return a directory that is kept in memory, or None where the system has none."""
    shm = default_runtime_dir().parent
    return str(shm) if shm.name == "shm" else None


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile of a sample."""
    return float(np.percentile(np.asarray(values), percent))


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """Turn `work` into an operation."""

    def run() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return run


class MemcpyReference:
    """One thread copying `nbytes` between two private buffers on huge pages that were touched before."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.source, self.target = private_huge_pages(nbytes), private_huge_pages(nbytes)
        self.source[:] = np.frombuffer(np.random.default_rng(nbytes).bytes(nbytes), np.uint8)

    def contiguous(self) -> float:
        """One memcpy."""
        began = time.perf_counter()
        np.copyto(self.target, self.source)
        return time.perf_counter() - began

    def blocks(self, order: np.ndarray) -> Callable[[], float]:
        """Return an operation that gathers equal blocks of the source in `order`, one memcpy each, in one call."""
        source = self.source.reshape(len(order), -1)
        target = self.target.reshape(len(order), -1)
        return timed(lambda: np.take(source, order, axis=0, out=target, mode="clip"))


@dataclass
class Samples:
    """Seconds of every operation by round; in each round the reference ran before and after all others.

    Attributes:
        reference: (rounds,) seconds of the reference: the mean of its two runs.
        seconds: operation -> (rounds,) seconds.
        cpu: operation -> (rounds,) CPU seconds of this process, all threads.
    """

    reference: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, name: str) -> float:
        """Reference time over the operation's time, paired by round, the median: 1.0 is as fast as memcpy."""
        return statistics.median(r / s for r, s in zip(self.reference, self.seconds[name], strict=True))

    def median(self, name: str) -> float:
        """Median seconds of one operation."""
        return statistics.median(self.seconds[name])


async def interleave(operations: dict[str, Operation], reference: Callable[[], float], rounds: int) -> Samples:
    """Run all operations once a round, in a new order each round; the first round warms up and is not counted."""
    samples = Samples(seconds={name: [] for name in operations}, cpu={name: [] for name in operations})
    order = list(operations)
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 1):
        shuffle(order)
        await asyncio.sleep(REST_S)
        before = reference()
        for name in order:
            await asyncio.sleep(REST_S)
            cpu = time.process_time()
            outcome = operations[name]()
            seconds = await outcome if inspect.isawaitable(outcome) else outcome
            if number:
                samples.seconds[name].append(seconds)
                samples.cpu[name].append(time.process_time() - cpu)
        await asyncio.sleep(REST_S)
        if number:
            samples.reference.append((before + reference()) / 2)
    return samples


def parse_with_cards(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line with ``--card`` and ``--source-card``, which is the same card unless it is given."""
    parser.add_argument("--card", type=int, default=0, help="of the reader (default 0)")
    parser.add_argument("--source-card", type=int, help="of the owner (default: the reader's)")
    options = parser.parse_args()
    options.source_card = options.card if options.source_card is None else options.source_card
    return options


def finish(result: dict[str, Any]) -> None:
    """Print the result as the last line."""
    print(json.dumps(_rounded(result)), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
