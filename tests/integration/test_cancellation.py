"""A call that is cancelled or late: when it is over, nobody touches the caller's memory any more."""

import asyncio
import contextlib
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from kvmarket import DeadlineExceededError, MarketClosedError, Marketplace, MissReason
from kvmarket.fetch import Fetcher
from kvmarket.region.pages import copy_pages
from kvmarket.registry.memory import MemoryRegistry
from kvmarket.testing.samples import sample_kv, sample_spec, sample_tokens

SPEC = sample_spec(256 << 10)
BLOCKS = 96
"""24 MiB: many groups."""
TOKENS = sample_tokens(1, BLOCKS)
KV = sample_kv(TOKENS, SPEC)


class Slow:
    """A function that takes a while longer, and remembers how often it ran at once and how many bytes it moved."""

    def __init__(self, function, seconds_per_mib):
        self.function, self.seconds_per_mib = function, seconds_per_mib
        self.running = self.most = self.nbytes = 0
        self.lock = threading.Lock()

    def __call__(self, source, source_pages, *args):
        nbytes = len(source_pages) * source.layout.page_bytes
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.seconds_per_mib * nbytes / 2**20)
        self.function(source, source_pages, *args)
        with self.lock:
            self.running -= 1
            self.nbytes += nbytes


@pytest.fixture
def slow_reads(monkeypatch):
    """Reading everything takes half a second, or half of that with two threads."""
    slow = Slow(copy_pages, 0.02)
    monkeypatch.setattr("kvmarket.transport.mapped.copy_pages", slow)
    return slow


@pytest.fixture
def slow_publish(monkeypatch):
    slow = Slow(copy_pages, 0.2 / 24)
    monkeypatch.setattr("kvmarket.arena_publish.copy_pages", slow)
    return slow


@pytest.fixture
def config(config):
    return replace(config, arena_bytes=32 << 20, fetch_deadline_s=10.0)


@pytest.fixture
async def market(config):
    async with Marketplace("model", SPEC, config=config) as market:
        yield market


async def still(memory, copies):
    """Assert that nothing is being written and nothing is written a while later."""
    assert copies.running == 0
    memory[:] = 0xEE
    await asyncio.sleep(0.1)
    assert copies.running == 0
    assert (memory == 0xEE).all()


