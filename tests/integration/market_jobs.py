"""What peers do in these tests: each function runs in another process, with that process's `state` first."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np

from kvmarket import FetchReport, Marketplace, PublishReport
from kvmarket.deadline import Deadline
from kvmarket.region.pages import PagedMemory
from kvmarket.registry.lmdb_file import acquire_file
from kvmarket.testing.samples import SPEC, sample_kv, sample_spec, sample_tokens


def open_market(state, config, model="model", spec=SPEC):
    state.loop = asyncio.new_event_loop()
    state.spec = spec

    async def make():
        return Marketplace(model, spec, config=config)

    state.market = state.loop.run_until_complete(make())
    return state.market.namespace.digest


def close_market(state):
    state.loop.run_until_complete(state.market.aclose())


def publish(state, seed, blocks) -> PublishReport:
    tokens = sample_tokens(seed, blocks)
    return state.loop.run_until_complete(state.market.publish(tokens, sample_kv(tokens, state.spec)))


def withdraw(state, seed, blocks):
    return state.loop.run_until_complete(state.market.withdraw(sample_tokens(seed, blocks)))


def fetch(state, seed, blocks) -> tuple[FetchReport, bool]:
    tokens = sample_tokens(seed, blocks)
    result = state.loop.run_until_complete(state.market.fetch(tokens))
    expected = sample_kv(tokens, state.spec)[: len(result.kv)]
    return result.report, bool((result.kv == expected).all())


def bump_epoch(state):
    return state.loop.run_until_complete(state.market.bump_epoch())


def _found(state, seed, blocks):
    market = state.market
    keys = market._keys(sample_tokens(seed, blocks), None)
    return keys, market.core.registry.lookup(market.namespace.digest, keys)


def found_blocks(state, seed, blocks):
    """How many blocks the registry has."""
    return _found(state, seed, blocks)[1].blocks


def announce_stale(state, seed, blocks):
    """Announce this process's blocks once more, in generations that they never had."""
    keys, found = _found(state, seed, blocks)
    records = found.records.copy()
    records["generation"] += 100
    return state.market.core.registry.announce(state.market.namespace.digest, found.epoch, keys, records)


def jump_clock(state, seconds):
    """Let the clock that this process's leases go by jump."""
    registry = state.market.core.registry
    before = registry._clock
    registry._clock = lambda: before() + seconds


def open_handles(state):
    """What this process has open: shared memory and sockets, by kind."""
    found = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(entry)  # noqa: PTH115 - a magic link: text, not a path
            kind = target.partition(":[")[0].split(" ")[0]
            if kind == "socket" or "kvmarket" in kind:
                found[kind] += 1
    return found


def stop_while_holding_the_write_lock(state, directory):
    """Take the registry's write lock and stop, as a process in a debugger does."""
    file = acquire_file(directory, 16 << 20)
    with file.write():
        os.kill(os.getpid(), signal.SIGSTOP)
        state.went_on = time.monotonic()


# ---- pages that are overwritten all the time

TORN_SPEC = sample_spec(256 << 10)
TORN_BLOCKS = 8


def version_kv(version):
    """One number per page, all over it: (blocks, words) uint64."""
    numbers = version * TORN_BLOCKS + np.arange(TORN_BLOCKS, dtype=np.uint64)
    return np.repeat(numbers[:, None], TORN_SPEC.page_bytes // 8, axis=1)


def republish_for(state, seconds, board):
    """Overwrite the same pages with ever new prefixes; the newest version's number is in the file `board`."""
    market, core = state.market, state.market.core
    memory, pages = market.allocate(TORN_BLOCKS)
    region = core.lend(PagedMemory.packed(pages), [memory])
    publisher = core.publisher(region)
    newest = np.memmap(board, np.int64, "r+", shape=(1,))
    numbers = list(range(TORN_BLOCKS))
    end, version = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        version += 1
        publisher.retract(numbers)
        pages.view(np.uint64)[:] = version_kv(version)
        keys = market._keys(sample_tokens(version, TORN_BLOCKS), None)
        publisher.offer(keys, numbers)
        publisher.flush(Deadline(10))
        newest[0] = version
        time.sleep(random.choice([0, 0, 0.001, 0.003]))
    publisher.retract(numbers)
    return version


def read_versions_for(state, seconds, board):
    """Fetch whatever version is newest; return (pages adopted, wrong pages, refusals by reason, longest fetch)."""
    newest = np.memmap(board, np.int64, "r", shape=(1,))

    async def run():
        adopted = wrong = 0
        longest_s = 0.0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            version = int(newest[0])
            result = await state.market.fetch(sample_tokens(version, TORN_BLOCKS))
            longest_s = max(longest_s, result.report.stages["total"])
            got = result.kv.view(np.uint64)
            adopted += len(got)
            wrong += int((got != version_kv(version)[: len(got)]).any(axis=1).sum())
            await asyncio.sleep(0)
        return adopted, wrong, state.market.metrics(), longest_s

    return state.loop.run_until_complete(run())


def publish_for_ever(state, first_seed, blocks, board):
    """Publish prompt after prompt; the newest seed that was published is in the file `board`."""
    newest = np.memmap(board, np.int64, "r+", shape=(1,))
    for seed in range(first_seed, 1 << 30):
        publish(state, seed, blocks)
        newest[0] = seed


def metrics(state):
    return state.market.metrics()


def flush_disk(state):
    return state.market._disk.flush(Deadline(10))
