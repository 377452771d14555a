"""A process that holds the registry's write lock and is stopped: reading goes on, writing gives up in time."""

import asyncio
import contextlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import market_jobs as jobs
import pytest

from kvmarket import DeadlineExceededError, Marketplace, RegistryError
from kvmarket.deadline import Deadline
from kvmarket.errors import RegistryUnavailableError
from kvmarket.publish import QUEUE_MAX
from kvmarket.region.pages import PagedMemory
from kvmarket.registry import block_keys, lmdb_file
from kvmarket.testing.samples import SPEC, sample_kv, sample_tokens
from kvmarket.testing.waiting import until
from kvmarket_vllm.resets import Resets

TOKENS = sample_tokens(1, 4)
KV = sample_kv(TOKENS)
WAIT_S = 0.4


@pytest.fixture(autouse=True)
def short_wait(monkeypatch):
    monkeypatch.setattr(lmdb_file, "WRITE_WAIT_S", WAIT_S)


@pytest.fixture
async def market(config):
    async with Marketplace("model", SPEC, config=config) as market:
        await market.publish(TOKENS, KV)
        yield market


def stop_with_the_lock(peer, config):
    peer.start(jobs.stop_while_holding_the_write_lock, config.directory)
    end = time.monotonic() + 10
    while Path(f"/proc/{peer.pid}/stat").read_text().split()[2] != "T":
        assert time.monotonic() < end
        time.sleep(0.001)


def go_on(peer):
    peer.signal(signal.SIGCONT)
    peer.result()


@pytest.fixture
def stopped(peers, config, market):
    """A process that stopped while it had the lock; it goes on after the test."""
    peer = peers.spawn()
    stop_with_the_lock(peer, config)
    yield peer
    peer.signal(signal.SIGCONT)


@contextlib.contextmanager
def taking(at_most_s, at_least_s=0.0):
    began = time.monotonic()
    yield
    assert at_least_s <= time.monotonic() - began < at_most_s


async def test_fetch_and_match_go_on(market, stopped):
    for _ in range(20):
        with taking(3):
            result = await market.fetch(TOKENS)
            match = await market.match(sample_tokens(1, 9))
        assert (result.kv == KV).all()
        assert match.blocks == 4


async def test_publish_gives_up_at_its_deadline(market, stopped):
    other = sample_tokens(2, 4)
    with taking(3, at_least_s=0.1), pytest.raises(DeadlineExceededError):
        await market.publish(other, sample_kv(other), deadline_s=0.1)


async def test_publish_gives_up_when_the_lock_does_not_come(market, stopped):
    other = sample_tokens(2, 4)
    with (
        taking(9, at_least_s=WAIT_S / 2),
        pytest.raises(RegistryUnavailableError, match=f"process {stopped.pid}"),
    ):
        await market.publish(other, sample_kv(other), deadline_s=9)


async def test_what_was_not_announced_can_be_published_later(market, stopped, config):
    other = sample_tokens(2, 4)
    with pytest.raises(RegistryError):
        await market.publish(other, sample_kv(other), deadline_s=9)
    go_on(stopped)
    report = await market.publish(other, sample_kv(other))
    assert (report.blocks, report.blocks_new) == (4, 4)
    async with Marketplace("model", SPEC, config=config) as reader:
        assert ((await reader.fetch(other)).kv == sample_kv(other)).all()


async def test_a_late_publish_may_still_appear(market, stopped):
    other = sample_tokens(2, 4)
    with pytest.raises(DeadlineExceededError):
        await market.publish(other, sample_kv(other), deadline_s=0.05)
    go_on(stopped)
    assert (await market.publish(other, sample_kv(other))).blocks == 4
    assert ((await market.fetch(other)).kv == sample_kv(other)).all()


async def test_the_first_publish_of_a_process_gives_up_too(market, stopped, config):
    """It has to enter itself as an owner first."""
    async with Marketplace("model", SPEC, config=config) as fresh:
        assert (await fresh.fetch(TOKENS)).report.blocks_adopted == 4
        with taking(3), pytest.raises(DeadlineExceededError):
            await fresh.publish(TOKENS, KV, deadline_s=0.1)


async def test_withdraw_works_at_once_for_readers(market, stopped, config):
    async with Marketplace("model", SPEC, config=config) as reader:
        with taking(3):
            assert await market.withdraw(TOKENS) == 4
            assert not (await reader.fetch(TOKENS)).report.hit


