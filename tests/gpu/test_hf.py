"""Caches of a transformers model on the card, from one process to another."""

import hf_jobs as jobs

from kvmarket import MissReason
from kvmarket.testing.tiny_models import TINY_MODEL, write_model

PROMPT = jobs.prompt(203)


def test_a_cache_on_the_card_is_shared_without_the_host(peers, tmp_path, runtime_dir, torch, transformers):
    from kvmarket_hf import CacheMarket

    model = jobs.load(write_model(tmp_path, TINY_MODEL), "cuda")
    alone, cache = jobs.generate(model, PROMPT)
    peer = peers.spawn()
    sequence, published = peer.call(jobs.serve, tmp_path, runtime_dir, PROMPT, "cuda", timeout_s=110)
    assert sequence == alone
    assert published == (len(sequence) - 1) // jobs.BLOCK * jobs.BLOCK
    with CacheMarket(model, block_size=jobs.BLOCK, config=jobs.settings(runtime_dir)) as market:
        fetched = market.fetch(PROMPT)
        assert (fetched.tokens, fetched.reason, fetched.detail) == (192, MissReason.NONE, "")
        assert fetched.transfers[0].path == "kernel(cuda_ipc)"
        for got, own in zip(fetched.cache.layers, cache.layers, strict=True):
            assert got.keys.is_cuda
            assert torch.equal(got.keys, own.keys[:, :, : fetched.tokens])
            assert torch.equal(got.values, own.values[:, :, : fetched.tokens])
        assert jobs.generate(model, PROMPT, fetched.cache)[0] == alone
        peer.kill()
        assert market.fetch(PROMPT).tokens == 0
