"""`CudaApi` on host memory, so that everything of the CUDA transport but CUDA itself is tested on every machine.

"Card memory" is shared memory, a "handle" its address, a "launch" a copy that happens when it is waited for.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvmarket.digest import sum128
from kvmarket.errors import PeerGoneError, RegistrationError, TransportUnavailableError
from kvmarket.region.cuda import HANDLE_BYTES, NO_DIGESTS, CudaAddress, CudaApi, CudaPagedMemory, CudaTransfer
from kvmarket.region.memory import MemoryAddress, SharedMemory, map_peer_memory
from kvmarket.region.pages import copy_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_HANDLE = struct.Struct("<QQQQ")
CARD = b"the card of host"


class HostTransfer(CudaTransfer):
    """A copy that is done by `wait`."""

    def __init__(self, copy: Callable[[], np.ndarray], card: HostCuda) -> None:
        self._copy: Callable[[], np.ndarray] | None = copy
        self._card = card
        self.digests = NO_DIGESTS

    @property
    def ended(self) -> bool:
        return self._copy is None or not self._card.busy

    def wait(self) -> None:
        if self._copy is not None:
            self.digests = self._copy()
        self._copy = None


class HostCuda(CudaApi):
    """Cards. Their allocations last until `close`.

    Args:
        visible: the cards of this host that this process sees, in its order.
        peers: the cards have peer access to each other.

    Attributes:
        exportable: False plays memory that no other process can map.
        busy: True plays cards whose copies have not ended before they are waited for.
        enabled: (here, there) for which peer access was asked for and given.
    """

    def __init__(self, visible: Sequence[int] = (0,), *, peers: bool = True) -> None:
        self._allocations: list[SharedMemory] = []
        self._uuids = [CARD[:-1] + bytes([card]) for card in visible]
        self._devices: list[tuple[int, int, int]] = []
        self._peers = peers
        self.exportable, self.busy, self.enabled = True, False, set[tuple[int, int]]()

    def make_current(self, device: int) -> None:
        """There is no context."""

    def device_of(self, array: Any) -> int:
        at = self.pointer(array)
        return next(device for base, nbytes, device in self._devices if base <= at < base + nbytes)

    def ordinal(self, uuid: bytes) -> int | None:
        return self._uuids.index(uuid) if uuid in self._uuids else None

    def peer_access(self, here: int, there: int) -> bool:
        if here != there and self._peers:
            self.enabled |= {(here, there), (there, here)}
        return here == there or self._peers

    def _placed(self, array: Any, device: int) -> Any:
        """Note which card an array is taken to be on."""
        self._devices.append((self.pointer(array), len(array), device))
        return array

    def pointer(self, array: Any) -> int:
        return int(array.ctypes.data)

    def allocate(self, nbytes: int, device: int) -> Any:
        self._allocations.append(SharedMemory(nbytes, "cuda"))
        return self._placed(self._allocations[-1].array, device)

    def adopt(self, memory: SharedMemory, device: int = 0) -> None:
        """Have shared memory that was made elsewhere pass for an allocation on a card."""
        self._allocations.append(memory)
        self._placed(memory.array, device)

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
                return CudaAddress(
                    self._uuids[self.device_of(array)], handle, number, address.nbytes, offset, len(array)
                )
        raise RegistrationError("the memory cannot be exported", scheme="cuda_ipc")

    def open(self, address: CudaAddress, device: int) -> Any:
        if not self._peers and self.ordinal(address.device) != device:
            raise TransportUnavailableError("the owner's allocation cannot be mapped", scheme="cuda_ipc")
        array = map_peer_memory(MemoryAddress(*_HANDLE.unpack(address.handle[: _HANDLE.size])))
        if len(array) != address.allocation_bytes:
            raise PeerGoneError("the owner's allocation is another one by now", scheme="cuda_ipc")
        return self._placed(array, device)

    def copy(
        self,
        source: CudaPagedMemory,
        source_pages: np.ndarray,
        target: CudaPagedMemory,
        target_pages: np.ndarray,
        digest: np.ndarray | Literal[True] | None = None,
    ) -> CudaTransfer:
        source.layout.check_pages(source_pages)
        target.layout.check_pages(target_pages)

        def work() -> np.ndarray:
            copy_pages(source, source_pages, target, target_pages)
            if digest is None:
                return NO_DIGESTS
            return self.digests(target, target_pages if digest is True else target_pages[digest])

        return HostTransfer(work, self)

    def digests(self, memory: CudaPagedMemory, pages: np.ndarray) -> np.ndarray:
        memory.layout.check_pages(pages)
        found = [sum128(np.concatenate(memory.views(page))) for page in pages.tolist()]
        return np.frombuffer(b"".join(found), NO_DIGESTS.dtype)

    def close(self) -> None:
        """Give all allocations back."""
        for memory in self._allocations:
            memory.close()
        self._allocations.clear()
        self._devices.clear()
