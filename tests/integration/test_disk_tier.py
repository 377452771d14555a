"""The disk tier of a marketplace: what memory has no room for, and what a process had before it ended."""

import asyncio
import errno
import os
import time
from dataclasses import replace
from pathlib import Path

import market_jobs as jobs
import numpy as np
import pytest

from kvmarket import Marketplace, MissReason, ModelIdentity
from kvmarket.deadline import Deadline
from kvmarket.testing.samples import SPEC, sample_kv, sample_tokens

SLOTS = 16
BLOCKS = 6


@pytest.fixture
def config(config, tmp_path):
    return replace(config, arena_bytes=SLOTS * SPEC.page_bytes, disk_bytes=8 << 20, disk_dir=str(tmp_path / "disk"))


@pytest.fixture
def open_market(config):
    def make(model="model", **changes):
        return Marketplace(model, SPEC, config=replace(config, **changes))

    return make


async def publish(market, *seeds, **how):
    """Publish prompts, each when the one before is on disk: the arena holds less than three of them."""
    for seed in seeds:
        tokens = sample_tokens(seed, BLOCKS)
        await market.publish(tokens, sample_kv(tokens), **how)
        assert await asyncio.to_thread(market._disk.flush, Deadline(10))


async def fetch(market, seed, blocks=BLOCKS):
    """Fetch a prefix and check its bytes; return the report."""
    tokens = sample_tokens(seed, blocks)
    result = await market.fetch(tokens)
    assert (result.kv == sample_kv(tokens)[: len(result.kv)]).all()
    assert len(result.kv) == result.report.blocks_adopted
    return result.report


def segments(config):
    return sorted(Path(config.disk_dir).glob("*/*/*.seg"))


async def test_what_was_evicted_is_read_from_disk(open_market):
    async with open_market() as market:
        await publish(market, *range(1, 9))
        report = await fetch(market, 1)
        assert (report.blocks_adopted, report.blocks_verified) == (BLOCKS, BLOCKS)
        assert (report.tier, report.transport, report.reason) == ("disk", "disk", MissReason.NONE)
        assert report.sources == {"disk": BLOCKS}
        assert report.tokens_matched == BLOCKS * 16
        assert (await fetch(market, 8)).tier == "host"
        longer = await fetch(market, 1, BLOCKS + 2)
        assert (longer.blocks_adopted, longer.reason, longer.first_missing_block) == (6, "not_published", 6)
        metrics = market.metrics()
        assert metrics["disk_blocks_written"] == metrics["disk_blocks"] == 8 * BLOCKS
        assert metrics["tier_blocks{tier=disk}"] == 2 * BLOCKS
        assert metrics["disk_bytes"] > 8 * BLOCKS * SPEC.page_bytes


async def test_a_prefix_that_lost_its_tail_goes_on_from_disk(open_market):
    """Blocks in memory first, the rest from disk, into memory of the caller's."""
    async with open_market() as market:
        await publish(market, 1, 2, 3)
        out = np.zeros((BLOCKS + 1, SPEC.page_bytes), np.uint8)
        tokens = sample_tokens(1, BLOCKS)
        result = await market.fetch(tokens, out=out)
        assert (result.report.tier, result.report.blocks_adopted) == ("disk+host", BLOCKS)
        assert (out[:BLOCKS] == sample_kv(tokens)).all()
        assert not out[BLOCKS].any()


async def test_a_restarted_process_serves_what_it_had(open_market, config, peers):
    """To itself from disk, and the newest of it to others, from memory again."""
    async with open_market() as market:
        await publish(market, *range(1, 9))
    reader = peers.spawn()
    reader.call(jobs.open_market, replace(config, disk_bytes=0))
    assert not reader.call(jobs.fetch, 8, BLOCKS)[0].hit
    async with open_market() as market:
        for seed in range(1, 7):
            assert (await fetch(market, seed)).blocks_adopted == BLOCKS
        assert (await fetch(market, 1)).tier == "disk"
        end = time.monotonic() + 5
        while market.metrics().get("disk_blocks_promoted", 0) < SLOTS // 2:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        await asyncio.to_thread(market.core._publishers[0].flush, Deadline(5))
        report, equal = reader.call(jobs.fetch, 8, BLOCKS)
        assert (report.blocks_adopted, report.tier, equal) == (BLOCKS, "host", True)
    assert {path.stat().st_mode & 0o777 for path in segments(config)} == {0o600}


