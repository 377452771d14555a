"""Wrong bytes, and bytes of old weights, are not adopted."""

import asyncio
from dataclasses import replace

import market_jobs as jobs
import numpy as np
import pytest

from kvmarket import Marketplace, MissReason
from kvmarket.region.pages import copy_pages
from kvmarket.registry.records import NO_DIGEST
from kvmarket.testing.samples import SPEC, sample_kv, sample_spec, sample_tokens

LARGE = sample_spec(64 << 10)
BLOCKS = 64


def corrupt(state, pages):
    """Change published bytes behind kvmarket's back, as a bug in an engine would."""
    arena = state.market._arena._arena
    arena.pages.memories[0].reshape(-1, state.spec.page_bytes)[pages] ^= 1


@pytest.fixture(params=[SPEC, LARGE], ids=["small", "large"])
def spec(request):
    return request.param


@pytest.fixture
def owner(peers, config, spec):
    peer = peers.spawn()
    peer.call(jobs.open_market, replace(config, arena_bytes=8 << 20), "model", spec)
    peer.call(jobs.publish, 1, BLOCKS)
    return peer


TOKENS = sample_tokens(1, BLOCKS)


async def test_full_verification_finds_every_changed_page(owner, config, spec):
    async with Marketplace("model", spec, config=config) as market:
        assert (await market.fetch(TOKENS)).report.blocks_verified == BLOCKS
        for bad in (BLOCKS - 1, 40, 0):
            owner.call(corrupt, [bad])
            result = await market.fetch(TOKENS)
            assert (result.report.reason, result.report.blocks_adopted) == (MissReason.DIGEST_MISMATCH, bad)
            assert (result.kv == sample_kv(TOKENS, spec)[:bad]).all()
            assert result.report.first_missing_block == bad
        assert market.metrics()["blocks_refused{reason=digest_mismatch}"] > 0


async def test_without_verification_they_go_through(owner, config, spec):
    """Which shows that the test above tests something."""
    async with Marketplace("model", spec, config=replace(config, verify="none")) as market:
        owner.call(corrupt, [40])
        result = await market.fetch(TOKENS)
        assert (result.report.reason, result.report.blocks_adopted) == (MissReason.NONE, BLOCKS)
        assert result.report.blocks_verified == 0
        assert (result.kv != sample_kv(TOKENS, spec)).any(axis=1).tolist() == [block == 40 for block in range(BLOCKS)]


async def test_samples_find_changes_sooner_or_later(owner, config, spec):
    async with Marketplace("model", spec, config=replace(config, verify="sampled")) as market:
        report = (await market.fetch(TOKENS)).report
        assert report.blocks_verified == BLOCKS // 16
        owner.call(corrupt, list(range(BLOCKS)))
        assert (await market.fetch(TOKENS)).report.reason is MissReason.DIGEST_MISMATCH
        short = (await market.fetch(TOKENS[:16])).report
        assert short.blocks_adopted == 0, "a single page is always looked at"


@pytest.mark.parametrize("theirs", ["none", "sampled"])
async def test_who_verifies_takes_nothing_from_who_does_not(peers, config, theirs):
    peer = peers.spawn()
    peer.call(jobs.open_market, replace(config, verify=theirs))
    peer.call(jobs.publish, 1, 4)
    tokens = sample_tokens(1, 4)
    async with Marketplace("model", SPEC, config=config) as market:
        report = (await market.fetch(tokens)).report
        assert (report.reason, report.blocks_adopted) == (MissReason.UNVERIFIED, 0)
        assert f"KVMARKET_VERIFY={theirs}" in report.detail
        await market.publish(tokens[:32], sample_kv(tokens[:32]))
        report = (await market.fetch(tokens)).report
        assert (report.reason, report.blocks_adopted) == (MissReason.UNVERIFIED, 2), "another owner steps in"
    for ours in ("none", "sampled"):
        async with Marketplace("model", SPEC, config=replace(config, verify=ours)) as market:
            assert (await market.fetch(tokens)).report.blocks_adopted == 4