async def test_an_engine_is_never_kept_waiting(market, stopped, config):
    """offer and retract come from an engine's step; the registry is not their business."""
    memory, pages = market.allocate(64)
    go_on(stopped)
    region = market.core.lend(PagedMemory.packed(pages), [memory])
    publisher = market.core.publisher(region)
    stop_with_the_lock(stopped, config)
    slow = 0
    for turn in range(QUEUE_MAX + 200):
        began = time.monotonic()
        publisher.offer(block_keys([turn.to_bytes(32, "big")]), [turn % 64])
        publisher.retract([(turn + 32) % 64])
        slow += time.monotonic() - began > 0.05
    assert slow < 10, "more than a busy machine explains"
    assert market.metrics()["announcements_dropped"] > 0
    with taking(3), pytest.raises(DeadlineExceededError):
        publisher.flush(Deadline(0.1))
    memory.close()


async def test_a_new_process_says_who_keeps_it_waiting(market, stopped, peers, config):
    newcomer = peers.spawn()
    newcomer.call(set_wait, WAIT_S)
    with taking(9), pytest.raises(RegistryUnavailableError, match=f"process {stopped.pid} held the write lock"):
        newcomer.call(jobs.open_market, config)
    go_on(stopped)
    newcomer.call(jobs.open_market, config)
    assert newcomer.call(jobs.fetch, 1, 4)[0].blocks_adopted == 4


def set_wait(state, seconds):
    lmdb_file.WRITE_WAIT_S = seconds


async def test_what_the_dead_left_can_wait(market, stopped, peers, config):
    """A market that starts sweeps; when it cannot, it starts without."""
    go_on(stopped)
    dead = peers.spawn()
    dead.call(jobs.open_market, config)
    dead.call(jobs.publish, 6, 3)
    dead.kill()
    stop_with_the_lock(stopped, config)
    async with Marketplace("model", SPEC, config=config) as newcomer:
        assert (await newcomer.fetch(TOKENS)).report.blocks_adopted == 4
        assert not (await newcomer.fetch(sample_tokens(6, 3))).report.hit
        go_on(stopped)


async def test_a_market_that_cannot_start_leaves_nothing_open(market, stopped, config):
    """A namespace nobody has opened yet has to be written down."""
    (file,) = lmdb_file._open_files.values()
    users = file.users
    for _ in range(2):
        with pytest.raises(RegistryUnavailableError, match=f"process {stopped.pid}"):
            Marketplace("another model", SPEC, config=config)
    assert file.users == users


async def test_closing_does_not_hang(config, peers, market, stopped):
    go_on(stopped)
    other = Marketplace("model", SPEC, config=config)
    await other.publish(sample_tokens(3, 2), sample_kv(sample_tokens(3, 2)))
    stop_with_the_lock(stopped, config)
    with taking(9):
        await other.aclose()
    assert not (await market.fetch(sample_tokens(3, 2))).report.hit
    go_on(stopped)
    async with Marketplace("model", SPEC, config=replace(config)) as later:
        assert len(list((config.directory / "owners").iterdir())) == 1, "what it left is swept"
        assert (await later.fetch(TOKENS)).report.hit


async def test_a_stopped_owner_can_still_be_read(market, peers, config):
    """One-sided: nothing of the owner's process is needed."""
    owner = peers.spawn()
    owner.call(jobs.open_market, config)
    owner.call(jobs.publish, 5, 10)
    os.kill(owner.pid, signal.SIGSTOP)
    tokens = sample_tokens(5, 10)
    with taking(5):
        result = await market.fetch(tokens)
    assert (result.kv == sample_kv(tokens)).all()


async def test_a_reset_does_not_wait_for_it(stopped, market):
    """As vLLM's engine asks for it: its thread goes on, and the reset is made when that process goes on."""
    resets, before = Resets(), market.core.epoch_hint()
    began = time.monotonic()
    assert not resets.make([market.core])
    assert time.monotonic() - began < WAIT_S
    assert resets.owed
    began = time.monotonic()
    assert not resets.go_on([market.core])
    assert time.monotonic() - began < 0.1, "nothing is waited for while it is owed"
    await asyncio.sleep(2 * WAIT_S)  # the first attempt fails
    go_on(stopped)
    until(lambda: resets.go_on([market.core]), "the reset is made")
    assert market.core.epoch_hint() != before
    assert (await market.fetch(TOKENS)).report.blocks_adopted == 0
    assert resets.make([market.core]), "without anybody in the way it is done when it returns"