@pytest.mark.parametrize(
    ("model", "changes"),
    [("other", {}), (ModelIdentity("model", revision="2"), {}), ("model", {"tenant": "t"}), ("model", {"salt": "s"})],
)
async def test_another_namespace_finds_nothing(open_market, model, changes):
    async with open_market() as market:
        await publish(market, 1)
    async with open_market(model, **changes) as market:
        assert not (await fetch(market, 1)).hit
    async with open_market() as market:
        assert (await fetch(market, 1)).hit


async def test_who_verifies_takes_nothing_that_was_written_by_who_does_not(open_market):
    async with open_market(verify="none") as market:
        await publish(market, 1)
        assert (await fetch(market, 1)).hit
    async with open_market() as market:
        assert not (await fetch(market, 1)).hit


async def test_a_new_epoch_empties_the_disk_for_good(open_market, config, peers):
    """Also that of a process that was not there, and of one that is killed before it hears of it."""
    deaf = peers.spawn()
    deaf.call(jobs.open_market, config)
    deaf.call(jobs.publish, 5, BLOCKS)
    assert deaf.call(jobs.flush_disk)
    async with open_market() as market:
        await publish(market, *range(1, 5))
        assert (await fetch(market, 1)).tier == "disk"
        await market.bump_epoch()
        assert not (await fetch(market, 1)).hit
        await publish(market, 1)
        assert (await fetch(market, 1)).hit
    deaf.kill()
    for _ in range(2):  # the first takes one of the two logs, and both take what was written after the new epoch
        async with open_market() as first, open_market() as second:
            for market in (first, second):
                for seed in range(1, 6):
                    assert not (await fetch(market, seed)).hit


async def test_another_process_that_bumps_empties_it_too(open_market, config, peers):
    peer = peers.spawn()
    peer.call(jobs.open_market, replace(config, disk_bytes=0))
    async with open_market() as market:
        await publish(market, *range(1, 5))
        assert (await fetch(market, 1)).tier == "disk"
        peer.call(jobs.bump_epoch)
        assert not (await fetch(market, 1)).hit
        assert not (await fetch(market, 4)).hit
        await publish(market, 9)
        await publish(market, 9)
        assert (await fetch(market, 9)).hit
    async with open_market() as market:
        assert not (await fetch(market, 1)).hit


async def test_withdrawn_and_expired_blocks_are_not_on_disk_either(open_market):
    async with open_market() as market:
        await publish(market, 1, 2, 3, 4)
        await publish(market, 5, ttl_s=0.5)
        assert (await fetch(market, 1)).tier == "disk"
        await market.withdraw(sample_tokens(1, BLOCKS))
        assert await asyncio.to_thread(market._disk.flush, Deadline(5))
        assert not (await fetch(market, 1)).hit
        await asyncio.sleep(2.0)  # times on disk are whole seconds, rounded up
        assert not (await fetch(market, 5)).hit
    async with open_market() as market:
        assert not (await fetch(market, 1)).hit
        assert not (await fetch(market, 5)).hit
        assert (await fetch(market, 2)).hit


async def test_two_processes_have_a_log_each(open_market, config):
    async with open_market() as first, open_market() as second:
        await publish(first, 1, 2, 3, 4)
        await publish(second, 11, 12, 13, 14)
        assert (await fetch(first, 1)).tier == (await fetch(second, 11)).tier == "disk"
        assert not (await fetch(first, 11)).hit
    assert {path.parent.name for path in segments(config)} == {"0", "1"}