async def test_records_without_a_digest_prove_nothing(market_without_digests, config):
    """Even of an owner that says it verifies."""
    tokens = sample_tokens(1, 4)
    async with Marketplace("model", SPEC, config=config) as market:
        report = (await market.fetch(tokens)).report
        assert (report.reason, report.blocks_adopted) == (MissReason.UNVERIFIED, 0)
        found, _, _ = market.core.fetcher.lookup(market._keys(tokens, None))
        assert (found.blocks, market.core.fetcher.fresh(found).first_missing) == (4, "unverified")


@pytest.fixture
async def market_without_digests(config):
    async with Marketplace("model", SPEC, config=config) as market:
        tokens = sample_tokens(1, 4)
        await market.publish(tokens, sample_kv(tokens))
        registry, digest = market.core.registry, market.namespace.digest
        keys = market._keys(tokens, None)
        records = registry.lookup(digest, keys).records.copy()
        records["digest"] = np.void(NO_DIGEST)
        assert registry.announce(digest, registry.epoch(digest), keys, records)
        yield market


async def test_a_new_epoch_makes_everybody_forget(owner, config, peers, spec):
    other = peers.spawn()
    other.call(jobs.open_market, config, "model", spec)
    async with Marketplace("model", spec, config=config) as market:
        assert (await market.fetch(TOKENS)).report.blocks_adopted == BLOCKS
        epoch = other.call(jobs.bump_epoch)
        assert epoch == market.core.registry.epoch(market.namespace.digest)
        result = await market.fetch(TOKENS)
        assert (result.report.reason, result.report.blocks_adopted) == (MissReason.NOT_PUBLISHED, 0)
        assert other.call(jobs.fetch, 1, BLOCKS)[0].blocks_adopted == 0


async def test_an_owner_that_did_not_hear_of_the_epoch_publishes_nothing_old(owner, config, peers, spec):
    """Its next announcement is refused; then it forgets what it had, and starts again."""
    other = peers.spawn()
    other.call(jobs.open_market, config, "model", spec)
    other.call(jobs.bump_epoch)
    async with Marketplace("model", spec, config=config) as market:
        report = owner.call(jobs.publish, 2, 3)
        assert report.blocks == 0, "not readable, and said so"
        assert not (await market.fetch(sample_tokens(2, 3))).report.hit
        report = owner.call(jobs.publish, 2, 3)
        assert (report.blocks, report.blocks_new) == (3, 3)
        assert (await market.fetch(sample_tokens(2, 3))).report.blocks_adopted == 3
        assert not (await market.fetch(TOKENS)).report.hit, "older blocks stay forgotten"
        report = owner.call(jobs.publish, 1, BLOCKS)
        assert (report.blocks, report.blocks_new) == (BLOCKS, BLOCKS)


async def test_the_process_that_bumps_forgets_its_own_blocks(owner, config, spec):
    async with Marketplace("model", spec, config=config) as market:
        owner.call(jobs.bump_epoch)
        assert not (await market.fetch(TOKENS)).report.hit
        assert owner.call(jobs.publish, 1, BLOCKS).blocks == BLOCKS
        assert (await market.fetch(TOKENS)).report.blocks_adopted == BLOCKS


async def test_a_new_epoch_during_a_fetch_discards_it(owner, config, spec, monkeypatch):
    async with Marketplace("model", spec, config=config) as market:
        copied = []

        def copy_and_bump(*args):
            copy_pages(*args)
            if not copied:
                owner.call(jobs.bump_epoch)
            copied.append(args)

        monkeypatch.setattr("kvmarket.transport.mapped.copy_pages", copy_and_bump)
        result = await market.fetch(TOKENS)
        assert copied
        assert (result.report.reason, result.report.blocks_adopted) in {
            (MissReason.EPOCH_CHANGED, 0),
            (MissReason.TORN, 0),
        }
        assert len(result.kv) == 0


