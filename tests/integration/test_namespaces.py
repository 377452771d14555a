"""Blocks of another namespace are never found, and the report says what differs."""

from dataclasses import replace

import market_jobs as jobs
import pytest

from kvmarket import Marketplace, MissReason, ModelIdentity
from kvmarket.testing.samples import SPEC, sample_spec, sample_tokens

MODEL = ModelIdentity("model", revision="main")


@pytest.fixture
def publisher(peers, config):
    peer = peers.spawn()
    peer.call(jobs.open_market, config, MODEL)
    peer.call(jobs.publish, 1, 4)
    return peer


async def fetch_from(config, model=MODEL, spec=SPEC):
    async with Marketplace(model, spec, config=config) as market:
        match = await market.match(sample_tokens(1, 4))
        result = await market.fetch(sample_tokens(1, 4))
    assert (match.blocks, match.reason, match.detail) == (0, result.report.reason, result.report.detail)
    assert result.kv.shape == (0, spec.page_bytes)
    assert not result.report.hit
    assert result.report.first_missing_block == 0
    return result.report


async def test_the_same_namespace_is_a_hit(publisher, config):
    async with Marketplace(MODEL, SPEC, config=config) as market:
        assert (await market.fetch(sample_tokens(1, 4))).report.blocks_adopted == 4


@pytest.mark.parametrize(
    ("changes", "here", "there"),
    [
        ({"dtype": "bfloat16"}, "'bfloat16'", "'float16'"),
        ({"num_kv_heads": 4}, "4", "2"),
        ({"head_size": 32}, "32", "16"),
        ({"layout": "LKHNC"}, "'LKHNC'", "'LKNHC'"),
        ({"kv_split": False}, "False", "True"),
        ({"quantization": "fp8"}, "'fp8'", "''"),
        ({"packing": "amx"}, "'amx'", "''"),
        ({"tp_size": 2}, "2", "1"),
        ({"pp_size": 2}, "2", "1"),
        ({"block_size": 8}, "8", "16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_another_spec(publisher, config, changes, here, there):
    report = await fetch_from(config, spec=sample_spec(**changes))
    assert report.reason is MissReason.NAMESPACE_DIFFERS
    assert f"spec.{next(iter(changes))}: {here} here, {there} there" in report.detail


async def test_another_model(publisher, config):
    report = await fetch_from(config, replace(MODEL, name="other"))
    assert report.reason is MissReason.NAMESPACE_DIFFERS
    assert "model.name: 'other' here, 'model' there" in report.detail


async def test_another_revision(publisher, config):
    report = await fetch_from(config, replace(MODEL, revision="dev"))
    assert report.reason is MissReason.NAMESPACE_DIFFERS
    assert "model.revision: 'dev' here, 'main' there" in report.detail


async def test_other_weights(publisher, config):
    report = await fetch_from(config, replace(MODEL, weights_digest="1234"))
    assert report.reason is MissReason.NAMESPACE_DIFFERS
    assert "model.weights_digest" in report.detail


async def test_another_adapter(publisher, config):
    report = await fetch_from(config, replace(MODEL, adapter="lora"))
    assert report.reason is MissReason.NAMESPACE_DIFFERS
    assert "model.adapter" in report.detail


async def test_another_tenant(publisher, config):
    report = await fetch_from(replace(config, tenant="acme"))
    assert report.reason is MissReason.NAMESPACE_DIFFERS
    assert "tenant: 'acme' here, '' there" in report.detail


async def test_another_salt(publisher, config):
    report = await fetch_from(replace(config, salt="pepper"))
    assert report.reason is MissReason.NAMESPACE_DIFFERS
    assert "salt: " in report.detail
    assert "pepper" not in report.detail


@pytest.mark.parametrize("algorithm", ["xxh3_64", "xxh3_128", "blake3"])
async def test_another_hash_algorithm(publisher, config, algorithm):
    report = await fetch_from(replace(config, hash=algorithm))
    assert report.reason is MissReason.NAMESPACE_DIFFERS
    assert f"hash.algorithm: '{algorithm}' here, 'sha256' there" in report.detail


async def test_two_namespaces_live_side_by_side(peers, config):
    """Same tokens, other KV: each process gets its own namespace's."""
    dtypes = ("float16", "bfloat16", "int8")
    for number, dtype in enumerate(dtypes):
        peer = peers.spawn()
        peer.call(jobs.open_market, config, MODEL, sample_spec(dtype=dtype))
        peer.call(jobs.publish, 1, 3 + number)
    for number, dtype in enumerate(dtypes):
        async with Marketplace(MODEL, sample_spec(dtype=dtype), config=config) as market:
            result = await market.fetch(sample_tokens(1, 9))
            assert result.report.blocks_adopted == 3 + number
            assert (result.kv == jobs.sample_kv(sample_tokens(1, 3 + number), sample_spec(dtype=dtype))).all()


async def test_a_namespace_whose_owner_died_is_not_offered_as_an_explanation(publisher, config):
    publisher.kill()
    report = await fetch_from(config, replace(MODEL, revision="dev"))
    assert report.reason is MissReason.NOT_PUBLISHED


@pytest.mark.parametrize("algorithm", ["xxh3_64", "xxh3_128", "blake3"])
async def test_every_algorithm_works_between_processes(peers, config, algorithm):
    config = replace(config, hash=algorithm)
    peer = peers.spawn()
    peer.call(jobs.open_market, config)
    peer.call(jobs.publish, 1, 40)
    async with Marketplace("model", SPEC, config=config) as market:
        result = await market.fetch(sample_tokens(1, 40))
    assert (result.kv == jobs.sample_kv(sample_tokens(1, 40))).all()
