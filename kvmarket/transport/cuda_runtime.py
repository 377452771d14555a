"""`CudaApi` on cupy: streams of our own, the two kernels, exports and mappings of allocations."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.digest import WORD_BYTES, sum128_final
from kvmarket.errors import (
    InvalidInputError,
    MissingExtraError,
    PeerGoneError,
    RegistrationError,
    TransferError,
    TransportUnavailableError,
)
from kvmarket.region.cuda import CudaAddress, CudaApi, CudaPagedMemory, CudaTransfer
from kvmarket.region.pages import PageLayout, Segment
from kvmarket.transport.cuda_driver import CudaDriver, CudaDriverError
from kvmarket.transport.cuda_kernels import BLOCK_THREADS, SOURCE, WARP, copy_table, digest_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TABLES_MAX = 256
"""Copy tables kept on the cards."""
PACK_BYTES_MAX = 64 << 20
"""Scratch for digests of pages that are not made of aligned words."""
SPIN_S = 0.002
"""A wait polls this long without sleeping."""
POLL_S = 0.0002
STUCK_S = 30.0
"""A copy that takes longer is taken for a card that hangs."""
_SCHEME = "cuda_ipc"
_PEER_ACCESS_ALREADY_ENABLED = 704


@cache
def load_cuda() -> CupyCuda:
    """Return this process's CUDA; one object, because lanes and tables belong to the cards.

    Raises:
        MissingExtraError: cupy is not installed.
        TransportUnavailableError: there is no driver or no card.
    """
    return CupyCuda()


class _Lane:
    """A stream with what one launch needs: an event, and page lists in pinned and in device memory."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.event = cupy.cuda.Event(block=False, disable_timing=True)
        self.host: np.ndarray = np.empty(0, np.uint8)
        self.device: Any = None

    def load(self, *parts: np.ndarray) -> int:
        """Upload arrays, one behind the other, without waiting; return the address of the first."""
        nbytes = sum(part.nbytes for part in parts)
        if nbytes > len(self.host):
            size = max(16 << 10, 1 << (nbytes - 1).bit_length())
            self.host = np.frombuffer(self._cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
            self.device = self._cupy.cuda.Memory(size)
        at = 0
        for part in parts:
            self.host[at : at + part.nbytes] = part.reshape(-1).view(np.uint8)
            at += part.nbytes
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(
            self.device.ptr, self.host.ctypes.data, nbytes, runtime.memcpyHostToDevice, self.stream.ptr
        )
        return int(self.device.ptr)

    def wait(self) -> None:
        """Return when everything on the stream up to the event is done; errors as `CudaTransfer.wait`."""
        began = time.monotonic()
        try:
            while not self.event.done:
                spent = time.monotonic() - began
                if spent > STUCK_S:
                    raise TransferError(f"the card did not finish within {STUCK_S:.0f} s", scheme=_SCHEME)
                if spent < SPIN_S:
                    os.sched_yield()  # a sleep of 0 would take some 50 us
                else:
                    time.sleep(POLL_S)
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            raise TransferError(f"the card failed: {error}", scheme=_SCHEME) from error


class _Transfer(CudaTransfer):
    """A launched copy. It keeps its memory alive, and its lane out of use, until it was waited for."""

    def __init__(
        self,
        lane: _Lane,
        idle: list[_Lane],
        memories: tuple[CudaPagedMemory, ...],
        finish: Callable[[_Lane], list[bytes]] | None,
    ) -> None:
        self._lane: _Lane | None = lane
        self._idle, self._memories, self._finish = idle, memories, finish
        self.digests = []

    def wait(self) -> None:
        if self._lane is not None:
            self._lane.wait()
            if self._finish is not None:
                self.digests = self._finish(self._lane)
            self._idle.append(self._lane)
            self._lane, self._memories, self._finish = None, (), None


@dataclass(frozen=True, slots=True)
class _Table:
    """A table on a card, and the kernel that goes by it with `threads` threads for each row and page."""

    memory: Any
    address: int
    rows: int
    kernel: str
    threads: int


class _Mapping:
    """Stands for an opened handle; when the last array over it is gone, so is the mapping."""


class CupyCuda(CudaApi):
    """The real thing.

    Attributes:
        cupy: the module.
    """

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise MissingExtraError("cupy", "cuda13") from error
        self.cupy, self._runtime = cupy, cupy.cuda.runtime
        self._driver = CudaDriver()
        try:
            count = self._runtime.getDeviceCount()
            # not from cupy's device properties: there a UUID ends at its first zero byte
            self._uuids = [self._driver.uuid(device) for device in range(count)]
        except (CudaDriverError, self._runtime.CUDARuntimeError) as error:
            raise TransportUnavailableError(f"no usable card: {error}", scheme=_SCHEME) from error
        module = cupy.RawModule(code=SOURCE, options=("--std=c++17",))
        self._kernels = {name: module.get_function(name) for name in ("copy_wide", "copy_any", "sum_pages")}
        self._lock = threading.Lock()
        self._peers: set[tuple[int, int]] = set()
        self._idle: dict[int, list[_Lane]] = {device: [] for device in range(count)}
        self._tables: OrderedDict[tuple[Any, ...], tuple[PageLayout, PageLayout | None, _Table]] = OrderedDict()

    @contextlib.contextmanager
    def _on(self, device: int) -> Iterator[None]:
        """Make `device` current: for the runtime, and thereby its context for the driver."""
        before = self._runtime.getDevice()
        self._runtime.setDevice(device)
        try:
            yield
        finally:
            if before != device:
                self._runtime.setDevice(before)

    # ---- cards and memory

    def device_of(self, array: Any) -> int:
        return int(array.data.device_id)

    def ordinal(self, uuid: bytes) -> int | None:
        return self._uuids.index(uuid) if uuid in self._uuids else None

    def peer_access(self, here: int, there: int) -> bool:
        if here == there or (here, there) in self._peers:
            return True
        if not self._runtime.deviceCanAccessPeer(here, there):
            return False
        with self._on(here):
            try:
                self._runtime.deviceEnablePeerAccess(there)
            except self._runtime.CUDARuntimeError as error:
                if error.status != _PEER_ACCESS_ALREADY_ENABLED:
                    raise TransportUnavailableError(f"no peer access: {error}", scheme=_SCHEME) from error
        self._peers.add((here, there))
        return True

    def pointer(self, array: Any) -> int:
        return int(array.data.ptr)

    def allocate(self, nbytes: int, device: int) -> Any:
        with self._on(device):
            return self._array(self.cupy.cuda.Memory(nbytes), nbytes)

    def _array(self, memory: Any, nbytes: int) -> Any:
        return self.cupy.ndarray((nbytes,), self.cupy.uint8, self.cupy.cuda.MemoryPointer(memory, 0))

    def upload(self, data: bytes, array: Any) -> None:
        with self._on(self.device_of(array)):
            source = np.frombuffer(data, np.uint8)
            kind = self._runtime.memcpyHostToDevice
            self._runtime.memcpy(self.pointer(array), source.ctypes.data, len(data), kind)
            self._runtime.deviceSynchronize()

    def download(self, array: Any) -> bytes:
        with self._on(self.device_of(array)):
            target = np.empty(len(array), np.uint8)
            kind = self._runtime.memcpyDeviceToHost
            self._runtime.memcpy(target.ctypes.data, self.pointer(array), len(array), kind)
            return target.tobytes()

    # ---- across processes

    def export(self, array: Any) -> CudaAddress:
        device = self.device_of(array)
        try:
            with self._on(device):
                info = self._driver.allocation(self.pointer(array))
                if not info.legacy_ipc:
                    raise RegistrationError(_not_exportable(mempool=info.mempool), scheme=_SCHEME)
                handle = self._runtime.ipcGetMemHandle(info.base)
        except (CudaDriverError, self._runtime.CUDARuntimeError) as error:
            raise RegistrationError(f"the memory cannot be exported: {error}", scheme=_SCHEME) from error
        offset = self.pointer(array) - info.base
        return CudaAddress(self._uuids[device], handle, info.buffer_id, info.nbytes, offset, len(array))

    def open(self, address: CudaAddress, device: int) -> Any:
        with self._on(device):
            try:
                pointer = self._runtime.ipcOpenMemHandle(
                    address.handle, self._runtime.cudaIpcMemLazyEnablePeerAccess
                )
            except self._runtime.CUDARuntimeError as error:
                why = f"the owner's allocation cannot be mapped ({error}); both processes need the same PID namespace"
                raise TransportUnavailableError(why, scheme=_SCHEME) from error
            owner = _Mapping()
            weakref.finalize(owner, _unmap, self._runtime, pointer, device).atexit = False
            try:
                info = self._driver.allocation(pointer)
            except CudaDriverError as error:
                raise TransportUnavailableError(f"what was mapped is no memory: {error}", scheme=_SCHEME) from error
            if info.base != pointer or info.nbytes < address.allocation_bytes:
                raise PeerGoneError("the owner's allocation is another one by now", scheme=_SCHEME)
            memory = self.cupy.cuda.UnownedMemory(pointer, address.allocation_bytes, owner, device)
            return self._array(memory, address.allocation_bytes)

    # ---- work on the card

    def copy(
        self,
        source: CudaPagedMemory,
        source_pages: np.ndarray,
        target: CudaPagedMemory,
        target_pages: np.ndarray,
        digest: np.ndarray | None = None,
    ) -> CudaTransfer:
        source.layout.check_pages(source_pages)
        target.layout.check_pages(target_pages)
        device, digest = target.device, digest if digest is not None and len(digest) else None
        finish: Callable[[_Lane], list[bytes]] | None = None
        with self._on(device):
            lane = self._lane(device)
            try:
                table = self._copy_table(source, target, lane)
                words = None if digest is None else self._digest_table(target, lane)
                pairs = _pairs(source_pages, target_pages)
                if words is None or digest is None:
                    pages = lane.load(pairs)
                else:
                    sums = np.zeros((len(digest), 2), np.uint64)
                    at = lane.load(sums, pairs, digest.astype(np.uint64))  # pairs stay aligned to 16 bytes
                    pages = at + sums.nbytes
                if target.after is not None:
                    self._runtime.streamWaitEvent(lane.stream.ptr, event_handle(target.after))
                with lane.stream:
                    self._launch(table, pages, len(source_pages))
                    if words is not None and digest is not None:
                        numbers = pages + pairs.nbytes
                        finish = self._launch_sums(words, lane, at, numbers, len(digest), target.layout.page_bytes)
                lane.event.record(lane.stream)
            except self._runtime.CUDARuntimeError as error:
                raise TransferError(f"a copy cannot be launched: {error}", scheme=_SCHEME) from error
        if digest is not None and finish is None:  # its pages are not made of aligned words
            return _Transfer(lane, self._idle[device], (source, target), lambda _: self.digests(target, digest))
        return _Transfer(lane, self._idle[device], (source, target), finish)

    def _launch_sums(
        self, table: _Table, lane: _Lane, at: int, numbers: int, count: int, page_bytes: int
    ) -> Callable[[_Lane], list[bytes]]:
        """Launch the digests of `count` pages: their sums, all zero, are first in the lane, `at`, their numbers elsewhere.

        Returns:
            What makes digests of the sums, once they are in the lane's host memory.
        """
        nbytes = 16 * count
        self._launch(table, numbers, count, np.uint64(at))
        kind = self._runtime.memcpyDeviceToHost
        self._runtime.memcpyAsync(lane.host.ctypes.data, at, nbytes, kind, lane.stream.ptr)
        return lambda lane: sum128_final(lane.host[:nbytes].view(np.uint64).reshape(-1, 2), page_bytes)

    def launcher(
        self, source: CudaPagedMemory, source_pages: np.ndarray, target: CudaPagedMemory, target_pages: np.ndarray
    ) -> Callable[[], None]:
        """Return a function that launches the kernel of `copy` on cupy's current stream and nothing else, to time it."""
        lane = _Lane(self.cupy)
        table = self._copy_table(source, target, lane)
        lane.load(_pairs(source_pages, target_pages))
        lane.stream.synchronize()
        return lambda: self._launch(table, lane.device.ptr, len(source_pages))

    def _launch(self, table: _Table, pages: int, count: int, *more: np.generic) -> None:
        """Launch the kernel of a table on the current stream, for `count` pages whose numbers are at `pages`."""
        groups = table.rows * count
        grid = -(-groups * table.threads // BLOCK_THREADS)
        args = (np.uint64(table.address), np.uint32(count), np.uint64(pages), np.uint32(groups), *more)
        self._kernels[table.kernel]((grid,), (BLOCK_THREADS,), args)

    def _lane(self, device: int) -> _Lane:
        try:
            return self._idle[device].pop()  # one operation of list: needs no lock
        except IndexError:
            return _Lane(self.cupy)

    def _copy_table(self, source: CudaPagedMemory, target: CudaPagedMemory, lane: _Lane) -> _Table:
        """Return the copy table of two memories, on the card of `target`."""

        def make() -> tuple[np.ndarray, str, int]:
            rows, wide = copy_table(source.layout, source.pointers, target.layout, target.pointers)
            return rows, "copy_wide" if wide else "copy_any", BLOCK_THREADS if wide else WARP
        key = (target.device, source.pointers, target.pointers)
        table = self._table(key, source.layout, target.layout, lane, make)
        assert table is not None  # noqa: S101 - every two layouts of one page size can be copied
        return table

    def _digest_table(self, memory: CudaPagedMemory, lane: _Lane) -> _Table | None:
        """Return the digest table of a memory, on its card, or None: see `digest_table`."""

        def make() -> tuple[np.ndarray, str, int] | None:
            rows = digest_table(memory.layout, memory.pointers)
            return None if rows is None else (rows, "sum_pages", WARP)

        return self._table((memory.device, memory.pointers), memory.layout, None, lane, make)

    def _table(
        self,
        key: tuple[Any, ...],
        first: PageLayout,
        second: PageLayout | None,
        lane: _Lane,
        make: Callable[[], tuple[np.ndarray, str, int] | None],
    ) -> _Table | None:
        with self._lock:
            found = self._tables.get(key)
            if found is not None and found[0] == first and found[1] == second:
                self._tables.move_to_end(key)
                return found[2]
        made = make()
        if made is None:
            return None
        rows, kernel, threads = made
        memory = self.cupy.cuda.Memory(rows.nbytes)
        staged, kind = lane.load(rows), self._runtime.memcpyDeviceToDevice
        self._runtime.memcpyAsync(memory.ptr, staged, rows.nbytes, kind, lane.stream.ptr)
        lane.stream.synchronize()  # it is used from other lanes, too
        table = _Table(memory, memory.ptr, len(rows), kernel, threads)
        with self._lock:
            self._tables[key] = (first, second, table)
            while len(self._tables) > TABLES_MAX:
                self._tables.popitem(last=False)
        return table

    def digests(self, memory: CudaPagedMemory, pages: np.ndarray) -> list[bytes]:
        memory.layout.check_pages(pages)
        if not len(pages):
            return []
        with self._on(memory.device):
            return self._sums(memory, pages, memory.layout.page_bytes) or self._packed_digests(memory, pages)

    def _sums(self, memory: CudaPagedMemory, pages: np.ndarray, page_bytes: int) -> list[bytes]:
        """Digest pages in place, or return nothing when they are not made of aligned words."""
        device = memory.device
        lane = self._lane(device)
        try:
            table = self._digest_table(memory, lane)
            if table is None:
                self._idle[device].append(lane)
                return []
            sums = np.zeros((len(pages), 2), np.uint64)
            at = lane.load(sums, pages.astype(np.uint64))
            with lane.stream:
                finish = self._launch_sums(table, lane, at, at + sums.nbytes, len(pages), page_bytes)
            lane.event.record(lane.stream)
            lane.wait()
        except self._runtime.CUDARuntimeError as error:
            raise TransferError(f"digests cannot be computed: {error}", scheme=_SCHEME) from error
        digests = finish(lane)
        self._idle[device].append(lane)
        return digests

    def _packed_digests(self, memory: CudaPagedMemory, pages: np.ndarray) -> list[bytes]:
        page_bytes, device = memory.layout.page_bytes, memory.device
        padded = -(-page_bytes // WORD_BYTES) * WORD_BYTES
        count = max(1, min(len(pages), PACK_BYTES_MAX // padded))
        with self._on(device):
            place = self.allocate(count * padded, device)
            self._runtime.memset(self.pointer(place), 0, count * padded)
            self._runtime.deviceSynchronize()
            scratch = CudaPagedMemory(PageLayout(count, (Segment(0, 0, padded, page_bytes),)), (place,), self)
            words = CudaPagedMemory(PageLayout.packed(count, padded), (place,), self)
            found: list[bytes] = []
            for start in range(0, len(pages), count):
                chosen = pages[start : start + count]
                slots = np.arange(len(chosen))
                self.copy(memory, chosen, scratch, slots).wait()
                found += self._sums(words, slots, page_bytes)
        return found


def _pairs(source_pages: np.ndarray, target_pages: np.ndarray) -> np.ndarray:
    pairs = np.empty((len(source_pages), 2), np.uint64)
    pairs[:, 0], pairs[:, 1] = source_pages, target_pages
    return pairs


def _unmap(runtime: Any, pointer: int, device: int) -> None:
    before = runtime.getDevice()
    runtime.setDevice(device)
    try:
        with contextlib.suppress(runtime.CUDARuntimeError):  # the context is gone, and the mapping with it
            runtime.ipcCloseMemHandle(pointer)
    finally:
        runtime.setDevice(before)


def _not_exportable(*, mempool: bool) -> str:
    if mempool:
        return (
            "the memory comes from a CUDA memory pool, which other processes cannot map; take it from cudaMalloc: "
            "without backend:cudaMallocAsync in PYTORCH_CUDA_ALLOC_CONF, or without cupy's MemoryAsyncPool"
        )
    return (
        "the memory is an expandable segment or another virtual mapping, which other processes cannot map; remove "
        "expandable_segments:True from PYTORCH_CUDA_ALLOC_CONF, at least while the KV cache is allocated"
    )


def event_handle(event: Any) -> int:
    """Return the CUDA handle of an event of torch or cupy."""
    handle = getattr(event, "cuda_event", None) or getattr(event, "ptr", None)
    if not isinstance(handle, int):
        raise InvalidInputError(f"expected a recorded CUDA event of torch or cupy, not {type(event).__name__}")
    return handle


def cuda_bytes(tensor: Any) -> Any:
    """View the memory of a CUDA tensor as a flat uint8 array; nothing is copied.

    Args:
        tensor: a torch tensor on a GPU or a cupy array, dense in some order of its axes.

    Raises:
        InvalidInputError: it is neither, or has holes.
        MissingExtraError: cupy is not installed.
    """
    cupy = load_cuda().cupy
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor) and tensor.is_cuda:
        steps = sorted(zip(tensor.stride(), tensor.shape, strict=True))
        pointer, nbytes, device = tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor.device.index
    elif isinstance(tensor, cupy.ndarray):
        steps = sorted((stride // tensor.itemsize, size) for stride, size in zip(tensor.strides, tensor.shape, strict=True))
        pointer, nbytes, device = tensor.data.ptr, tensor.nbytes, tensor.data.device_id
    else:
        raise InvalidInputError(f"expected a CUDA tensor of torch or a cupy array, not {type(tensor).__name__}")
    dense = 1
    for stride, size in steps:
        if size > 1 and stride != dense:
            raise InvalidInputError("the tensor has holes or overlaps: lend the tensor it is a view of")
        dense *= size
    if nbytes == 0:
        raise InvalidInputError("the tensor is empty")
    memory = cupy.cuda.UnownedMemory(pointer, nbytes, tensor, device)
    return cupy.ndarray((nbytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
