"""What the cards do: copies and digests of pages, each a launch or two on a stream of its own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvmarket.digest import WORD_BYTES
from kvmarket.errors import TransferError
from kvmarket.region.cuda import NO_DIGESTS, CudaPagedMemory
from kvmarket.region.pages import PageLayout, Segment
from kvmarket.transport.cuda_driver import CudaDriverError
from kvmarket.transport.cuda_kernels import (
    BLOCK_THREADS,
    FEW_PAGES,
    MANY_PAGES,
    MANY_SINCE,
    SOURCE,
    WARP,
    copy_table,
    digest_table,
)
from kvmarket.transport.cuda_lanes import SCHEME, Lane, LaneTransfer, current_device, event_handle

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmarket.region.cuda import CudaTransfer
    from kvmarket.transport.cuda_driver import CudaDriver

TABLES_MAX = 256
"""Copy tables kept on the cards."""
PACK_BYTES_MAX = 64 << 20
"""Scratch for digests of pages that are not made of aligned words."""


@dataclass(frozen=True, slots=True)
class _Table:
    """A table on a card, and the kernels that go by it with `threads` threads for each row and page.

    Attributes:
        summing: the kernel that digests the pages it copies; empty if there is none.
    """

    memory: Any
    address: int
    rows: int
    kernel: str
    summing: str
    threads: int


class CardWork:
    """Kernels, lanes and tables of all cards of this process. Thread-safe.

    Args:
        cupy: the module.
        driver: libcuda.
        devices: how many cards there are.

    Attributes:
        launches: kernels launched so far.
        uploads: page lists and tables copied to a card so far.
    """

    def __init__(self, cupy: Any, driver: CudaDriver, devices: int) -> None:
        self._driver, self.launches, self.uploads = driver, 0, 0
        self._cupy, self._runtime = cupy, cupy.cuda.runtime
        compiler, running = cupy.cuda.nvrtc.getVersion(), self._runtime.driverGetVersion()
        many = compiler >= MANY_SINCE and running >= 1000 * MANY_SINCE[0] + 10 * MANY_SINCE[1]
        self._pages_max = MANY_PAGES if many else FEW_PAGES
        self._module = cupy.RawModule(code=SOURCE, options=("--std=c++17", f"-DMANY={int(many)}"))
        self._kernels: dict[str, Any] = {}
        self._functions: dict[tuple[int, str], int] = {}
        self._lock = threading.Lock()
        self._idle: dict[int, list[Lane]] = {device: [] for device in range(devices)}
        self._tables: OrderedDict[tuple[Any, ...], tuple[PageLayout, PageLayout | None, _Table]] = OrderedDict()

    def copy(
        self,
        source: CudaPagedMemory,
        source_pages: np.ndarray,
        target: CudaPagedMemory,
        target_pages: np.ndarray,
        digest: np.ndarray | Literal[True] | None = None,
    ) -> CudaTransfer:
        """See `CudaApi.copy`."""
        source.layout.check_pages(source_pages)
        target.layout.check_pages(target_pages)
        device = target.device
        if digest is not None and digest is not True:
            wanted = np.count_nonzero(digest)
            digest = True if wanted == len(source_pages) else digest if wanted else None
        with current_device(self._runtime, device):
            lane = self._lane(device)
            try:
                table = self._copy_table(source, target, lane)
                if table.summing and 0 < len(source_pages) <= self._pages_max and (digest is None or digest is True):
                    summing = digest is True
                    finish = self._launch_pages(lane, table, source_pages, target, target_pages, summing=summing)
                else:
                    chosen = _digested(target_pages, digest)
                    finish = self._launch_copy(lane, table, _pairs(source_pages, target_pages), target, chosen)
            except (self._runtime.CUDARuntimeError, CudaDriverError) as error:
                raise TransferError(f"a copy cannot be launched: {error}", scheme=SCHEME) from error
        return LaneTransfer(lane, self._idle[device], (source, target), finish)

    def _launch_pages(
        self,
        lane: Lane,
        table: _Table,
        source_pages: np.ndarray,
        target: CudaPagedMemory,
        target_pages: np.ndarray,
        *,
        summing: bool,
    ) -> Callable[[], np.ndarray] | None:
        """Do what `_launch_copy` does, with one call of the driver, for pages of which all or none are digested."""
        count = len(source_pages)
        sums, digests = lane.summing(count) if summing else (0, 0)
        argument = lane.argument(count)
        argument.fill(source_pages, target_pages, (table.address, sums, digests, target.layout.page_bytes))
        kernel = "copy_few" if count <= FEW_PAGES else "copy_many"
        function = self._function(target.device, f"{kernel}_sum" if summing else kernel)
        if target.after is not None:
            self._runtime.streamWaitEvent(lane.stream.ptr, event_handle(target.after))
        self._driver.launch(function, table.rows * count, BLOCK_THREADS, lane.stream.ptr, argument.arguments)
        self.launches += 1
        lane.event.record(lane.stream)
        return lane.digests[:count].copy if summing else None

    def _function(self, device: int, name: str) -> int:
        """Return the driver's handle of a kernel on a card, which must be current."""
        found = self._functions.get((device, name))
        if found is None:
            found = self._functions[device, name] = int(self._kernel(name).kernel.ptr)
        return found

    def _launch_copy(
        self, lane: Lane, table: _Table, pairs: np.ndarray, target: CudaPagedMemory, chosen: np.ndarray
    ) -> Callable[[], np.ndarray] | None:
        """Launch a copy and what digests the `chosen` pages of its target, and record the lane's event.

        Returns:
            What makes the digests once the event has passed; None without `chosen`.
        """
        count, page_bytes = len(chosen), target.layout.page_bytes
        fused = bool(table.summing) and count == len(pairs)
        words = None if fused or not count else self._digest_table(target, lane)
        pages = lane.load(pairs if words is None else np.append(pairs, chosen.astype(np.uint64)))
        self.uploads += 1
        if target.after is not None:
            self._runtime.streamWaitEvent(lane.stream.ptr, event_handle(target.after))
        with lane.stream:
            if fused:
                self._launch_sums(table, table.summing, lane, pages, count, page_bytes=page_bytes)
            else:
                self._launch(table, table.kernel, pages, len(pairs))
            if words is not None:
                self._launch_sums(words, words.kernel, lane, pages + pairs.nbytes, count, page_bytes=page_bytes)
        lane.event.record(lane.stream)
        if fused or words is not None:
            return lane.digests[:count].copy
        return (lambda: self.digests(target, chosen)) if count else None  # its pages are not made of aligned words

    def launcher(
        self,
        source: CudaPagedMemory,
        source_pages: np.ndarray,
        target: CudaPagedMemory,
        target_pages: np.ndarray,
        *,
        digest: bool = False,
    ) -> Callable[[], None]:
        """Return what launches the kernel of `copy`, and nothing else, on cupy's current stream: to time it."""
        lane = Lane(self._cupy)
        table = self._copy_table(source, target, lane)
        pages = lane.load(_pairs(source_pages, target_pages))
        count, page_bytes = len(source_pages), target.layout.page_bytes
        if digest:
            lane.summing(count)
        lane.stream.synchronize()

        def launch() -> None:
            if digest:
                self._launch_sums(table, table.summing, lane, pages, count, page_bytes=page_bytes)
            else:
                self._launch(table, table.kernel, pages, count)

        return launch

    def _launch(self, table: _Table, kernel: str, pages: int, count: int, *more: np.generic) -> None:
        """Launch a kernel of a table on the current stream, for `count` pages whose numbers are at `pages`."""
        groups = table.rows * count
        grid = -(-groups * table.threads // BLOCK_THREADS)
        args = (np.uint64(table.address), np.uint32(count), np.uint64(pages), np.uint32(groups), *more)
        self._kernel(kernel)((grid,), (BLOCK_THREADS,), args)
        self.launches += 1

    def _launch_sums(self, table: _Table, kernel: str, lane: Lane, pages: int, count: int, *, page_bytes: int) -> None:
        """Launch a kernel that digests `count` pages of `page_bytes`, to where the lane has its digests."""
        sums, digests = lane.summing(count)
        self._launch(table, kernel, pages, count, np.uint64(sums), np.uint64(page_bytes), np.uint64(digests))

    def _kernel(self, name: str) -> Any:
        if name not in self._kernels:  # compiled here, where the card that needs it is current
            self._kernels[name] = self._module.get_function(name)
        return self._kernels[name]

    def _lane(self, device: int) -> Lane:
        try:
            return self._idle[device].pop()  # one operation of list: needs no lock
        except IndexError:
            return Lane(self._cupy)

    def _copy_table(self, source: CudaPagedMemory, target: CudaPagedMemory, lane: Lane) -> _Table:
        """Return the copy table of two memories, on the card of `target`."""

        def make() -> tuple[np.ndarray, str, str, int]:
            rows, wide = copy_table(source.layout, source.pointers, target.layout, target.pointers)
            return (rows, "copy_wide", "copy_wide_sum", BLOCK_THREADS) if wide else (rows, "copy_any", "", WARP)

        key = (target.device, source.pointers, target.pointers)
        table = self._table(key, source.layout, target.layout, lane, make)
        assert table is not None  # noqa: S101 - every two layouts of one page size can be copied
        return table

    def _digest_table(self, memory: CudaPagedMemory, lane: Lane) -> _Table | None:
        """Return the digest table of a memory, on its card, or None: see `digest_table`."""

        def make() -> tuple[np.ndarray, str, str, int] | None:
            rows = digest_table(memory.layout, memory.pointers)
            return None if rows is None else (rows, "sum_pages", "", WARP)

        return self._table((memory.device, memory.pointers), memory.layout, None, lane, make)

    def _table(
        self,
        key: tuple[Any, ...],
        first: PageLayout,
        second: PageLayout | None,
        lane: Lane,
        make: Callable[[], tuple[np.ndarray, str, str, int] | None],
    ) -> _Table | None:
        with self._lock:
            found = self._tables.get(key)
            if found is not None and found[0] == first and found[1] == second:
                self._tables.move_to_end(key)
                return found[2]
        made = make()
        if made is None:
            return None
        rows, kernel, summing, threads = made
        memory = self._cupy.cuda.Memory(rows.nbytes)
        staged, kind = lane.load(rows), self._runtime.memcpyDefault
        self.uploads += 1
        self._runtime.memcpyAsync(memory.ptr, staged, rows.nbytes, kind, lane.stream.ptr)
        lane.stream.synchronize()  # it is used from other lanes, too
        table = _Table(memory, memory.ptr, len(rows), kernel, summing, threads)
        with self._lock:
            self._tables[key] = (first, second, table)
            while len(self._tables) > TABLES_MAX:
                self._tables.popitem(last=False)
        return table

    def digests(self, memory: CudaPagedMemory, pages: np.ndarray) -> np.ndarray:
        """See `CudaApi.digests`."""
        memory.layout.check_pages(pages)
        if not len(pages):
            return NO_DIGESTS
        with current_device(self._runtime, memory.device):
            found = self._sums(memory, pages, memory.layout.page_bytes)
            return self._packed_digests(memory, pages) if found is None else found

    def _sums(self, memory: CudaPagedMemory, pages: np.ndarray, page_bytes: int) -> np.ndarray | None:
        """Digest pages in place, or return None when they are not made of aligned words."""
        device = memory.device
        lane = self._lane(device)
        try:
            table = self._digest_table(memory, lane)
            if table is None:
                self._idle[device].append(lane)
                return None
            numbers = lane.load(pages.astype(np.uint64))
            with lane.stream:
                self._launch_sums(table, table.kernel, lane, numbers, len(pages), page_bytes=page_bytes)
            lane.event.record(lane.stream)
            lane.wait()
        except self._runtime.CUDARuntimeError as error:
            raise TransferError(f"digests cannot be computed: {error}", scheme=SCHEME) from error
        digests = lane.digests[: len(pages)].copy()
        self._idle[device].append(lane)
        return digests

    def _packed_digests(self, memory: CudaPagedMemory, pages: np.ndarray) -> np.ndarray:
        page_bytes, device = memory.layout.page_bytes, memory.device
        padded = -(-page_bytes // WORD_BYTES) * WORD_BYTES
        count = max(1, min(len(pages), PACK_BYTES_MAX // padded))
        with current_device(self._runtime, device):
            place = memory.api.allocate(count * padded, device)
            self._runtime.memset(memory.api.pointer(place), 0, count * padded)
            self._runtime.deviceSynchronize()
            scratch = CudaPagedMemory(PageLayout(count, (Segment(0, 0, padded, page_bytes),)), (place,), memory.api)
            words = CudaPagedMemory(PageLayout.packed(count, padded), (place,), memory.api)
            found = [NO_DIGESTS]
            for start in range(0, len(pages), count):
                chosen = pages[start : start + count]
                slots = np.arange(len(chosen))
                self.copy(memory, chosen, scratch, slots).wait()
                digests = self._sums(words, slots, page_bytes)
                assert digests is not None  # noqa: S101 - packed words are aligned
                found.append(digests)
        return np.concatenate(found)


def _pairs(source_pages: np.ndarray, target_pages: np.ndarray) -> np.ndarray:
    pairs = np.empty((len(source_pages), 2), np.uint64)
    pairs[:, 0], pairs[:, 1] = source_pages, target_pages
    return pairs


def _digested(pages: np.ndarray, digest: np.ndarray | Literal[True] | None) -> np.ndarray:
    """Return those of `pages` that `CudaApi.copy` is to digest."""
    return pages if digest is True else pages[:0] if digest is None else pages[digest]
