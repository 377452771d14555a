"""Has a CPU engine's KV cache pass for CUDA memory, so that the connector's way on a card runs on every machine.

`install` runs in a replica before its engine starts. The host's stand-in for a card then lends the cache, and events
take their time, or wait for `release`.
"""

import time
from dataclasses import replace

import kvmarket.reach
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.testing.host_cuda import HostCuda

KERNEL_S = 0.003
_held = False
_seen = {"published_behind": 0, "loaded_behind": 0}


class Event:
    """Passes a moment after it was recorded, and not while events are held."""

    def __init__(self):
        self._end = time.monotonic() + KERNEL_S

    def query(self):
        return not _held and time.monotonic() > self._end


def install():
    from kvmarket_vllm import worker

    api = HostCuda()
    kvmarket.reach.load_cuda = lambda: api
    paged_memory = worker.paged_memory

    def on_card(tensors, num_blocks, memories):
        pages, shared, order = paged_memory(tensors, num_blocks, memories)
        for memory in shared:
            api.adopt(memory)
        return CudaPagedMemory.of(api, pages.layout, [memory.array for memory in shared]), shared, order

    def launched_work():
        _seen["published_behind"] += 1
        return Event()

    def behind_launched_work(pages):
        _seen["loaded_behind"] += 1
        return replace(pages, after=Event())

    worker.paged_memory = on_card
    worker.launched_work, worker.behind_launched_work = launched_work, behind_launched_work


def hold(engine):
    """Let no kernel end from now on."""
    global _held  # noqa: PLW0603
    _held = True


def release(engine):
    """Let kernels end."""
    global _held  # noqa: PLW0603
    _held = False


def seen(engine):
    """Return how often the connector asked for what was launched."""
    return _seen
