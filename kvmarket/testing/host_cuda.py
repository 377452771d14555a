"""`CudaApi` on host memory, so that everything of the CUDA transport but CUDA itself is tested on every machine.

"Card memory" is shared memory, a "handle" its address, a "launch" a copy that happens when it is waited for.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.digest import sum128
from kvmarket.errors import PeerGoneError, RegistrationError
from kvmarket.region.cuda import HANDLE_BYTES, NO_DIGESTS, CudaAddress, CudaApi, CudaPagedMemory, CudaTransfer
from kvmarket.region.memory import MemoryAddress, SharedMemory, map_peer_memory
from kvmarket.region.pages import copy_pages

if TYPE_CHECKING:
    from collections.abc import Callable

_HANDLE = struct.Struct("<QQQQ")
CARD = b"the card of host"


class HostTransfer(CudaTransfer):
    """A copy that is done by `wait`."""

    def __init__(self, copy: Callable[[], np.ndarray]) -> None:
        self._copy: Callable[[], np.ndarray] | None = copy
        self.digests = NO_DIGESTS

    def wait(self) -> None:
        if self._copy is not None:
            self.digests = self._copy()
        self._copy = None


class HostCuda(CudaApi):
    """One card. Its allocations last until `close`.

    Attributes:
        exportable: False plays memory that no other process can map.
    """

    def __init__(self) -> None:
        self._allocations: list[SharedMemory] = []
        self.exportable = True

    def make_current(self, device: int) -> None:
        """There is no context."""

    def device_of(self, array: Any) -> int:
        del array
        return 0

    def ordinal(self, uuid: bytes) -> int | None:
        return 0 if uuid == CARD else None

    def peer_access(self, here: int, there: int) -> bool:
        return here == there

    def pointer(self, array: Any) -> int:
        return int(array.ctypes.data)

    def allocate(self, nbytes: int, device: int) -> Any:
        del device
        self._allocations.append(SharedMemory(nbytes, "cuda"))
        return self._allocations[-1].array

    def upload(self, data: bytes, array: Any) -> None:
        array[:] = np.frombuffer(data, np.uint8)

    def download(self, array: Any) -> bytes:
        return bytes(array)

    def export(self, array: Any) -> CudaAddress:
        for number, memory in enumerate(self._allocations):
            offset = memory.contains(self.pointer(array), len(array))
            if offset is not None and self.exportable:
                address = memory.address
                handle = _HANDLE.pack(*address.as_list()).ljust(HANDLE_BYTES, b"\0")
                return CudaAddress(CARD, handle, number, address.nbytes, offset, len(array))
        raise RegistrationError("the memory cannot be exported", scheme="cuda_ipc")

    def open(self, address: CudaAddress, device: int) -> Any:
        del device
        array = map_peer_memory(MemoryAddress(*_HANDLE.unpack(address.handle[: _HANDLE.size])))
        if len(array) != address.allocation_bytes:
            raise PeerGoneError("the owner's allocation is another one by now", scheme="cuda_ipc")
        return array

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

        def work() -> np.ndarray:
            copy_pages(source, source_pages, target, target_pages)
            return NO_DIGESTS if digest is None else self.digests(target, target_pages[digest])

        return HostTransfer(work)

    def digests(self, memory: CudaPagedMemory, pages: np.ndarray) -> np.ndarray:
        memory.layout.check_pages(pages)
        found = [sum128(np.concatenate(memory.views(page))) for page in pages.tolist()]
        return np.frombuffer(b"".join(found), NO_DIGESTS.dtype)

    def close(self) -> None:
        """Give all allocations back."""
        for memory in self._allocations:
            memory.close()
        self._allocations.clear()
