"""An owner of lent regions for transport tests, in this process or in a peer, with one set of methods."""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.region.memory import SharedMemory
from kvmarket.region.pages import PagedMemory, PageLayout, Segment
from kvmarket.region.region import LentRegion
from kvmarket.registry.host import this_process
from kvmarket.transport.inproc import local_regions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import SimpleNamespace

    from kvmarket.identity import OwnerInfo
    from kvmarket.region.descriptor import RegionDescriptor
    from kvmarket.testing.peers import Peer

FINGERPRINT = bytes(range(16))


@dataclass(frozen=True)
class Lent:
    """What a reader is told of a region: by whom it is lent, and where it is."""

    owner: OwnerInfo
    descriptor: RegionDescriptor


def random_layout(rng: np.random.Generator, num_pages: int, page_bytes: int) -> tuple[PageLayout, list[int]]:
    """Cut pages into random segments in random memories; return the layout and the size of each memory.

    Segments of one memory either lie in planes one after the other, each with all pages (an engine's tensors), or side
    by side in every page (a packed page with gaps).
    """
    count = int(rng.integers(1, min(6, page_bytes) + 1))
    cuts = np.sort(rng.choice(np.arange(1, page_bytes), count - 1, replace=False)) if count > 1 else np.empty(0, int)
    lengths = np.diff(np.concatenate(([0], cuts, [page_bytes]))).tolist()
    memory_of = rng.integers(0, 3, count).tolist()
    segments: list[Segment | None] = [None] * count
    sizes: list[int] = []
    for number, memory in enumerate(dict.fromkeys(memory_of)):
        members = [i for i in range(count) if memory_of[i] == memory]
        rng.shuffle(members)
        end, side_by_side = int(rng.integers(0, 32)), bool(rng.integers(2))
        stride = sum(lengths[i] for i in members) + int(rng.integers(0, 8))
        for i in members:
            step = stride if side_by_side else lengths[i] + int(rng.integers(0, 8))
            segments[i] = Segment(number, end, step, lengths[i])
            end += lengths[i] if side_by_side else num_pages * step
        sizes.append(end + (num_pages * stride if side_by_side else 0) + int(rng.integers(0, 16)))
    return PageLayout(num_pages, tuple(segment for segment in segments if segment is not None)), sizes


def make_memory(layout: PageLayout, sizes: Sequence[int], fill: int = 0xAB) -> PagedMemory:
    """Return private memory for a layout, every byte set to `fill`."""
    return PagedMemory(layout, tuple(np.full(size, fill, np.uint8) for size in sizes))


def page_bytes_of(memory: PagedMemory, page: int) -> bytes:
    """Return the bytes of one page in page order."""
    return b"".join(view.tobytes() for view in memory.views(page))


def write_page(memory: PagedMemory, page: int, data: bytes) -> None:
    """Set the bytes of one page."""
    at = 0
    for view in memory.views(page):
        view[:] = np.frombuffer(data, np.uint8)[at : at + len(view)]
        at += len(view)


def pattern_page(page: int, page_bytes: int) -> bytes:
    """Return recognisable bytes for page number `page`."""
    return bytes([page % 256, 255 - page % 256]) * (page_bytes // 2)


def value_at(generation: int) -> int:
    """Return the byte that `RegionOwner.rewrite_all` fills pages with when it gives them `generation`."""
    return generation // 2 % 256


class RegionOwner:
    """Lends regions and plays every trick on their readers."""

    def __init__(self) -> None:
        self.incarnation = os.urandom(16)
        self._regions: list[LentRegion] = []
        self._memories: list[list[SharedMemory]] = []
        self._stop = threading.Event()
        self._flipper: threading.Thread | None = None

    def lend(self, layout: PageLayout, sizes: Sequence[int], pages: Sequence[bytes]) -> Lent:
        """Make a region in shared memory with the given bytes in its pages, none of them readable yet."""
        shared = [SharedMemory(size, "test") for size in sizes]
        memory = PagedMemory(layout, tuple(piece.array for piece in shared))
        for page, data in enumerate(pages):
            write_page(memory, page, data)
        region = LentRegion(len(self._regions), self.incarnation, memory, shared, FINGERPRINT)
        local_regions.add(self.incarnation, region)
        self._regions.append(region)
        self._memories.append(shared)
        return Lent(this_process(1, self.incarnation), region.describe())

    def lend_pattern(self, num_pages: int, page_bytes: int) -> Lent:
        """Lend packed pages that hold `pattern_page`, without their bytes having to travel here."""
        pages = [pattern_page(page, page_bytes) for page in range(num_pages)]
        return self.lend(PageLayout.packed(num_pages, page_bytes), [num_pages * page_bytes], pages)

    def generations(self, region: int) -> np.ndarray:
        """Return the generations of all pages as they are now."""
        return self._regions[region].generations.values.copy()

    def validate(self, region: int, pages: Sequence[int]) -> np.ndarray:
        """Make pages readable; return their generations."""
        lent = self._regions[region]
        return lent.generations.validate(lent.page_numbers(pages))

    def invalidate(self, region: int, pages: Sequence[int]) -> None:
        """Make pages unreadable."""
        self._regions[region].invalidate(pages)

    def write(self, region: int, page: int, data: bytes) -> None:
        """Change the bytes of a page, readable or not."""
        write_page(self._regions[region].pages, page, data)

    def rewrite_all(self, region: int) -> None:
        """Overwrite every page with one byte value as an owner should: unreadable first, readable again after.

        The value is `value_at` of the generation that the pages get.
        """
        lent = self._regions[region]
        pages = np.arange(lent.layout.num_pages)
        lent.generations.invalidate(pages)
        for memory in lent.pages.memories:
            memory[:] = value_at(int(lent.generations.values[0]) + 1)
        lent.generations.validate(pages)

    def start_rewriting(self, region: int, slower: float = 1.0) -> None:
        """Do `rewrite_all` again and again on a thread, after pauses of up to 4 ms, until `stop_rewriting`.

        `slower` makes the pauses longer, for transports that could not read a page in them.
        """
        pauses_s = itertools.cycle([slower * pause for pause in (0.004, 0.0005, 0.002, 0.001, 0.003)])

        def run() -> None:
            while not self._stop.wait(next(pauses_s)):
                self.rewrite_all(region)

        self._flipper = threading.Thread(target=run, daemon=True)
        self._flipper.start()

    def stop_rewriting(self) -> None:
        """End `start_rewriting`."""
        self._stop.set()
        if self._flipper is not None:
            self._flipper.join()

    def close(self) -> None:
        """Take every region back, as a process that ends in order does."""
        self.stop_rewriting()
        for region in self._regions:
            region.close()
        for memory in [memory for shared in self._memories for memory in shared]:
            memory.close()
        self._regions.clear()
        self._memories.clear()


def _in_peer(state: SimpleNamespace, method: str, *args: Any) -> Any:
    if not hasattr(state, "region_owner"):
        state.region_owner = RegionOwner()
    return getattr(state.region_owner, method)(*args)


class PeerRegionOwner:
    """A `RegionOwner` in another process: same methods."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def __getattr__(self, method: str) -> Any:
        return lambda *args: self.peer.call(_in_peer, method, *args)