async def test_damage_on_disk_is_a_miss(open_market, config):
    async with open_market() as market:
        await publish(market, *range(1, 5))
    (path,) = segments(config)[:1]
    data = bytearray(path.read_bytes())
    at = 4096 + 3 * (256 + SPEC.page_bytes) + 1000  # in block 3 of the first prompt
    data[at] ^= 1
    path.write_bytes(data)
    async with open_market(arena_bytes=SPEC.page_bytes) as market:
        report = await fetch(market, 1)
        assert (report.blocks_adopted, report.tier) == (3, "disk")
        assert market.metrics()["disk_blocks_damaged"] == 1
        assert (await fetch(market, 2)).blocks_adopted == BLOCKS


@pytest.mark.parametrize(("call", "code"), [("pwritev", errno.ENOSPC), ("pwritev", errno.EIO), ("preadv", errno.EIO)])
async def test_a_disk_that_fails_is_done_without(open_market, monkeypatch, caplog, call, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    async with open_market() as market:
        await publish(market, *range(1, 5))
        monkeypatch.setattr(os, call, fail)
        for seed in (5, 6, 7):
            tokens = sample_tokens(seed, BLOCKS)
            assert (await market.publish(tokens, sample_kv(tokens))).blocks == BLOCKS
            assert (await fetch(market, seed)).blocks_adopted == BLOCKS
        if call == "preadv":
            assert not (await fetch(market, 1)).hit
        else:
            await asyncio.sleep(0.1)
        monkeypatch.undo()
        assert not (await fetch(market, 2)).hit
        assert market.metrics()["disk_errors"] == 1
    what = "could_not_be=read" if call == "preadv" else 'could_not_be="written to"'
    lines = [record.message for record in caplog.records if "disk tier is off" in record.message]
    assert len(lines) == 1
    assert what in lines[0]
    assert f"[Errno {code}] {os.strerror(code)}" in lines[0]


async def test_a_directory_that_cannot_be_used_is_said_once(open_market, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    async with open_market(disk_dir=str(tmp_path / "file" / "x")) as market:
        tokens = sample_tokens(1, BLOCKS)
        await market.publish(tokens, sample_kv(tokens))
        assert (await fetch(market, 1)).tier == "host"
    assert sum("disk tier is off could_not_be=opened" in record.message for record in caplog.records) == 1


async def test_a_directory_that_others_may_write_to_is_refused(open_market, config, caplog):
    async with open_market() as market:
        await publish(market, 1)
    (path,) = segments(config)
    path.parent.parent.chmod(0o770)
    async with open_market() as market:
        assert not (await fetch(market, 1)).hit
    assert "others may write to it" in caplog.text


async def test_logs_of_other_models_are_removed_when_there_are_too_many(open_market, config):
    for number in range(5):
        async with open_market(f"model-{number}", disk_bytes=200 << 10) as market:
            await publish(market, *range(1, 7))
    foreign = Path(config.disk_dir) / "someone" / "7" / "1.seg"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(bytes(1 << 20))
    async with open_market("model-5", disk_bytes=200 << 10) as market:
        await publish(market, 1)
    assert foreign.exists()
    foreign.unlink()
    total = sum(path.stat().st_size for path in segments(config))
    assert total <= 2 * (200 << 10)


async def test_killed_at_any_instant_nothing_wrong_is_served(open_market, config, peers, tmp_path):
    """Real processes that publish as fast as they can, with their log on disk, until they are killed."""
    board = tmp_path / "board"
    served = 0
    for round_number in range(6):
        np.memmap(board, np.int64, "w+", shape=(1,))[0] = 0
        peer = peers.spawn()
        peer.call(jobs.open_market, config)
        peer.start(jobs.publish_for_ever, 1000 * (round_number + 1), BLOCKS, board)
        newest = np.memmap(board, np.int64, "r", shape=(1,))
        end = time.monotonic() + 10
        while newest[0] == 0:
            assert time.monotonic() < end
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05 + 0.037 * round_number)
        peer.kill()
        last = int(newest[0])
        async with open_market() as market:
            for seed in range(max(1000 * (round_number + 1), last - 40), last + 3):
                served += (await fetch(market, seed)).blocks_adopted
            assert market.metrics().get("disk_errors", 0) == 0
        assert sum(path.stat().st_size for path in segments(config)) <= config.disk_bytes
    assert served > 100
