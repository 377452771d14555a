"""Owner and reader on two cards of one host, with host memory in their place."""

import numpy as np
import pytest

from kvmarket.config import MarketConfig
from kvmarket.core import MarketCore
from kvmarket.deadline import Deadline
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import PageLayout
from kvmarket.registry import block_keys
from kvmarket.report import MissReason
from kvmarket.spec import KVCacheSpec
from kvmarket.testing.host_cuda import HostCuda

PAGES = 6
SPEC = KVCacheSpec(2, 2, 8, "float16", 4)
SPACE = Namespace(ModelIdentity("m"), SPEC, "sha256")
KEYS = block_keys([bytes([i]) * 32 for i in range(PAGES)])


def pages_on(api, card, fill):
    array = api.allocate(PAGES * SPEC.page_bytes, card)
    array[:] = fill
    return CudaPagedMemory.of(api, PageLayout.packed(PAGES, SPEC.page_bytes), [array])


def publish(state, runtime_dir, visible, card):
    import kvmarket.reach

    state.api = HostCuda(visible)
    kvmarket.reach.load_cuda = lambda: state.api
    state.core = MarketCore(SPACE, MarketConfig(runtime_dir=runtime_dir, registry_bytes=16 << 20))
    publisher = state.core.publisher(state.core.lend(pages_on(state.api, card, 7)))
    publisher.offer(KEYS, list(range(PAGES)))
    publisher.flush(Deadline(10))


@pytest.fixture
def fetch(runtime_dir, monkeypatch):
    apis, cores = [], []

    def run(visible, card, *, peers=True):
        apis.append(api := HostCuda(visible, peers=peers))
        monkeypatch.setattr("kvmarket.reach.load_cuda", lambda: api)
        cores.append(core := MarketCore(SPACE, MarketConfig(runtime_dir=str(runtime_dir), registry_bytes=16 << 20)))
        local = pages_on(api, card, 0)
        outcome = core.fetcher.fetch(iter([KEYS]), local, np.arange(PAGES), Deadline(10)).outcome
        return api, local, outcome

    yield run
    for core in cores:
        core.close()
    for api in apis:
        api.close()


@pytest.mark.parametrize(
    ("owner", "reader"),
    [(((0, 1), 1), ((0, 1), 0)), (((0, 1), 0), ((0, 1), 1)), (((1,), 0), ((0, 1), 0)), (((0, 1), 1), ((1, 0), 1))],
)
def test_the_readers_card_reads_the_owners(peers, runtime_dir, fetch, owner, reader):
    """Each side numbers the cards that it sees in its own way; their UUIDs say which is which."""
    peers.spawn().call(publish, str(runtime_dir), *owner)
    api, local, outcome = fetch(*reader)
    assert (outcome.blocks, outcome.reason, outcome.transfers[0].path) == (PAGES, MissReason.NONE, "kernel(cuda_ipc)")
    assert (local.memories[0] == 7).all()
    assert api.enabled == {(0, 1), (1, 0)}, "in both directions"


def test_cards_without_peer_access_are_a_miss_that_names_them(peers, runtime_dir, fetch):
    peers.spawn().call(publish, str(runtime_dir), (0, 1), 1)
    _, _, outcome = fetch((0, 1), 0, peers=False)
    assert (outcome.blocks, outcome.reason) == (0, MissReason.UNREACHABLE)
    assert "cards 0 and 1 have no peer access" in outcome.detail


def test_a_card_that_is_hidden_is_read_all_the_same(peers, runtime_dir, fetch):
    peers.spawn().call(publish, str(runtime_dir), (1,), 0)
    _, local, outcome = fetch((0,), 0)
    assert (outcome.blocks, outcome.reason, outcome.transfers[0].path) == (PAGES, MissReason.NONE, "kernel(cuda_ipc)")
    assert (local.memories[0] == 7).all()


def test_a_hidden_card_that_cannot_be_mapped_is_a_miss_that_says_how_to_show_it(peers, runtime_dir, fetch):
    peers.spawn().call(publish, str(runtime_dir), (0, 1), 1)
    _, _, outcome = fetch((0,), 0, peers=False)
    assert (outcome.blocks, outcome.reason) == (0, MissReason.UNREACHABLE)
    assert "CUDA_VISIBLE_DEVICES" in outcome.detail
