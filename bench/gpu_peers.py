"""NIXL and ucxx as peers for gpu_fetch.py: reads between two processes on CUDA memory. The last line is JSON.

    python bench/gpu_peers.py nixl|ucxx [--card 0 --source-card 0]

``nixl``: READ, one-sided, with UCX's GET over cuda_ipc enabled, which is off by default; 1 GiB and 1 MiB in one piece,
and 1 GiB in 32,768 slices of 32 KiB, one descriptor each, scattered on both sides. ``ucxx``: its tag messages over
cuda_ipc in one piece, polling; it has no scattered reads. Medians; all bytes are compared once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from common import parse_with_cards

if TYPE_CHECKING:
    from collections.abc import Callable

MIB, GIB = 1 << 20, 1 << 30
SLICE_BYTES, SLICES = 32 << 10, 32768
ROUNDS, PAGED_ROUNDS = 12, 3


def settle_environment() -> None:
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    os.environ.setdefault("UCX_TLS", "cuda_ipc,cuda_copy,sm,tcp,self")
    os.environ.setdefault("UCX_CUDA_IPC_ENABLE_GET_ZCOPY", "on")
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")


def tensor_on(card: int, nbytes: int, seed: int | None) -> Any:
    """Make CUDA memory: zeros, or random bytes; the context is current before UCX opens anything."""
    import torch

    torch.cuda.set_device(card)
    memory = torch.zeros(nbytes, dtype=torch.uint8, device=card)
    if seed is not None:
        memory.view(torch.int64).random_(generator=torch.Generator(device=f"cuda:{card}").manual_seed(seed))
    torch.cuda.synchronize(card)
    return memory


def median_s(work: Callable[[], float], rounds: int) -> float:
    return statistics.median([work() for _ in range(rounds + 1)][1:])


# ---- NIXL


def nixl(name: str) -> Any:
    from nixl_cu13._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def nixl_target(pipe: Any, card: int) -> None:
    memory = tensor_on(card, 2 * GIB, 1)
    agent = nixl("target")
    agent.register_memory(memory)
    pipe.send((agent.get_agent_metadata(), memory.data_ptr()))
    pipe.recv()
    os._exit(0)


def nixl_reader(pipe: Any, card: int, source_card: int) -> dict[str, float]:
    import torch

    memory = tensor_on(card, 2 * GIB, None)
    agent = nixl("reader")
    agent.register_memory(memory)
    metadata, there = pipe.recv()
    peer, here = agent.add_remote_agent(metadata), memory.data_ptr()

    def read(pieces: list[tuple[int, int, int]]) -> float:
        local = agent.get_xfer_descs([(here + to, nbytes, card) for _, to, nbytes in pieces], "VRAM")
        remote = agent.get_xfer_descs([(there + at, nbytes, source_card) for at, _, nbytes in pieces], "VRAM")
        began = time.perf_counter()
        handle = agent.initialize_xfer("READ", local, remote, peer)
        state = agent.transfer(handle)
        while state not in {"DONE", "ERR"}:
            state = agent.check_xfer_state(handle)
        seconds = time.perf_counter() - began
        agent.release_xfer_handle(handle)
        if state == "ERR":
            raise SystemExit("NIXL reports an error")
        return seconds

    found = {
        "gib_us": median_s(lambda: read([(0, 0, GIB)]), ROUNDS) * 1e6,
        "mib_us": median_s(lambda: read([(0, 0, MIB)]), 10 * ROUNDS) * 1e6,
    }
    rng = np.random.default_rng(0)
    places = [rng.permutation(2 * GIB // SLICE_BYTES)[:SLICES].tolist() for _ in range(2)]
    pieces = [(a * SLICE_BYTES, b * SLICE_BYTES, SLICE_BYTES) for a, b in zip(*places, strict=True)]
    found["gib_in_slices_us"] = median_s(lambda: read(pieces), PAGED_ROUNDS) * 1e6
    expected = tensor_on(card, 2 * GIB, 1).view(-1, SLICE_BYTES)
    order, scattered = (torch.tensor(place, device=card) for place in places)
    if not torch.equal(memory.view(-1, SLICE_BYTES)[scattered], expected[order]):
        raise SystemExit("NIXL delivered other bytes")
    return found


# ---- ucxx


async def ucxx_exchange(pipe: Any, card: int, *, sends: bool) -> dict[str, float]:
    import torch
    import ucxx

    memory = tensor_on(card, GIB, 1 if sends else None)
    ucxx.init(progress_mode="polling")
    found: dict[str, float] = {}
    if sends:
        connected: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def accept(endpoint: Any) -> None:
            connected.set_result(endpoint)

        listener = ucxx.create_listener(accept)
        pipe.send(listener.port)
        endpoint = await connected
    else:
        endpoint = await ucxx.create_endpoint("127.0.0.1", pipe.recv())
    ready = np.zeros(1, np.uint8)
    for name, nbytes, rounds in (("gib_us", GIB, ROUNDS), ("mib_us", MIB, 10 * ROUNDS)):
        times = []
        for _ in range(rounds + 1):
            began = time.perf_counter()
            if sends:
                await endpoint.recv(ready)
                await endpoint.send(memory[:nbytes])
            else:
                await endpoint.send(ready)
                await endpoint.recv(memory[:nbytes])
            times.append(time.perf_counter() - began)
        found[name] = statistics.median(times[1:]) * 1e6
    if not sends:
        expected = tensor_on(card, GIB, 1)
        if not torch.equal(memory, expected):
            raise SystemExit("ucxx delivered other bytes")
    return found


def ucxx_target(pipe: Any, card: int) -> None:
    asyncio.run(ucxx_exchange(pipe, card, sends=True))
    os._exit(0)


def ucxx_reader(pipe: Any, card: int, source_card: int) -> dict[str, float]:
    del source_card
    return asyncio.run(ucxx_exchange(pipe, card, sends=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("nixl", "ucxx"))
    options = parse_with_cards(parser)
    settle_environment()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    target, reader = {"nixl": (nixl_target, nixl_reader), "ucxx": (ucxx_target, ucxx_reader)}[options.peer]
    process = context.Process(target=target, args=(there, options.source_card), daemon=True)
    process.start()
    found = reader(here, options.card, options.source_card)
    print(json.dumps(found), flush=True)
    process.kill()
    os._exit(0)  # their destructors wait for a peer that is gone


if __name__ == "__main__":
    main()
