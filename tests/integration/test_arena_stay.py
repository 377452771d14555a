"""How long published copies stay: time to live, pins, leases, and what the metrics and reports say of it."""

import asyncio
import threading
import time
from dataclasses import replace

import market_jobs as jobs
import numpy as np
import pytest

from kvmarket import Marketplace, MissReason
from kvmarket.errors import ArenaFullError, ConfigError, InvalidInputError
from kvmarket.region.pages import copy_pages
from kvmarket.testing.samples import SPEC, sample_kv, sample_tokens

SLOTS = 12


@pytest.fixture
def config(config):
    return replace(config, arena_bytes=SLOTS * SPEC.page_bytes)


@pytest.fixture
async def market(config):
    async with Marketplace("model", SPEC, config=config) as market:
        yield market


async def publish(market, seed, blocks, **how):
    tokens = sample_tokens(seed, blocks)
    return await market.publish(tokens, sample_kv(tokens), **how)


async def held(market, seed, blocks=SLOTS):
    """Blocks of a prefix that are fetched, and right."""
    tokens = sample_tokens(seed, blocks)
    result = await market.fetch(tokens)
    assert (result.kv == sample_kv(tokens)[: len(result.kv)]).all()
    return result.report.blocks_adopted


async def records(market, seed, blocks):
    """Blocks of a prefix that the registry still names, whoever could read them."""
    keys = market._keys(sample_tokens(seed, blocks), None)
    return market.core.registry.lookup(market.namespace.digest, keys).blocks


async def until(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not await true():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_what_has_expired_is_withdrawn(market, config, peers):
    """Not only unreadable: the registry does not name it any more, and its memory is free."""
    reader = peers.spawn()
    reader.call(jobs.open_market, config)
    await publish(market, 1, 4, ttl_s=1.0)
    await publish(market, 2, 4)
    assert reader.call(jobs.fetch, 1, 4)[0].blocks_adopted == 4

    async def gone():
        return await records(market, 1, 4) == 0

    await until(gone)
    report, _ = reader.call(jobs.fetch, 1, 4)
    assert (report.blocks_adopted, report.reason) == (0, MissReason.NOT_PUBLISHED)
    assert reader.call(jobs.fetch, 2, 4)[0].blocks_adopted == 4
    metrics = market.metrics()
    assert metrics["arena_evicted{reason=ttl}"] == 4
    assert metrics["arena_resident_bytes"] == 4 * SPEC.page_bytes


async def test_the_longest_time_to_live_that_was_asked_for_counts(market):
    await publish(market, 1, 6, ttl_s=0.2)
    await publish(market, 1, 3, ttl_s=0.01)
    await publish(market, 1, 4, ttl_s=0)

    async def tail_gone():
        return await records(market, 1, 6) == 4

    await until(tail_gone)
    await asyncio.sleep(0.1)
    assert await held(market, 1) == 4


async def test_the_default_time_to_live_is_a_setting(config):
    async with Marketplace("model", SPEC, config=replace(config, arena_ttl_s=0.1)) as market:
        await publish(market, 1, 2)
        await publish(market, 2, 2, ttl_s=0)

        async def gone():
            return await records(market, 1, 2) == 0

        await until(gone)
        assert await held(market, 2) == 2


async def test_what_is_pinned_outlives_what_is_not(market):
    await publish(market, 1, 4)
    assert await market.pin(sample_tokens(1, 6), ttl_s=30) == 4
    for seed in range(2, 9):
        await publish(market, seed, 6)
    assert await held(market, 1) == 4
    metrics = market.metrics()
    assert metrics["arena_blocks_pinned"] == 4
    assert metrics["arena_evicted{reason=capacity}"] == 7 * 6 - 8
    assert await market.unpin(sample_tokens(1, 4)) == 4
    for seed in range(9, 11):
        await publish(market, seed, 6)
    assert await held(market, 1) == 0


async def test_a_pin_runs_out(market):
    await publish(market, 1, 4, pin_s=0.05)
    await publish(market, 2, 8)
    assert await held(market, 1) == 4
    await asyncio.sleep(0.06)
    for seed in (3, 4):
        await publish(market, seed, 6)
    assert await held(market, 1) == 0


async def test_pins_leave_half_of_the_arena_to_others(market):
    await publish(market, 1, 4, pin_s=30)
    await publish(market, 2, 4)
    with pytest.raises(InvalidInputError, match="2 too many: pins may take 6 of the arena's 12 slots"):
        await market.pin(sample_tokens(2, 4), ttl_s=30)
    with pytest.raises(InvalidInputError, match="KVMARKET_ARENA_BYTES"):
        await publish(market, 3, 4, pin_s=30)
    assert await held(market, 3) == 0
    assert await held(market, 1) == await held(market, 2) == 4
    await publish(market, 4, 8)
    with pytest.raises(ArenaFullError, match="9 blocks do not fit an arena of 12, of which 4 are pinned"):
        await publish(market, 5, 9)
    assert await held(market, 4) == 8, "a publish that fails costs nobody anything"


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "1"])
async def test_times_that_cannot_be_used(market, seconds):
    with pytest.raises(InvalidInputError, match="ttl_s must be"):
        await publish(market, 1, 1, ttl_s=seconds)
    with pytest.raises(InvalidInputError, match="pin_s must be"):
        await publish(market, 1, 1, pin_s=seconds)
    with pytest.raises(InvalidInputError, match="ttl_s must be"):
        await market.pin(sample_tokens(1, 1), ttl_s=seconds)


