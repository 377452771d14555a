"""Owners that are killed at any moment: every fetch is right or a miss, in time, and nothing is left behind."""

import asyncio
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import market_jobs as jobs
import numpy as np
import pytest

from kvmarket import Marketplace, MissReason
from kvmarket.deadline import Deadline
from kvmarket.region.pages import PagedMemory
from kvmarket.testing.samples import SPEC, sample_kv, sample_spec, sample_tokens
from kvmarket.testing.waiting import until

LARGE = sample_spec(64 << 10)
BLOCKS = 64
DEATHS = 20
DEADLINE_S = 2.0
SLACK_S = 1.0
"""For the test machine: a fetch may be late by what its threads wait for a core."""


@pytest.fixture
def config(config):
    return replace(config, arena_bytes=8 << 20, verify="none", fetch_deadline_s=DEADLINE_S)


def start_owner(peers, config, spec, seed, blocks):
    peer = peers.spawn()
    peer.call(jobs.open_market, config, "model", spec)
    peer.call(jobs.publish, seed, blocks)
    return peer


def left_in_shm():
    """Names that could be ours; the default runtime directory and benchmarks of other processes are not."""
    shm = Path("/dev/shm")  # noqa: S108 - looked at, not written to
    names = {path.name for path in shm.iterdir() if "kvmarket" in path.name and "kvmarket-bench" not in path.name}
    return names - {f"kvmarket-{os.getuid()}"}


async def nothing_left(config, before):
    """What the dead left is removed by the next process that starts."""
    async with Marketplace("model", SPEC, config=config) as market:
        registry = market.core.registry
        with registry._file.read() as txn:
            counts = {name: txn.stat(table)["entries"] for name, table in registry._file.tables.items()}
        assert list((config.directory / "owners").iterdir()) == []
        assert {name: counts[name] for name in ("owners", "regions", "blocks", "runs")} == {
            "owners": 0,
            "regions": 0,
            "blocks": 0,
            "runs": 0,
        }
    assert left_in_shm() == before


async def test_killed_while_its_blocks_are_read(peers, config):
    rng, before = random.Random(1), left_in_shm()
    hits = 0
    async with Marketplace("model", LARGE, config=config) as market:
        for seed in range(DEATHS):
            owner = start_owner(peers, config, LARGE, seed, BLOCKS)
            tokens, kv = sample_tokens(seed, BLOCKS), sample_kv(sample_tokens(seed, BLOCKS), LARGE)
            killing = asyncio.get_running_loop().run_in_executor(None, kill_after, owner, rng.uniform(0, 0.02))
            while True:
                began = time.monotonic()
                result = await market.fetch(tokens)
                assert time.monotonic() - began < DEADLINE_S + SLACK_S
                assert (result.kv == kv[: len(result.kv)]).all()
                hits += result.report.hit
                if not result.report.hit:
                    break
            await killing
            assert result.report.reason in {MissReason.OWNER_GONE, MissReason.NOT_PUBLISHED}, result.report
    assert hits, "every owner died before it was read"
    await nothing_left(config, before)


def kill_after(owner, seconds):
    time.sleep(seconds)
    owner.kill()


@pytest.mark.parametrize("connected", [False, True], ids=["not connected", "connected"])
async def test_killed_between_look_up_and_read(peers, config, connected):
    before = left_in_shm()
    async with Marketplace("model", LARGE, config=config) as market:
        fetcher, out = market.core.fetcher, np.empty((4, LARGE.page_bytes), np.uint8)
        for seed in range(DEATHS // 2):
            owner = start_owner(peers, config, LARGE, seed, 4)
            keys = market._keys(sample_tokens(seed, 4), None)
            found, _, _ = fetcher.lookup(keys)
            assert found.blocks == 4
            if connected:
                assert fetcher.read(found, PagedMemory.packed(out), np.arange(4), Deadline(5)).blocks == 4
            owner.kill()
            outcome = fetcher.read(found, PagedMemory.packed(out), np.arange(4), Deadline(5))
            assert (outcome.blocks, outcome.reason) == (0, MissReason.OWNER_GONE)
            assert f"pid {owner.pid}" in outcome.detail
            again = await market.fetch(sample_tokens(seed, 4))
            assert not again.report.hit
    await nothing_left(config, before)


async def test_another_owner_takes_over(peers, config):
    """Two owners of a prefix; the one that is asked first dies: the other one serves."""
    async with Marketplace("model", LARGE, config=config) as market:
        first = start_owner(peers, config, LARGE, 1, 8)
        second = start_owner(peers, config, LARGE, 1, 8)
        kv = sample_kv(sample_tokens(1, 8), LARGE)
        for owner in (first, second):
            result = await market.fetch(sample_tokens(1, 8))
            assert (result.kv == kv).all()
            owner.kill()
        assert not (await market.fetch(sample_tokens(1, 8))).report.hit


async def test_memory_of_dead_owners_is_let_go(peers, config):
    """A reader keeps the memory of an owner mapped; not for ever after the owner died."""

    def mapped():
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum("/memfd:kvmarket:arena" in line for line in lines)

    before = mapped()
    async with Marketplace("model", LARGE, config=config) as market:
        for seed in range(6):
            owner = start_owner(peers, config, LARGE, seed, 4)
            assert (await market.fetch(sample_tokens(seed, 4))).report.hit
            owner.kill()
        await asyncio.to_thread(until, lambda: mapped() <= before + 1, "the memory is let go", 5)


async def test_a_restarted_owner_is_another_owner(peers, config):
    async with Marketplace("model", SPEC, config=config) as market:
        numbers = set()
        for _ in range(3):
            owner = start_owner(peers, config, SPEC, 1, 4)
            numbers.update((await market.match(sample_tokens(1, 4))).owners)
            assert (await market.fetch(sample_tokens(1, 4))).report.blocks_adopted == 4
            owner.kill()
        assert len(numbers) == 3


async def test_a_killed_reader_or_writer_harms_nobody(peers, config):
    """Readers and writers of the registry are killed in the middle of their work; the others go on."""
    rng = random.Random(2)
    async with Marketplace("model", SPEC, config=config) as market:
        tokens = sample_tokens(99, 8)
        await market.publish(tokens, sample_kv(tokens))
        for seed in range(10):
            peer = peers.spawn()
            peer.call(jobs.open_market, config, "model", SPEC)
            peer.start(work_until_killed, seed)
            await asyncio.sleep(rng.uniform(0.005, 0.03))
            peer.kill()
            assert (await market.fetch(tokens)).report.blocks_adopted == 8
            assert (await market.publish(sample_tokens(seed, 2), sample_kv(sample_tokens(seed, 2)))).blocks == 2


def work_until_killed(state, seed):
    turn = 0
    while True:
        turn += 1
        jobs.publish(state, 1000 * seed + turn, 3)
        jobs.fetch(state, 99, 8)
        jobs.withdraw(state, 1000 * seed + turn, 3)
