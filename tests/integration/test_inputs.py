"""What callers may get wrong: refused by name, and nothing is published or written."""

from dataclasses import replace

import numpy as np
import pytest

from kvmarket import InvalidInputError, MarketClosedError, Marketplace, MissReason
from kvmarket.region.memory import SharedMemory
from kvmarket.region.pages import PagedMemory
from kvmarket.testing.samples import SPEC, sample_kv, sample_tokens

TOKENS = sample_tokens(1, 3)
KV = sample_kv(TOKENS)
BAD_TOKENS = {
    "empty": ([], "empty"),
    "text": ("a prompt", "tokenise"),
    "bytes": (b"a prompt", "tokenise"),
    "two dimensions": (np.array(TOKENS).reshape(3, 16), "one dimension"),
    "a number": (7, "one dimension"),
    "nothing": (None, "one dimension"),
    "negative": ([1, 2, -3] * 16, "within"),
    "too large": ([2**32] * 16, "within"),
    "fractions": (np.array(TOKENS, np.float32), "integers"),
    "words": (["one", "two"], "integers"),
}
READ_ONLY = KV.copy()
READ_ONLY.flags.writeable = False
BAD_KV = {
    "a block too few": (KV[:2], "2 blocks for 3"),
    "a block too many": (np.concatenate([KV, KV[:1]]), "4 blocks for 3"),
    "another page size": (KV[:, :-1].copy(), "bytes per block"),
    "another type": (np.zeros((3, SPEC.page_bytes // 4), np.float32), "dtype float32"),
    "one dimension": (KV.reshape(-1), "bytes per block"),
    "not contiguous": (np.repeat(KV, 2, axis=0)[::2], "contiguous"),
    "a list": (KV.tolist(), "list"),
    "nothing": (None, "NoneType"),
}
BAD_OUT = {
    "read-only": (READ_ONLY, "read-only"),
    "a block too few": (KV[:2].copy(), "2 blocks for 3"),
    "not contiguous": (np.repeat(KV, 2, axis=0)[::2], "contiguous"),
    "another type": (np.zeros((3, SPEC.page_bytes // 4), np.float32), "dtype float32"),
    "a list": ([], "list"),
}


@pytest.fixture
async def market(config):
    async with Marketplace("model", SPEC, config=config) as market:
        yield market


@pytest.mark.parametrize("case", BAD_TOKENS)
async def test_bad_tokens(market, case):
    tokens, message = BAD_TOKENS[case]
    for call in (market.fetch(tokens), market.match(tokens), market.publish(tokens, KV), market.withdraw(tokens)):
        with pytest.raises(InvalidInputError, match=message):
            await call
    assert market.core.registry.namespaces() == []


@pytest.mark.parametrize("case", BAD_KV)
async def test_bad_kv(market, case):
    kv, message = BAD_KV[case]
    with pytest.raises(InvalidInputError, match=message):
        await market.publish(TOKENS, kv)
    assert not (await market.fetch(TOKENS)).report.hit


@pytest.mark.parametrize("case", BAD_OUT)
async def test_bad_out(market, case):
    await market.publish(TOKENS, KV)
    out, message = BAD_OUT[case]
    with pytest.raises(InvalidInputError, match=message):
        await market.fetch(TOKENS, out=out)
    assert (await market.fetch(TOKENS)).report.blocks_adopted == 3


@pytest.mark.parametrize("deadline_s", [-1, float("nan"), float("inf"), "soon"])
async def test_bad_deadlines(market, deadline_s):
    with pytest.raises(InvalidInputError, match="deadline"):
        await market.fetch(TOKENS, deadline_s=deadline_s)
    with pytest.raises(InvalidInputError, match="deadline"):
        await market.publish(TOKENS, KV, deadline_s=deadline_s)


@pytest.mark.parametrize("extra_keys", [[], [b"a"] * 2, [b"a"] * 4, ["a"] * 3])
async def test_bad_extra_keys(market, extra_keys):
    with pytest.raises(InvalidInputError, match="extra_keys"):
        await market.fetch(TOKENS, extra_keys=extra_keys)


async def test_a_prompt_shorter_than_a_block_is_a_miss_that_says_so(market):
    report = (await market.fetch(TOKENS[:15])).report
    assert (report.reason, report.blocks_adopted) == (MissReason.SHORT_PROMPT, 0)
    assert "16 tokens" in report.detail
    assert (await market.match(TOKENS[:15])).reason is MissReason.SHORT_PROMPT
    published = await market.publish(TOKENS[:15], KV[:0])
    assert (published.tokens, published.blocks, published.blocks_new) == (0, 0, 0)
    assert await market.withdraw(TOKENS[:15]) == 0


async def test_a_partial_last_block_is_not_published(market):
    report = await market.publish([*TOKENS, 1, 2, 3], KV)
    assert (report.tokens, report.blocks) == (48, 3)


async def test_a_closed_marketplace_says_so(config):
    market = Marketplace("model", SPEC, config=config)
    await market.publish(TOKENS, KV)
    await market.aclose()
    await market.aclose()
    calls = [market.fetch(TOKENS), market.match(TOKENS), market.publish(TOKENS, KV), market.withdraw(TOKENS)]
    for call in (*calls, market.bump_epoch()):
        with pytest.raises(MarketClosedError):
            await call
    with pytest.raises(MarketClosedError):
        market.core.lend(PagedMemory.packed(KV))


async def test_only_memory_that_fits_is_lent(market):
    memory, pages = market.allocate(3)
    other = SharedMemory(3 * SPEC.page_bytes)
    bigger = SharedMemory(4 * SPEC.page_bytes)
    packed = PagedMemory.packed(pages)
    cases = [
        (PagedMemory.packed(np.zeros((3, 100), np.uint8)), (), "100 bytes do not fit"),
        (packed, [memory, other], "2 shared memories for 1"),
        (packed, [other], "memory 0 of the pages is not shared memory 0"),
        (PagedMemory.packed(bigger.array.reshape(4, -1)[:3]), [bigger], "memory 0"),
    ]
    for lent, shared, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            market.core.lend(lent, shared)
    region = market.core.lend(packed, [memory])
    publisher = market.core.publisher(region)
    for pages_asked in ([3], [-1]):
        with pytest.raises(InvalidInputError, match="outside"):
            publisher.offer([b"k" * 44], pages_asked)
    with pytest.raises(ValueError, match=r"shorter|longer|argument"):
        publisher.offer([b"k" * 44], [0, 1])
    for closing in (memory, other, bigger):
        closing.close()


async def test_an_arena_that_is_too_small_says_which_setting(config):
    async with Marketplace("model", SPEC, config=replace(config, arena_bytes=4096 * 2)) as market:
        with pytest.raises(InvalidInputError, match="KVMARKET_ARENA_BYTES"):
            await market.publish(TOKENS, KV)
        assert (await market.publish(TOKENS[:32], KV[:2])).blocks == 2
