"""Owners of lent CUDA memory for transport tests: on a real card or on the host's stand-in, here or in a peer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.region import LentRegion
from kvmarket.registry.host import this_process
from kvmarket.testing.host_cuda import HostCuda
from kvmarket.testing.region_owner import FINGERPRINT, Lent, RegionOwner, value_at
from kvmarket.transport.cuda_ipc import CudaExports
from kvmarket.transport.cuda_runtime import load_cuda
from kvmarket.transport.inproc import local_regions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import SimpleNamespace

    from kvmarket.region.cuda import CudaApi
    from kvmarket.region.pages import PagedMemory, PageLayout
    from kvmarket.testing.peers import Peer


class Card:
    """What tests do to memory of a card.

    Args:
        real: use cupy and the first card; else `HostCuda`.
    """

    def __init__(self, *, real: bool) -> None:
        self.real = real
        self.api: CudaApi = load_cuda() if real else HostCuda()

    def memory(self, layout: PageLayout, sizes: Sequence[int], fill: int = 0xAB) -> CudaPagedMemory:
        """Return memory for a layout, every byte set to `fill`."""
        arrays = [self.api.allocate(size, 0) for size in sizes]
        for array in arrays:
            array[:] = fill
        self.settle()
        return CudaPagedMemory.of(self.api, layout, arrays)

    def settle(self) -> None:
        """Wait for everything that was launched."""
        if self.real:
            load_cuda().cupy.cuda.runtime.deviceSynchronize()

    def write_page(self, memory: PagedMemory, page: int, data: bytes) -> None:
        """Set the bytes of one page, and wait until they are there."""
        source: Any = np.frombuffer(data, np.uint8)
        if self.real:
            source = load_cuda().cupy.asarray(source)
        at = 0
        for view in memory.views(page):
            view[:] = source[at : at + len(view)]
            at += len(view)
        self.settle()

    def close(self) -> None:
        """Give all memory back."""
        if isinstance(self.api, HostCuda):
            self.api.close()


class CudaRegionOwner(RegionOwner):
    """A `RegionOwner` whose regions are in CUDA memory."""

    def __init__(self, *, real: bool) -> None:
        super().__init__()
        self.card = Card(real=real)

    def lend(self, layout: PageLayout, sizes: Sequence[int], pages: Sequence[bytes]) -> Lent:
        memory = self.card.memory(layout, sizes)
        for page, data in enumerate(pages):
            self.card.write_page(memory, page, data)
        number, exports = len(self._regions), CudaExports(memory)
        region = LentRegion(number, self.incarnation, memory, (), FINGERPRINT, exports=exports, digest="sum128")
        local_regions.add(self.incarnation, region)
        self._regions.append(region)
        return Lent(this_process(1, self.incarnation), region.describe())

    def write(self, region: int, page: int, data: bytes) -> None:
        self.card.write_page(self._regions[region].pages, page, data)

    def rewrite_all(self, region: int) -> None:
        lent = self._regions[region]
        pages = np.arange(lent.layout.num_pages)
        lent.generations.invalidate(pages)
        for memory in lent.pages.memories:
            memory[:] = value_at(int(lent.generations.values[0]) + 1)
        self.card.settle()
        lent.generations.validate(pages)

    def close(self) -> None:
        super().close()
        self.card.close()


def _in_peer(state: SimpleNamespace, method: str, real: bool, *args: Any) -> Any:  # noqa: FBT001 - travels as data
    if not hasattr(state, "cuda_owner"):
        state.cuda_owner = CudaRegionOwner(real=real)
    return getattr(state.cuda_owner, method)(*args)


class PeerCudaOwner:
    """A `CudaRegionOwner` in another process: same methods."""

    def __init__(self, peer: Peer, *, real: bool) -> None:
        self.peer, self._real = peer, real

    def __getattr__(self, method: str) -> Any:
        return lambda *args: self.peer.call(_in_peer, method, self._real, *args, timeout_s=60.0)