async def test_a_new_epoch_by_a_bystander_during_a_fetch_discards_it(owner, config, peers, spec, monkeypatch):
    """The owner does not know yet, so its generations say nothing: the registry's epoch does."""
    other = peers.spawn()
    other.call(jobs.open_market, config, "model", spec)
    async with Marketplace("model", spec, config=config) as market:
        copied = []

        def copy_and_bump(*args):
            copy_pages(*args)
            if not copied:
                other.call(jobs.bump_epoch)
            copied.append(args)

        monkeypatch.setattr("kvmarket.transport.mapped.copy_pages", copy_and_bump)
        result = await market.fetch(TOKENS)
        assert (result.report.reason, result.report.blocks_adopted) == (MissReason.EPOCH_CHANGED, 0)
        assert "told to forget" in result.report.detail


async def test_epochs_and_publishes_at_once(config, peers):
    """Whatever the order, what can be fetched in the end was published in the last epoch."""
    peer = peers.spawn()
    peer.call(jobs.open_market, config)
    tokens = sample_tokens(1, 4)
    kv = sample_kv(tokens)
    async with Marketplace("model", SPEC, config=config) as market:
        for _ in range(20):
            peer.start(jobs.bump_epoch)
            await asyncio.gather(*(market.publish(tokens, kv) for _ in range(3)))
            peer.result()
            result = await market.fetch(tokens)
            assert (result.kv == kv[: len(result.kv)]).all()
        for _ in range(2):  # the first one may be the one that hears of the epoch
            report = await market.publish(tokens, kv)
        assert report.blocks == 4
        assert (await market.fetch(tokens)).report.blocks_adopted == 4


async def test_a_record_that_names_a_page_of_no_region_is_a_miss(config, peers):
    """The registry holds hints; nonsense in it must not become an exception."""
    peer = peers.spawn()
    peer.call(jobs.open_market, config)
    peer.call(jobs.publish, 1, 1)
    async with Marketplace("model", SPEC, config=config) as market:
        keys = market._keys(sample_tokens(1, 1), None)
        registry, digest = market.core.registry, market.namespace.digest
        found = registry.lookup(digest, keys)
        for field, value, reason in (
            ("page", 10**9, MissReason.STALE_GENERATION),
            ("region", 77, MissReason.OWNER_GONE),
            ("generation", 10**9, MissReason.STALE_GENERATION),
        ):
            records = found.records.copy()
            records[field] = value
            assert registry.announce(digest, found.epoch, keys, records)
            report = (await market.fetch(sample_tokens(1, 1))).report
            assert (report.blocks_adopted, report.reason) == (0, reason)
        records = np.concatenate([found.records])
        assert registry.announce(digest, found.epoch, keys, records)
        assert (await market.fetch(sample_tokens(1, 1))).report.hit


async def test_a_region_of_another_shape_is_refused(config, peers):
    peer = peers.spawn()
    peer.call(jobs.open_market, config)
    peer.call(jobs.publish, 1, 1)
    async with Marketplace("model", SPEC, config=config) as market:
        registry = market.core.registry
        found = registry.lookup(market.namespace.digest, market._keys(sample_tokens(1, 1), None))
        owner, region = int(found.records["owner"][0]), int(found.records["region"][0])
        wire = registry.region(owner, region)
        registry.register_region(owner, region, {**wire, "spec": bytes(16)})
        report = (await market.fetch(sample_tokens(1, 1))).report
        assert (report.blocks_adopted, report.reason) == (0, MissReason.SPEC_MISMATCH)
        assert SPEC.fingerprint.hex() in report.detail
        registry.register_region(owner, region, {**wire, "layout": "nonsense"})
        report = (await market.fetch(sample_tokens(1, 1))).report
        assert (report.blocks_adopted, report.reason) == (0, MissReason.UNREACHABLE)
        assert "descriptor" in report.detail