async def test_withdrawing_and_a_new_epoch_end_pins(market):
    await publish(market, 1, 4, pin_s=30)
    assert await market.withdraw(sample_tokens(1, 4)) == 4
    await publish(market, 2, 4, pin_s=30)
    await market.bump_epoch()
    assert market.metrics()["arena_blocks_pinned"] == 0
    await publish(market, 3, 6, pin_s=30)
    await publish(market, 4, 6)
    assert await held(market, 3) == await held(market, 4) == 6


async def test_pages_being_read_in_this_process_are_not_written_to(market, monkeypatch):
    """A reader that stops half way finds its pages whole, however much is published meanwhile."""
    await publish(market, 1, 4)
    reading, go_on = threading.Event(), threading.Event()

    def slow(source, source_pages, target, target_pages):
        reading.set()
        go_on.wait(10)
        copy_pages(source, source_pages, target, target_pages)

    monkeypatch.setattr("kvmarket.transport.mapped.copy_pages", slow)
    tokens = sample_tokens(1, 4)
    keys = market._keys(tokens, None)
    core, out = market.core, np.zeros((4, SPEC.page_bytes), np.uint8)
    found, _, _ = core.fetcher.lookup(keys)
    got = []
    thread = threading.Thread(
        target=lambda: got.append(
            core.fetcher.read(found, jobs.PagedMemory.packed(out), np.arange(4), jobs.Deadline(10))
        )
    )
    thread.start()
    assert reading.wait(5)
    for seed in range(2, 9):
        await publish(market, seed, 8)
    with pytest.raises(ArenaFullError, match="4 being read"):
        await publish(market, 9, 9)
    go_on.set()
    thread.join()
    assert got[0].blocks == 4
    assert (out == sample_kv(tokens)).all()
    await publish(market, 9, 12)
    assert await held(market, 9) == 12


async def test_what_is_read_in_this_process_counts_as_used(market):
    await publish(market, 1, 6)
    await publish(market, 2, 6)
    assert await held(market, 1, 6) == 6
    await publish(market, 3, 6)
    assert await held(market, 1) == 6
    assert await held(market, 2) == 0


async def test_a_scan_does_not_flush_an_arena_under_s3_fifo(config):
    kept = {}
    for policy in ("lru", "s3fifo"):
        async with Marketplace(policy, SPEC, config=replace(config, arena_eviction=policy)) as market:
            for _ in range(4):
                for seed in (1, 2):
                    await publish(market, seed, 4)
            for seed in range(10, 40):
                await publish(market, seed, 4)
            kept[policy] = await held(market, 1, 4) + await held(market, 2, 4)
    assert kept["lru"] == 0
    assert kept["s3fifo"] >= 4


async def test_reports_say_which_tier_served(market, config, peers):
    await publish(market, 1, 4)
    peer = peers.spawn()
    peer.call(jobs.open_market, config)
    report, equal = peer.call(jobs.fetch, 1, 4)
    assert (report.tier, report.as_dict()["tier"], equal) == ("host", "host", True)
    memory, pages = market.allocate(1)
    pages[:] = sample_kv(sample_tokens(2, 1))
    publisher = market.core.publisher(market.core.lend(jobs.PagedMemory.packed(pages), [memory]))
    publisher.offer(market._keys(sample_tokens(2, 1), None), [0])
    publisher.flush(jobs.Deadline(5))
    result = await market.fetch(sample_tokens(2, 1))
    assert result.report.tier == "engine"
    assert (await market.fetch(sample_tokens(3, 1))).report.tier == ""
    assert market.metrics()["tier_blocks{tier=engine}"] == 1
    memory.close()


def test_a_policy_that_there_is_not_is_named(config):
    with pytest.raises(ConfigError, match="arena_eviction = 'mru': must be one of: lru, s3fifo"):
        replace(config, arena_eviction="mru")
