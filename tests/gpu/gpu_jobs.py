"""What peers do in GPU tests. Every function's first argument is the peer's state."""

import ctypes
import hashlib
import time

import numpy as np

from kvmarket.config import MarketConfig
from kvmarket.core import MarketCore
from kvmarket.cuda import cuda_pages
from kvmarket.deadline import Deadline
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.region.pages import PageLayout, Segment
from kvmarket.registry import block_keys
from kvmarket.spec import KVCacheSpec

LAYERS, HEADS, WIDTH, TOKENS = 4, 2, 64, 16
SPEC = KVCacheSpec(LAYERS, HEADS, WIDTH, "float16", TOKENS, layout="LKNHC")
HALF = TOKENS * HEADS * WIDTH * 2


def namespace(spec=SPEC):
    return Namespace(ModelIdentity("gpu-test"), spec, "sha256")


def engine_layout(num_pages, layers=LAYERS, half=HALF):
    """One tensor per layer, (2, pages, tokens, heads, width): K first, V behind it."""
    segments = [Segment(layer, kv * num_pages * half, half, half) for layer in range(layers) for kv in range(2)]
    return PageLayout(num_pages, tuple(segments))


def engine_tensors(torch, num_pages, seed):
    generator = torch.Generator(device="cuda").manual_seed(seed)
    shape = (2, num_pages, TOKENS, HEADS, WIDTH)
    return [torch.randn(shape, dtype=torch.float16, device="cuda", generator=generator) for _ in range(LAYERS)]


def open_core(state, runtime_dir, **settings):
    config = MarketConfig(runtime_dir=runtime_dir, registry_bytes=16 << 20, **settings)
    state.core = MarketCore(namespace(), config)


def lend(state, num_pages, seed):
    import torch

    state.tensors = engine_tensors(torch, num_pages, seed)
    torch.cuda.synchronize()
    state.region = state.core.lend(cuda_pages(engine_layout(num_pages), state.tensors))
    state.publisher = state.core.publisher(state.region)


def keys_of(count, salt=b""):
    return block_keys([hashlib.sha256(salt + bytes([i])).digest() for i in range(count)])


def offer(state, pages, salt=b""):
    state.publisher.offer(keys_of(len(pages), salt), pages)
    state.publisher.flush(Deadline(10))


def scribble(state, page):
    """Break the owner's promise: change bytes without making the page unreadable."""
    import torch

    state.tensors[0][0, page] += 1
    torch.cuda.synchronize()


def publish_behind_a_long_kernel(state, pages, cycles):
    import torch

    stream, index = torch.cuda.Stream(), torch.tensor(pages, device="cuda")
    for tensor in state.tensors:
        tensor.index_fill_(1, index, 5.0)  # once without a kernel in the way, so that nothing is loaded behind it
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)
        for tensor in state.tensors:
            tensor.index_fill_(1, index, 7.0)
    state.stream = stream
    state.publisher.offer(keys_of(len(pages), b"late"), pages, after=stream)
    return stream.query()


def stream_ended(state):
    return state.stream.query()


def generations(state):
    return state.region.generations.values.copy()


def retract(state, pages):
    state.publisher.retract(pages)


def flush(state):
    state.publisher.flush(Deadline(30))


# ---- overwriting without end

STRESS_PAGES, STRESS_WORDS = 64, 32 << 10


def stress_spec():
    return KVCacheSpec(1, 1, STRESS_WORDS * 4 // TOKENS // 2, "int8", TOKENS)


def overwrite(state, runtime_dir, seconds):
    """Rewrite random pages for `seconds`: each with one 32-bit value, in two launches; return how many times."""
    import torch

    spec = stress_spec()
    core = MarketCore(namespace(spec), MarketConfig(runtime_dir=runtime_dir, registry_bytes=16 << 20, verify="none"))
    pool = torch.zeros((STRESS_PAGES, STRESS_WORDS), dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    publisher = core.publisher(core.lend(cuda_pages(PageLayout.packed(STRESS_PAGES, spec.page_bytes), [pool])))
    keys, rng, version, end = keys_of(STRESS_PAGES), np.random.default_rng(1), 0, time.monotonic() + seconds
    stream, half = torch.cuda.Stream(), STRESS_WORDS // 2
    everything = list(range(STRESS_PAGES))
    with torch.cuda.stream(stream):
        chosen = everything
        while time.monotonic() < end:
            version += 1
            publisher.retract(chosen)
            index = torch.tensor(chosen, device="cuda")
            values = (index * 65536 + version % 65536).to(torch.int32)[:, None]
            pool[index, :half] = values
            torch.cuda._sleep(400_000)
            pool[index, half:] = values
            publisher.offer([keys[page] for page in chosen], chosen, after=stream)
            chosen = rng.permutation(STRESS_PAGES)[: int(rng.integers(1, 9))].tolist()
            time.sleep(float(rng.choice([0.0, 0.0003, 0.001])))
    publisher.flush(Deadline(30))
    core.close()
    return version


def ask_what_is_fresh(state, runtime_dir, count):
    """Do what a scheduler's process does; return how many blocks are fresh and which cards have a context here."""
    open_core(state, runtime_dir)
    found, _, _ = state.core.fetcher.lookup(keys_of(count))
    return state.core.fetcher.fresh(found).blocks, contexts(state)


def contexts(state):
    """Return, for each card, whether this process has a context on it."""
    del state
    library, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    assert library.cuInit(0) == 0
    assert library.cuDeviceGetCount(ctypes.byref(count)) == 0
    found = []
    for card in range(count.value):
        flags, active = ctypes.c_uint(), ctypes.c_int()
        assert library.cuDevicePrimaryCtxGetState(card, ctypes.byref(flags), ctypes.byref(active)) == 0
        found.append(bool(active.value))
    return found


def fetch_here(state, num_pages, seed):
    """Fetch what `ask_what_is_fresh` found; return the path and whether the bytes are right."""
    import torch

    expected = engine_tensors(torch, num_pages, seed)
    tensors = [torch.zeros_like(tensor) for tensor in expected]
    torch.cuda.synchronize()
    local = cuda_pages(engine_layout(num_pages), tensors)
    outcome = state.core.fetcher.fetch(iter([keys_of(num_pages)]), local, np.arange(num_pages), Deadline(20)).outcome
    right = all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    return outcome.transfers[0].path, outcome.blocks, right