@pytest.mark.parametrize("after_s", [0, 0.01, 0.06, 0.13])
async def test_a_cancelled_fetch_writes_no_more(market, slow_reads, after_s):
    await market.publish(TOKENS, KV)
    out = np.zeros_like(KV)
    task = asyncio.create_task(market.fetch(TOKENS, out=out))
    await asyncio.sleep(after_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow_reads.nbytes < KV.nbytes, "it went on to the end"
    await still(out, slow_reads)
    assert (await market.fetch(TOKENS)).report.blocks_adopted == BLOCKS, "the market goes on"


async def test_cancelling_twice_does_not_leave_the_memory_behind(market, slow_reads):
    await market.publish(TOKENS, KV)
    out = np.zeros_like(KV)
    task = asyncio.create_task(market.fetch(TOKENS, out=out))
    await asyncio.sleep(0.02)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    await still(out, slow_reads)


async def test_a_late_fetch_ends_with_what_is_proven(market, slow_reads):
    await market.publish(TOKENS, KV)
    out = np.zeros_like(KV)
    slow_reads.seconds_per_mib = 0.1  # a group takes 0.4 s: the first is in before the deadline also on a busy machine
    began = time.monotonic()
    result = await market.fetch(TOKENS, out=out, deadline_s=0.7)
    assert time.monotonic() - began < 5
    assert result.report.reason is MissReason.DEADLINE
    assert 0 < result.report.blocks_adopted < BLOCKS
    assert (result.kv == KV[: result.report.blocks_adopted]).all()
    await still(out, slow_reads)


async def test_a_timeout_around_a_fetch_works_like_any_other(market, slow_reads):
    await market.publish(TOKENS, KV)
    out = np.zeros_like(KV)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await market.fetch(TOKENS, out=out)
    await still(out, slow_reads)


@pytest.mark.parametrize("after_s", [0, 0.01, 0.05])
async def test_a_cancelled_publish_reads_no_more(market, slow_publish, after_s):
    kv = KV.copy()
    task = asyncio.create_task(market.publish(TOKENS, kv))
    await asyncio.sleep(after_s)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow_publish.running == 0
    kv[:] = 0  # the caller's memory is the caller's again
    await asyncio.sleep(0.25)
    result = await market.fetch(TOKENS)
    assert (result.kv == KV[: result.report.blocks_adopted]).all(), "bytes of a reused buffer were published"


async def test_a_late_publish_reads_no_more(market, slow_publish):
    kv = KV.copy()
    with contextlib.suppress(DeadlineExceededError):  # or it was announced while the copy was waited for
        await market.publish(TOKENS, kv, deadline_s=0.02)
    assert slow_publish.running == 0
    kv[:] = 0
    await asyncio.sleep(0.25)
    result = await market.fetch(TOKENS)
    assert (result.kv == KV[: result.report.blocks_adopted]).all(), "bytes of a reused buffer were published"


async def test_publishes_that_wait_for_their_turn_can_be_late(market, slow_publish):
    first = asyncio.create_task(market.publish(TOKENS, KV))
    await asyncio.sleep(0.02)
    with pytest.raises(DeadlineExceededError):
        await market.publish(sample_tokens(2, 1), sample_kv(sample_tokens(2, 1), SPEC), deadline_s=0.02)
    assert not first.done(), "it did not wait for the other one"
    assert (await first).blocks == BLOCKS
    assert not (await market.fetch(sample_tokens(2, 1))).report.hit, "what never began never happens"


async def test_no_more_fetches_run_at_once_than_allowed(config, monkeypatch):
    running, most, lock, read = set(), [], threading.Lock(), Fetcher.read

    def counted(self, *args):
        with lock:
            running.add(threading.get_ident())
            most.append(len(running))
        time.sleep(0.05)
        outcome = read(self, *args)
        with lock:
            running.remove(threading.get_ident())
        return outcome

    monkeypatch.setattr(Fetcher, "read", counted)
    async with Marketplace("model", SPEC, config=replace(config, fetch_concurrency=2)) as market:
        await market.publish(TOKENS, KV)
        results = await asyncio.gather(*(market.fetch(TOKENS) for _ in range(5)))
        assert max(most) == 2
        assert all((result.kv == KV).all() for result in results)


async def test_a_fetch_that_never_gets_its_turn_is_a_miss_in_time(config, slow_reads):
    async with Marketplace("model", SPEC, config=replace(config, fetch_concurrency=1)) as market:
        await market.publish(TOKENS, KV)
        busy = asyncio.create_task(market.fetch(TOKENS))
        await asyncio.sleep(0.01)
        report = (await market.fetch(TOKENS, deadline_s=0.05)).report
        assert not busy.done(), "it did not wait for the other one"
        assert (report.reason, report.blocks_adopted) == (MissReason.DEADLINE, 0)
        assert "too many fetches" in report.detail
        waiting = asyncio.create_task(market.fetch(TOKENS))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await busy).report.blocks_adopted == BLOCKS
        assert (await market.fetch(TOKENS)).report.blocks_adopted == BLOCKS, "no slot was lost"


async def test_closing_waits_for_what_runs(config, slow_reads):
    market = Marketplace("model", SPEC, config=config)
    await market.publish(TOKENS, KV)
    running = asyncio.create_task(market.fetch(TOKENS))
    await asyncio.sleep(0.02)
    closing = [asyncio.create_task(market.aclose()) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(MarketClosedError):
        await market.fetch(TOKENS)
    await asyncio.gather(*closing)
    assert slow_reads.running == 0
    result = await running
    assert (result.kv == KV[: result.report.blocks_adopted]).all()


async def test_closing_goes_on_when_it_is_cancelled(config, slow_reads):
    market = Marketplace("model", SPEC, config=config)
    await market.publish(TOKENS, KV)
    running = asyncio.create_task(market.fetch(TOKENS))
    await asyncio.sleep(0.02)
    closing = asyncio.create_task(market.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await market.aclose()
    await running
    async with Marketplace("model", SPEC, config=config) as other:
        assert other.core.registry.namespaces() == []


class SlowRegistry(MemoryRegistry):
    """A registry that is not local: look-ups wait for a network."""

    local = False

    def lookup(self, *args):
        time.sleep(1)
        return super().lookup(*args)


async def test_a_slow_look_up_is_a_miss_in_time(config):
    async with Marketplace("model", SPEC, config=config, registry=SlowRegistry()) as market:
        await market.publish(TOKENS, KV)
        assert (await market.fetch(TOKENS)).report.blocks_adopted == BLOCKS
        began = time.monotonic()
        report = (await market.fetch(TOKENS, deadline_s=0.05)).report
        assert time.monotonic() - began < 0.9
        assert (report.reason, report.blocks_adopted) == (MissReason.DEADLINE, 0)
