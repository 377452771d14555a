"""Buffers on cards in which pages lie packed while UCX carries them."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from kvmarket.errors import TransferError
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import PageLayout

if TYPE_CHECKING:
    from kvmarket.region.cuda import CudaApi

BYTES_MAX = 256 << 20
"""Of all buffers together, but for a single larger one; they are kept."""
WAIT_S = 2.0


class CardStaging:
    """Buffers of one process. Thread-safe.

    Args:
        cuda: what allocates them.
    """

    def __init__(self, cuda: CudaApi) -> None:
        self.cuda = cuda
        self._changed = threading.Condition()
        self._free: list[tuple[int, Any]] = []
        self._used: dict[int, tuple[int, Any]] = {}

    def take(self, nbytes: int, device: int) -> Any:
        """Return a uint8 array of at least `nbytes` on a card, to be given back.

        Raises:
            TransferError: none became free in time.
        """
        size, until = 1 << max(16, (nbytes - 1).bit_length()), time.monotonic() + WAIT_S
        with self._changed:
            while True:
                for number, (where, array) in enumerate(self._free):
                    if where == device and len(array) == size:
                        del self._free[number]
                        return self._use(device, array)
                held = sum(len(array) for _, array in self._used.values())
                if not self._used or held + size <= BYTES_MAX:
                    break
                if not self._changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                    raise TransferError(f"no staging buffer of {size} bytes became free", scheme="ucx_cuda")
            while self._free and held + size + sum(len(array) for _, array in self._free) > BYTES_MAX:
                self._free.pop(0)  # of other sizes
            return self._use(device, self.cuda.allocate(size, device))

    def _use(self, device: int, array: Any) -> Any:
        self._used[self.cuda.pointer(array)] = (device, array)
        return array

    def give_back(self, array: Any) -> None:
        """Take back what `take` returned. Nothing may use it any more."""
        with self._changed:
            self._free.append(self._used.pop(self.cuda.pointer(array)))
            self._changed.notify_all()

    def packed(self, array: Any, page_bytes: int) -> CudaPagedMemory:
        """Return a buffer as pages that lie one after the other, as many as fit.

        Always as many, because the kernels' tables go by memory and layout.
        """
        count = len(array) // page_bytes
        return CudaPagedMemory(PageLayout.packed(count, page_bytes), (array[: count * page_bytes],), self.cuda)

    def view(self, address: int, nbytes: int) -> Any:
        """Return the piece of a buffer in use that is at `address`.

        Raises:
            TransferError: there is none.
        """
        with self._changed:
            for base, (_, array) in self._used.items():
                if base <= address and address + nbytes <= base + len(array):
                    return array[address - base : address - base + nbytes]
        raise TransferError("bytes came for no staging buffer", scheme="ucx_cuda")
