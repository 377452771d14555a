"""`CudaApi` on cupy: cards, allocations, exports and mappings; `cuda_work` has what the cards do."""

from __future__ import annotations

import contextlib
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvmarket.errors import MissingExtraError, PeerGoneError, RegistrationError, TransportUnavailableError
from kvmarket.region.cuda import CudaAddress, CudaApi
from kvmarket.transport.cuda_driver import CudaDriver, CudaDriverError
from kvmarket.transport.cuda_lanes import SCHEME, current_device
from kvmarket.transport.cuda_work import CardWork

if TYPE_CHECKING:
    from kvmarket.region.cuda import CudaPagedMemory, CudaTransfer

_PEER_ACCESS_ALREADY_ENABLED = 704


@cache
def load_cuda() -> CupyCuda:
    """Return this process's CUDA; one object, because lanes and tables belong to the cards.

    Raises:
        MissingExtraError: cupy is not installed.
        TransportUnavailableError: there is no driver or no card.
    """
    return CupyCuda()


class _Mapping:
    """Stands for an opened handle; when the last array over it is gone, so is the mapping."""


class CupyCuda(CudaApi):
    """The real thing.

    Attributes:
        cupy: the module.
        work: what the cards do.
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
            raise TransportUnavailableError(f"no usable card: {error}", scheme=SCHEME) from error
        self._peers: set[tuple[int, int]] = set()
        self.work = CardWork(cupy, self._driver, count)

    # ---- cards and memory

    def make_current(self, device: int) -> None:
        self._runtime.setDevice(device)
        self._runtime.free(0)  # makes the context, if there is none yet

    def device_of(self, array: Any) -> int:
        return int(array.data.device_id)

    def ordinal(self, uuid: bytes) -> int | None:
        return self._uuids.index(uuid) if uuid in self._uuids else None

    def peer_access(self, here: int, there: int) -> bool:
        if here == there or (here, there) in self._peers:
            return True
        if not self._runtime.deviceCanAccessPeer(here, there):
            return False
        self._enable_peer_access(here, there)
        if self._runtime.deviceCanAccessPeer(there, here):  # whoever reads here may be read from there
            self._enable_peer_access(there, here)
        return True

    def _enable_peer_access(self, here: int, there: int) -> None:
        with current_device(self._runtime, here):
            try:
                self._runtime.deviceEnablePeerAccess(there)
            except self._runtime.CUDARuntimeError as error:
                if error.status != _PEER_ACCESS_ALREADY_ENABLED:
                    raise TransportUnavailableError(f"no peer access: {error}", scheme=SCHEME) from error
        self._peers.add((here, there))

    def pointer(self, array: Any) -> int:
        return int(array.data.ptr)

    def allocate(self, nbytes: int, device: int) -> Any:
        with current_device(self._runtime, device):
            return self._array(self.cupy.cuda.Memory(nbytes), nbytes)

    def _array(self, memory: Any, nbytes: int) -> Any:
        return self.cupy.ndarray((nbytes,), self.cupy.uint8, self.cupy.cuda.MemoryPointer(memory, 0))

    def upload(self, data: bytes, array: Any) -> None:
        with current_device(self._runtime, self.device_of(array)):
            source = np.frombuffer(data, np.uint8)
            kind = self._runtime.memcpyHostToDevice
            self._runtime.memcpy(self.pointer(array), source.ctypes.data, len(data), kind)
            self._runtime.deviceSynchronize()

    def download(self, array: Any) -> bytes:
        with current_device(self._runtime, self.device_of(array)):
            target = np.empty(len(array), np.uint8)
            kind = self._runtime.memcpyDeviceToHost
            self._runtime.memcpy(target.ctypes.data, self.pointer(array), len(array), kind)
            return target.tobytes()

    # ---- across processes

    def export(self, array: Any) -> CudaAddress:
        device = self.device_of(array)
        try:
            with current_device(self._runtime, device):
                info = self._driver.allocation(self.pointer(array))
                if not info.legacy_ipc:
                    raise RegistrationError(_not_exportable(mempool=info.mempool), scheme=SCHEME)
                handle = self._runtime.ipcGetMemHandle(info.base)
        except (CudaDriverError, self._runtime.CUDARuntimeError) as error:
            raise RegistrationError(f"the memory cannot be exported: {error}", scheme=SCHEME) from error
        offset = self.pointer(array) - info.base
        return CudaAddress(self._uuids[device], handle, info.buffer_id, info.nbytes, offset, len(array))

    def open(self, address: CudaAddress, device: int) -> Any:
        with current_device(self._runtime, device):
            try:
                pointer = self._runtime.ipcOpenMemHandle(address.handle, self._runtime.cudaIpcMemLazyEnablePeerAccess)
            except self._runtime.CUDARuntimeError as error:
                why = f"the owner's allocation cannot be mapped ({error}); both processes need the same PID namespace"
                raise TransportUnavailableError(why, scheme=SCHEME) from error
            owner = _Mapping()
            weakref.finalize(owner, _unmap, self._runtime, pointer, device).atexit = False
            try:
                info = self._driver.allocation(pointer)
            except CudaDriverError as error:
                raise TransportUnavailableError(f"what was mapped is no memory: {error}", scheme=SCHEME) from error
            if info.base != pointer or info.nbytes < address.allocation_bytes:
                raise PeerGoneError("the owner's allocation is another one by now", scheme=SCHEME)
            memory = self.cupy.cuda.UnownedMemory(pointer, address.allocation_bytes, owner, device)
            return self._array(memory, address.allocation_bytes)

    # ---- work on the cards

    def copy(
        self,
        source: CudaPagedMemory,
        source_pages: np.ndarray,
        target: CudaPagedMemory,
        target_pages: np.ndarray,
        digest: np.ndarray | Literal[True] | None = None,
    ) -> CudaTransfer:
        return self.work.copy(source, source_pages, target, target_pages, digest)

    def digests(self, memory: CudaPagedMemory, pages: np.ndarray) -> np.ndarray:
        return self.work.digests(memory, pages)


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
