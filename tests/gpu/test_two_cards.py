"""Owner and reader on two cards of one host. Skipped where there is one, with or without ``--require-gpu``."""

import os
from dataclasses import replace

import gpu_jobs as jobs
import numpy as np
import pytest

from kvmarket.config import MarketConfig
from kvmarket.core import MarketCore
from kvmarket.cuda import cuda_pages
from kvmarket.deadline import Deadline
from kvmarket.region.pages import PageLayout
from kvmarket.report import MissReason

PAGES = 24


@pytest.fixture(autouse=True)
def two_cards(gpu):
    """Not called `cards`: a parameter of that name would take its place, and nothing be skipped."""
    count = gpu.cupy.cuda.runtime.getDeviceCount()
    if count < 2:
        pytest.skip(f"this host has {count} card")


def tensor_on(torch, card, seed):
    generator = torch.Generator(device=f"cuda:{card}").manual_seed(seed)
    shape = (PAGES, jobs.SPEC.page_bytes)
    tensor = torch.randint(0, 256, shape, dtype=torch.uint8, device=f"cuda:{card}", generator=generator)
    torch.cuda.synchronize(card)
    return tensor


def publish(state, runtime_dir, card, hidden):
    if hidden:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(card)
    import torch

    jobs.open_core(state, runtime_dir)
    state.tensor = tensor_on(torch, 0 if hidden else card, 5)
    layout = PageLayout.packed(PAGES, jobs.SPEC.page_bytes)
    state.publisher = state.core.publisher(state.core.lend(cuda_pages(layout, [state.tensor])))
    jobs.offer(state, list(range(PAGES)))
    return state.tensor.cpu().numpy()


def fetch(state, runtime_dir, card, hidden):
    """Fetch all to a card; return the bytes, how many blocks, why not more, and the path."""
    if hidden:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(card)
    import torch

    card = 0 if hidden else card
    core = MarketCore(jobs.namespace(), MarketConfig(runtime_dir=runtime_dir, registry_bytes=16 << 20))
    out = torch.zeros((PAGES, jobs.SPEC.page_bytes), dtype=torch.uint8, device=f"cuda:{card}")
    torch.cuda.synchronize(card)
    local = cuda_pages(PageLayout.packed(PAGES, jobs.SPEC.page_bytes), [out])
    fetched = core.fetcher.fetch(iter([jobs.keys_of(PAGES)]), local, np.arange(PAGES), Deadline(20))
    outcome = fetched.outcome
    path = outcome.transfers[0].path if outcome.transfers else ""
    answer = out.cpu().numpy(), outcome.blocks, outcome.reason.value, outcome.detail, path
    core.close()
    return answer


@pytest.mark.parametrize("reader_hides", [False, True])
@pytest.mark.parametrize("owner_hides", [False, True])
@pytest.mark.parametrize("cards", [(0, 1), (1, 0)], ids=str)
def test_one_card_reads_the_other_whichever_each_process_sees(peers, runtime_dir, cards, owner_hides, reader_hides):
    """A process that hides cards sees its own alone, as card 0."""
    expected = peers.spawn().call(publish, str(runtime_dir), cards[0], owner_hides, timeout_s=60)
    reader = peers.spawn()
    found, blocks, reason, detail, path = reader.call(fetch, str(runtime_dir), cards[1], reader_hides, timeout_s=60)
    assert (blocks, reason, detail, path) == (PAGES, MissReason.NONE.value, "", "kernel(cuda_ipc)")
    assert (found == expected).all()


def test_peer_access_is_enabled_both_ways(gpu):
    assert gpu.peer_access(0, 1)
    assert {(0, 1), (1, 0)} <= gpu._peers


def test_memories_on_two_cards_are_not_one_region(torch):
    tensors = [tensor_on(torch, card, 1) for card in (0, 1)]
    layout = PageLayout.packed(PAGES, jobs.SPEC.page_bytes)
    segment = layout.segments[0]
    both = PageLayout(PAGES, (segment, replace(segment, memory=1)))
    with pytest.raises(ValueError, match="one region per card"):
        cuda_pages(both, tensors)
