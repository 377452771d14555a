"""NIXL (its UCX backend, host memory) as a peer for transport.py: run by an interpreter that has nixl_cu12.

Two processes: a target that only lends memory, and this one, which reads it on command. One command a line on standard
input, one JSON line for each on standard output.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from typing import Any

import numpy as np

from kvmarket.region.memory import private_huge_pages

os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
os.environ.setdefault("UCX_LOG_LEVEL", "error")
READS_PER_LATENCY = 200
SMALL_BYTES = 4096


def agent(name: str, *, progress_thread: bool) -> Any:
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    made = nixl_agent(name, nixl_agent_config(backends=[], enable_prog_thread=progress_thread))
    made.create_backend("UCX", {})
    return made


def target(pipe: Any, nbytes: int, *, progress_thread: bool) -> None:
    """Lend memory; without a progress thread its owner must call NIXL while others read it over TCP."""
    mine = agent("target", progress_thread=progress_thread)
    memory = private_huge_pages(nbytes)
    memory[:] = np.frombuffer(np.random.default_rng(9).bytes(nbytes), np.uint8)
    mine.register_memory([(memory.ctypes.data, nbytes, 0, "")], "DRAM")
    pipe.send((mine.get_agent_metadata(), memory.ctypes.data))
    while (told := pipe.recv()) != "end":
        if told == "cpu":
            pipe.send(time.process_time())
        while told == "serve" and not pipe.poll(0):
            mine.get_new_notifs()


class Reader:
    """Reads the target's memory."""

    def __init__(self, pipe: Any, args: argparse.Namespace) -> None:
        self._pipe, self._progress = pipe, args.progress_thread
        self._nbytes, self._blocks, self._block_bytes = args.nbytes, args.blocks, args.block_bytes
        self._agent = agent("reader", progress_thread=self._progress)
        self._memory = private_huge_pages(args.nbytes)
        self._agent.register_memory([(self._memory.ctypes.data, args.nbytes, 0, "")], "DRAM")
        metadata, there = pipe.recv()
        self._peer = self._agent.add_remote_agent(metadata)
        here = self._memory.ctypes.data
        order = np.random.default_rng(8).permutation(args.nbytes // args.block_bytes)
        scattered = np.random.default_rng(10).permutation(args.nbytes // args.block_bytes)
        self._order, self._scattered = order[: args.blocks], scattered[: args.blocks]
        self._lists = {
            "contiguous": self._prepare(np.array([here]), np.array([there]), args.contiguous_bytes),
            "blocks": self._prepare(
                here + self._scattered * args.block_bytes, there + self._order * args.block_bytes, args.block_bytes
            ),
            "latency": self._prepare(np.array([here]), np.array([there]), SMALL_BYTES),
        }

    def _prepare(self, here: np.ndarray, there: np.ndarray, nbytes: int) -> tuple[Any, Any, list[int]]:
        def descriptors(starts: np.ndarray) -> np.ndarray:
            return np.stack([starts, np.full(len(starts), nbytes), np.zeros(len(starts))], axis=1).astype(np.uint64)

        local = self._agent.prep_xfer_dlist("", descriptors(here), "DRAM")
        remote = self._agent.prep_xfer_dlist(self._peer, descriptors(there), "DRAM")
        return local, remote, list(range(len(here)))

    def run(self, what: str) -> float:
        """Return the seconds of one read; of 4 KiB, the median of many with one prepared request."""
        self._pipe.send("serve" if not self._progress else "wait")
        local, remote, indices = self._lists[what]
        began = time.perf_counter()
        request = self._agent.make_prepped_xfer("READ", local, indices, remote, indices)
        self._wait(request)
        seconds = [time.perf_counter() - began]
        if what == "latency":
            seconds = []
            for _ in range(READS_PER_LATENCY):
                began = time.perf_counter()
                self._wait(request)
                seconds.append(time.perf_counter() - began)
        request.release()
        self._pipe.send("wait")
        return statistics.median(seconds)

    def _wait(self, request: Any) -> None:
        state = self._agent.transfer(request)
        while state not in {"DONE", "ERR"}:
            state = self._agent.check_xfer_state(request)
        if state == "ERR":
            raise SystemExit("NIXL reports an error")

    def right(self) -> bool:
        """Tell whether the blocks read last are the target's."""
        data = np.frombuffer(np.random.default_rng(9).bytes(self._nbytes), np.uint8).reshape(-1, self._block_bytes)
        mine = self._memory[: len(data) * self._block_bytes].reshape(-1, self._block_bytes)
        return bool((mine[self._scattered] == data[self._order]).all())

    def idle(self, wall_s: float) -> float:
        """Return CPU seconds per second of both processes while nothing is asked of them."""
        self._pipe.send("cpu")
        before = self._pipe.recv() + time.process_time()
        time.sleep(wall_s)
        self._pipe.send("cpu")
        return (self._pipe.recv() + time.process_time() - before) / wall_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--progress-thread", action="store_true")
    for name in ("--nbytes", "--contiguous-bytes", "--blocks", "--block-bytes"):
        parser.add_argument(name, type=int, required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    here, there = multiprocessing.get_context("spawn").Pipe()
    keywords = {"progress_thread": args.progress_thread}
    process = multiprocessing.get_context("spawn").Process(
        target=target, args=(there, args.nbytes), kwargs=keywords, daemon=True
    )
    process.start()
    reader = Reader(here, args)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        what = line.strip()
        answer = reader.right() if what == "right" else reader.idle(2.0) if what == "idle" else reader.run(what)
        print(json.dumps(answer), file=answers, flush=True)
    process.kill()
    os._exit(0)  # its destructors wait for a peer that is gone


if __name__ == "__main__":
    main()
