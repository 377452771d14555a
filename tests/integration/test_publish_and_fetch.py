"""Marketplaces of several processes: what one publishes the others fetch, byte for byte."""

from dataclasses import replace

import market_jobs as jobs
import numpy as np
import pytest

from kvmarket import Marketplace, MissReason, ModelIdentity
from kvmarket.region.pages import PagedMemory, PageLayout, Segment
from kvmarket.registry.memory import MemoryRegistry
from kvmarket.testing.samples import SPEC, sample_kv, sample_spec, sample_tokens

LARGE = sample_spec(64 << 10)
"""Pages so large that a few are read on a thread, in several groups."""


@pytest.fixture
async def market(config):
    async with Marketplace("model", SPEC, config=config) as market:
        yield market


@pytest.fixture
def publisher(peers, config):
    peer = peers.spawn()
    peer.call(jobs.open_market, config)
    return peer


@pytest.mark.parametrize(("spec", "blocks"), [(SPEC, 1), (SPEC, 31), (SPEC, 100), (LARGE, 1), (LARGE, 150)])
async def test_one_process_publishes_and_another_fetches(config, peers, spec, blocks):
    config = replace(config, arena_bytes=16 << 20)
    peer = peers.spawn()
    peer.call(jobs.open_market, config, "model", spec)
    published = peer.call(jobs.publish, 1, blocks)
    assert (published.tokens, published.blocks, published.blocks_new) == (blocks * 16, blocks, blocks)
    assert published.nbytes_copied == blocks * spec.page_bytes
    tokens = sample_tokens(1, blocks, tail=5)
    async with Marketplace("model", spec, config=config) as market:
        result = await market.fetch(tokens)
        assert (result.kv == sample_kv(tokens, spec)).all()
        assert result.kv.shape == (blocks, spec.page_bytes)
        report = result.report
        assert (report.reason, report.first_missing_block, report.detail) == (MissReason.NONE, None, "")
        assert (report.tokens_asked, report.tokens_matched, report.tokens_adopted) == (
            len(tokens),
            blocks * 16,
            blocks * 16,
        )
        assert (report.blocks_adopted, report.blocks_verified) == (blocks, blocks)
        assert report.nbytes == blocks * spec.page_bytes
        assert report.transport == "shm"
        assert list(report.sources.values()) == [blocks]
        assert f"pid {peer.pid}" in next(iter(report.sources))
        assert {"hash", "lookup", "connect", "read", "verify", "total"} == set(report.stages)
        match = await market.match(tokens)
        assert (match.tokens, match.blocks, match.blocks_asked, match.reason) == (blocks * 16, blocks, blocks, "none")


async def test_within_one_process_bytes_are_copied_directly(market, config):
    tokens = sample_tokens(1, 20)
    await market.publish(tokens, sample_kv(tokens))
    async with Marketplace("model", SPEC, config=config) as other:
        result = await other.fetch(tokens)
        assert (result.kv == sample_kv(tokens)).all()
        assert result.report.transport == "inproc"
        assert (await market.fetch(tokens)).report.transport == "inproc", "its own blocks, too"


async def test_a_registry_object_may_be_shared(config):
    registry = MemoryRegistry()
    tokens = sample_tokens(1, 5)
    async with (
        Marketplace("model", SPEC, config=config, registry=registry) as first,
        Marketplace("model", SPEC, config=config, registry=registry) as second,
    ):
        await first.publish(tokens, sample_kv(tokens))
        assert ((await second.fetch(tokens)).kv == sample_kv(tokens)).all()
    assert registry.namespaces() == []


async def test_a_prefix_of_what_is_published_and_more_than_it(market, publisher):
    publisher.call(jobs.publish, 1, 10)
    tokens, kv = sample_tokens(1, 30), sample_kv(sample_tokens(1, 30))
    for blocks, found in ((1, 1), (9, 9), (10, 10), (11, 10), (30, 10)):
        result = await market.fetch(tokens[: blocks * 16])
        assert (result.kv == kv[:found]).all()
        assert result.report.blocks_adopted == found
        if blocks > found:
            assert (result.report.reason, result.report.first_missing_block) == (MissReason.NOT_PUBLISHED, found)


