"""Fetching pages of a card over UCX between two processes of one host: staged on both, by whatever lanes it finds.

512 MiB of an 8B model's KV in 64 slices of 32 KiB a block. Medians; the last line is JSON. The environment's
``UCX_TLS=tcp,cuda_copy,self`` shows the way through the host.

    python bench/gpu_ucx.py [--rounds 8]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_fetch import LARGE, engine_pages, keys_of, namespace

from kvmarket.config import MarketConfig, default_runtime_dir
from kvmarket.core import MarketCore
from kvmarket.deadline import Deadline
from kvmarket.testing.peers import PeerPool

if TYPE_CHECKING:
    from types import SimpleNamespace

BLOCKS = 256


def open_core(runtime_dir: str) -> MarketCore:
    config = MarketConfig(
        runtime_dir=runtime_dir, transport="ucx", ucx_addresses="127.0.0.1", fetch_deadline_s=20, verify="sampled"
    )
    return MarketCore(namespace(LARGE), config)


def publish(state: SimpleNamespace, runtime_dir: str) -> None:
    state.core = open_core(runtime_dir)
    pages, state.tensors = engine_pages(LARGE, BLOCKS, 1)
    state.publisher = state.core.publisher(state.core.lend(pages))
    state.publisher.offer(keys_of(LARGE, BLOCKS), list(range(BLOCKS)))
    state.publisher.flush(Deadline(20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    with PeerPool() as pool, tempfile.TemporaryDirectory(dir=default_runtime_dir().parent) as runtime_dir:
        pool.spawn().call(publish, runtime_dir, timeout_s=60)
        core, keys = open_core(runtime_dir), keys_of(LARGE, BLOCKS)
        local, _tensors = engine_pages(LARGE, BLOCKS, 0)
        seconds: list[float] = []
        for _ in range(options.rounds + 1):
            began = time.perf_counter()
            outcome = core.fetcher.fetch(iter([keys]), local, np.arange(BLOCKS), Deadline(20)).outcome
            seconds.append(time.perf_counter() - began)
            if outcome.blocks != BLOCKS:
                raise SystemExit(f"{outcome.blocks} of {BLOCKS} blocks: {outcome.reason}, {outcome.detail}")
        median = statistics.median(seconds[1:])
        result: dict[str, Any] = {"path": outcome.transfers[0].path, "bytes": BLOCKS * LARGE.page_bytes}
        print(json.dumps(result | {"ms": median * 1e3, "gb_per_s": result["bytes"] / median / 1e9}), flush=True)
    os._exit(0)  # UCX's destructors wait for a peer that is gone


if __name__ == "__main__":
    main()
