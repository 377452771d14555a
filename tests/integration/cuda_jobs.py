"""Pages on cards, for which memory of the host stands in, and what other processes do with them."""

import numpy as np

from kvmarket.config import MarketConfig
from kvmarket.core import MarketCore
from kvmarket.deadline import Deadline
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import PageLayout, Segment
from kvmarket.registry import block_keys
from kvmarket.spec import KVCacheSpec
from kvmarket.testing.host_cuda import HostCuda

PAGES = 40
SPEC = KVCacheSpec(2, 2, 8, "float16", 4, layout="LKNHC")
HALF = SPEC.page_bytes // 4
SPACE = Namespace(ModelIdentity("m"), SPEC, "sha256")
KEYS = block_keys([bytes([i]) * 32 for i in range(PAGES)])
LAYOUT = PageLayout(
    PAGES, tuple(Segment(layer, kv * PAGES * HALF, HALF, HALF) for layer in range(2) for kv in range(2))
)


def pages_on(api, seed):
    rng = np.random.default_rng(seed)
    arrays = [api.allocate(2 * PAGES * HALF, 0) for _ in range(2)]
    for array in arrays:
        array[:] = rng.integers(0, 256, len(array), np.uint8)
    return CudaPagedMemory.of(api, LAYOUT, arrays)


def publish(state, runtime_dir):
    import kvmarket.reach

    state.api = HostCuda()
    kvmarket.reach.load_cuda = lambda: state.api
    state.core = MarketCore(SPACE, MarketConfig(runtime_dir=runtime_dir, registry_bytes=16 << 20))
    state.pages = pages_on(state.api, 1)
    state.publisher = state.core.publisher(state.core.lend(state.pages))
    state.publisher.offer(KEYS, list(range(PAGES))[::-1])
    state.publisher.flush(Deadline(10))


def scribble(state, page):
    state.pages.views(page)[2][3] ^= 1


def fetch(core, local):
    found, _, _ = core.fetcher.lookup(KEYS)
    return core.fetcher.read(found, local, np.arange(found.blocks), Deadline(10))


def same_bytes(local, expected, count):
    return all(
        (a == b).all()
        for page in range(count)
        for a, b in zip(local.views(page), expected.views(PAGES - 1 - page), strict=True)
    )