@pytest.mark.parametrize("position", [0, 15, 16, 79, 80, 159])
async def test_a_prompt_that_differs_somewhere_shares_the_blocks_before(market, publisher, position):
    publisher.call(jobs.publish, 1, 10)
    tokens = sample_tokens(1, 10)
    kv = sample_kv(tokens)
    tokens[position] += 1
    result = await market.fetch(tokens)
    assert result.report.blocks_adopted == position // 16
    assert (result.kv == kv[: position // 16]).all()


async def test_extra_keys_tell_equal_tokens_apart(market):
    tokens, kv = sample_tokens(1, 4), sample_kv(sample_tokens(1, 4))
    cat, dog = [b"", b"cat", b"", b""], [b"", b"dog", b"", b""]
    await market.publish(tokens, kv, extra_keys=cat)
    assert (await market.fetch(tokens, extra_keys=cat)).report.blocks_adopted == 4
    assert (await market.fetch(tokens, extra_keys=dog)).report.blocks_adopted == 1
    assert (await market.fetch(tokens)).report.blocks_adopted == 1
    assert await market.withdraw(tokens, extra_keys=cat) == 4


async def test_publishing_again_copies_only_what_is_new(market, config):
    tokens = sample_tokens(1, 10)
    kv = sample_kv(tokens)
    assert (await market.publish(tokens[: 6 * 16], kv[:6])).blocks_new == 6
    report = await market.publish(tokens, kv)
    assert (report.blocks, report.blocks_new, report.nbytes_copied) == (10, 4, 4 * SPEC.page_bytes)
    assert (await market.publish(tokens, kv)).blocks_new == 0
    async with Marketplace("model", SPEC, config=config) as other:
        assert ((await other.fetch(tokens)).kv == kv).all()


async def test_several_owners_each_serve_what_they_have(config, peers):
    owners = [peers.spawn() for _ in range(3)]
    for owner, blocks in zip(owners, (4, 12, 8), strict=True):
        owner.call(jobs.open_market, config)
        owner.call(jobs.publish, 1, blocks)
    tokens = sample_tokens(1, 12)
    async with Marketplace("model", SPEC, config=config) as market:
        assert len((await market.match(tokens)).owners) == 3
        result = await market.fetch(tokens)
        assert (result.kv == sample_kv(tokens)).all()
        owners[1].call(jobs.withdraw, 1, 12)
        result = await market.fetch(tokens)
        assert result.report.blocks_adopted == 8
        owners[2].kill()
        result = await market.fetch(tokens)
        assert result.report.blocks_adopted == 4
        assert (result.kv == sample_kv(tokens)[:4]).all()
        assert result.report.reason in {MissReason.OWNER_GONE, MissReason.NOT_PUBLISHED}


async def test_withdrawn_blocks_are_gone_for_everybody(market, publisher):
    publisher.call(jobs.publish, 1, 6)
    tokens = sample_tokens(1, 6)
    assert (await market.fetch(tokens)).report.blocks_adopted == 6
    assert publisher.call(jobs.withdraw, 1, 6) == 6
    report = (await market.fetch(tokens)).report  # the pages are taken back at once, their records soon after
    assert report.blocks_adopted == 0
    assert report.reason in {MissReason.NOT_PUBLISHED, MissReason.STALE_GENERATION}
    assert publisher.call(jobs.withdraw, 1, 6) == 0
    publisher.call(jobs.publish, 1, 6)
    assert (await market.fetch(tokens)).report.blocks_adopted == 6


async def test_a_closed_marketplace_serves_nothing(market, publisher):
    publisher.call(jobs.publish, 1, 6)
    assert (await market.fetch(sample_tokens(1, 6))).report.blocks_adopted == 6
    publisher.call(jobs.close_market)
    assert not (await market.fetch(sample_tokens(1, 6))).report.hit


async def test_old_blocks_make_room_leaf_first(config, peers):
    """An arena of 8 pages: the oldest prefix loses its tail, never its head."""
    peer = peers.spawn()
    peer.call(jobs.open_market, replace(config, arena_bytes=8 * SPEC.page_bytes))
    peer.call(jobs.publish, 1, 5)
    peer.call(jobs.publish, 2, 5)
    async with Marketplace("model", SPEC, config=config) as market:
        first = await market.fetch(sample_tokens(1, 5))
        second = await market.fetch(sample_tokens(2, 5))
    assert (first.kv == sample_kv(sample_tokens(1, 3))).all()
    assert first.report.blocks_adopted == 3
    assert (second.kv == sample_kv(sample_tokens(2, 5))).all()


async def test_a_prefix_that_grows_makes_others_go_and_never_itself(config, peers):
    peer = peers.spawn()
    peer.call(jobs.open_market, replace(config, arena_bytes=8 * SPEC.page_bytes))
    peer.call(jobs.publish, 1, 5)
    peer.call(jobs.publish, 2, 3)
    report = peer.call(jobs.publish, 1, 8)
    assert (report.blocks, report.blocks_new) == (8, 3)
    async with Marketplace("model", SPEC, config=config) as market:
        assert (await market.fetch(sample_tokens(1, 8))).report.blocks_adopted == 8
        for seed in (1, 3):
            with pytest.raises(ValueError, match="9 blocks do not fit an arena of 8"):
                peer.call(jobs.publish, seed, 9)
        assert (await market.fetch(sample_tokens(1, 8))).report.blocks_adopted == 8


async def test_pages_are_published_in_place_from_scattered_memory(config, peers, market):
    """Two tensors of half a page each, pages out of order: nothing is copied to publish."""
    num, half = 6, SPEC.page_bytes // 2
    memory, _ = market.allocate(num + 1)
    layout = PageLayout(num, (Segment(0, num * half + 64, half, half), Segment(0, 0, half, half)))
    pages = PagedMemory(layout, (memory.array,))
    tokens = sample_tokens(1, num)
    kv = sample_kv(tokens)
    order = [3, 1, 5, 0, 2, 4]
    for block, page in enumerate(order):
        first, second = pages.views(page)
        first[:], second[:] = kv[block, :half], kv[block, half:]
    region = market.core.lend(pages, [memory])
    publisher = market.core.publisher(region)
    keys = market._keys(tokens, None)
    publisher.offer(keys, order)
    publisher.flush(jobs.Deadline(5))
    reader = peers.spawn()
    reader.call(jobs.open_market, config)
    report, equal = reader.call(jobs.fetch, 1, num)
    assert equal
    assert (report.blocks_adopted, report.transport) == (num, "shm")
    publisher.retract(order[4:])
    report, equal = reader.call(jobs.fetch, 1, num)
    assert equal
    assert report.blocks_adopted == 4
    memory.close()


async def test_private_memory_serves_its_own_process_only(config, peers, market):
    tokens = sample_tokens(1, 3)
    pages = PagedMemory.packed(sample_kv(tokens))
    publisher = market.core.publisher(market.core.lend(pages))
    publisher.offer(market._keys(tokens, None), [0, 1, 2])
    publisher.flush(jobs.Deadline(5))
    assert ((await market.fetch(tokens)).kv == sample_kv(tokens)).all()
    reader = peers.spawn()
    reader.call(jobs.open_market, config)
    report, _ = reader.call(jobs.fetch, 1, 3)
    assert (report.blocks_adopted, report.reason) == (0, MissReason.UNREACHABLE)
    assert "private" in report.detail


@pytest.mark.parametrize(("transport", "expected"), [("inproc", "unreachable"), ("shm", "none"), ("auto", "none")])
async def test_the_transport_can_be_demanded(config, publisher, transport, expected):
    publisher.call(jobs.publish, 1, 3)
    async with Marketplace("model", SPEC, config=replace(config, transport=transport)) as market:
        report = (await market.fetch(sample_tokens(1, 3))).report
    assert report.reason == expected
    assert report.transport == ("shm" if expected == "none" else "")
    if expected != "none":
        assert "another process" in report.detail, "a transport that was demanded is never replaced"


async def test_out_is_filled_and_nothing_beyond_it(market, publisher):
    publisher.call(jobs.publish, 1, 3)
    tokens = sample_tokens(1, 5)
    out = np.full((7, SPEC.page_bytes), 0xAB, np.uint8)
    result = await market.fetch(tokens, out=out)
    assert np.shares_memory(result.kv, out)
    assert (out[:3] == sample_kv(tokens)[:3]).all()
    assert (out[3:] == 0xAB).all()


async def test_tensors_go_in_and_out(market):
    torch = pytest.importorskip("torch")
    tokens = sample_tokens(1, 3)
    kv = torch.from_numpy(sample_kv(tokens)).view(torch.float16).reshape(3, 2, 2, 2, 16, 16)
    await market.publish(torch.tensor(tokens), kv)
    out = torch.zeros_like(kv)
    result = await market.fetch(torch.tensor(tokens), out=out)
    assert result.report.blocks_adopted == 3
    assert torch.equal(out.view(torch.uint8), kv.view(torch.uint8))


async def test_results_do_not_share_their_memory(market):
    tokens, other = sample_tokens(1, 3), sample_tokens(2, 3)
    await market.publish(tokens, sample_kv(tokens))
    await market.publish(other, sample_kv(other))
    results = [await market.fetch(prompt) for prompt in (tokens, other) * 3]
    for result, prompt in zip(results, (tokens, other) * 3, strict=True):
        assert (result.kv == sample_kv(prompt)).all()


async def test_models_may_be_named_by_identity(config):
    identity = ModelIdentity("model", revision="main", adapter="lora-1")
    tokens = sample_tokens(1, 2)
    async with (
        Marketplace(identity, SPEC, config=config) as first,
        Marketplace(identity, SPEC, config=config) as second,
    ):
        await first.publish(tokens, sample_kv(tokens))
        assert (await second.fetch(tokens)).report.blocks_adopted == 2
