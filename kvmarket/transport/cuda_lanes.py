"""Streams of our own, each with what one launch needs, and waiting for what was launched there."""

from __future__ import annotations

import ctypes
import os
import struct
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.announced import DIGEST_BYTES
from kvmarket.errors import InvalidInputError, TransferError
from kvmarket.region.cuda import NO_DIGESTS, CudaTransfer
from kvmarket.transport.cuda_kernels import FEW_PAGES, MANY_PAGES, SUM_BYTES, pages_argument

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmarket.region.cuda import CudaPagedMemory

BUSY_S = 0.0001
"""A wait asks this long without leaving the processor; each question lets other threads of Python go on."""
SPIN_S = 0.005
"""A wait polls this long without sleeping: as long as a gigabyte takes between cards."""
POLL_SHARE = 0.02
"""Then it sleeps this share of what it has waited, so that it hardly adds to it."""
PINNED_BYTES_MAX = 256
"""Page lists of up to this size are read by the card over the bus: 16 pages."""
STUCK_S = 30.0
"""A copy that takes longer is taken for a card that hangs."""
SCHEME = "cuda_ipc"
_HEAD = struct.Struct("=5Q")


class current_device:  # noqa: N801 - a context manager, and not a generator because every launch enters it
    """Make `device` current for this thread: for the runtime, and thereby its context for the driver."""

    __slots__ = ("_before", "_device", "_runtime")

    def __init__(self, runtime: Any, device: int) -> None:
        self._runtime, self._device = runtime, device

    def __enter__(self) -> None:
        self._before = self._runtime.getDevice()
        self._runtime.setDevice(self._device)

    def __exit__(self, *_error: object) -> None:
        if self._before != self._device:
            self._runtime.setDevice(self._before)


class Lane:
    """A stream with what one launch needs: an event, page lists in pinned and in device memory, digests.

    Attributes:
        digests: (pages,) V16 in pinned memory: those of the last launch once the event has passed.
    """

    def __init__(self, cupy: Any) -> None:
        self._cupy, self._runtime = cupy, cupy.cuda.runtime
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.event = cupy.cuda.Event(block=False, disable_timing=True)
        self.host: np.ndarray = np.empty(0, np.uint8)
        self._device: Any = None
        self._sums: Any = None
        self._places = (0, 0)
        self.digests: np.ndarray = NO_DIGESTS
        self._few = PagesArgument(FEW_PAGES)
        self._many: PagesArgument | None = None

    def load(self, data: np.ndarray) -> int:
        """Put an array where kernels of this lane find it, without waiting; return its address there.

        A short one stays in pinned memory of the host, which the card reads itself: that is sooner done than a copy.
        """
        nbytes = data.nbytes
        if nbytes > len(self.host):
            size = max(16 << 10, 1 << (nbytes - 1).bit_length())
            self.host = self._pinned(size)
            self._device = self._cupy.cuda.Memory(size)
        self.host[:nbytes] = data.reshape(-1).view(np.uint8)
        here = int(self.host.ctypes.data)
        if nbytes <= PINNED_BYTES_MAX:
            return here
        there = int(self._device.ptr)
        self._runtime.memcpyAsync(there, here, nbytes, self._runtime.memcpyHostToDevice, self.stream.ptr)
        return there

    def argument(self, pages: int) -> PagesArgument:
        """Return what a launch of so many pages, of at most `MANY_PAGES`, brings along."""
        if pages <= FEW_PAGES:
            return self._few
        if self._many is None:
            self._many = PagesArgument(MANY_PAGES)
        return self._many

    def summing(self, pages: int) -> tuple[int, int]:
        """Return the addresses of sums of (pages,), zero when the stream has come this far, and of their digests.

        A kernel that ends leaves them zero.
        """
        if pages > len(self.digests):
            count = max(64, 1 << (pages - 1).bit_length())
            self.digests = self._pinned(count * DIGEST_BYTES).view(NO_DIGESTS.dtype)
            self._sums = self._cupy.cuda.Memory(count * SUM_BYTES)
            self._runtime.memsetAsync(self._sums.ptr, 0, count * SUM_BYTES, self.stream.ptr)
            self._places = int(self._sums.ptr), int(self.digests.ctypes.data)
        return self._places

    def _pinned(self, nbytes: int) -> np.ndarray:
        return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    @property
    def ended(self) -> bool:
        """True when everything on the stream up to the event is done, or has failed."""
        try:
            return bool(self.event.done)
        except self._runtime.CUDARuntimeError:
            return True

    def wait(self) -> None:
        """Return when everything on the stream up to the event is done; errors as `CudaTransfer.wait`."""
        began = time.monotonic()
        try:
            while not self.event.done:
                spent = time.monotonic() - began
                if spent > STUCK_S:
                    raise TransferError(f"the card did not finish within {STUCK_S:.0f} s", scheme=SCHEME)
                if spent > SPIN_S:
                    time.sleep(POLL_SHARE * spent)
                elif spent > BUSY_S:
                    os.sched_yield()  # a sleep of 0 would take some 50 us
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            raise TransferError(f"the card failed: {error}", scheme=SCHEME) from error


class PagesArgument:
    """The argument of a launch that brings its page numbers along.

    Args:
        pages_max: how many.

    Attributes:
        arguments: a C array of the one address where it is, as launches take it.
    """

    def __init__(self, pages_max: int) -> None:
        argument = np.zeros(1, pages_argument(pages_max))
        self._source, self._target = argument[0]["source"], argument[0]["target"]
        self._head = argument.view(np.uint8).data
        self.arguments = (ctypes.c_void_p * 1)(argument.ctypes.data)

    def fill(self, source_pages: np.ndarray, target_pages: np.ndarray, head: tuple[int, int, int, int]) -> None:
        """Set the page numbers, and what comes before them: the table, sums, digests, bytes of a page."""
        count = len(source_pages)
        self._source[:count], self._target[:count] = source_pages, target_pages
        _HEAD.pack_into(self._head, 0, *head, count)


class LaneTransfer(CudaTransfer):
    """A launched copy. It keeps its memory alive, and its lane out of use, until it was waited for."""

    def __init__(
        self,
        lane: Lane,
        idle: list[Lane],
        memories: tuple[CudaPagedMemory, ...],
        finish: Callable[[], np.ndarray] | None,
    ) -> None:
        self._lane: Lane | None = lane
        self._idle, self._memories, self._finish = idle, memories, finish
        self.digests = NO_DIGESTS

    @property
    def ended(self) -> bool:
        return self._lane is None or self._lane.ended

    def wait(self) -> None:
        if self._lane is not None:
            self._lane.wait()
            if self._finish is not None:
                self.digests = self._finish()
            self._idle.append(self._lane)
            self._lane, self._memories, self._finish = None, (), None


def event_handle(event: Any) -> int:
    """Return the CUDA handle of an event of torch or cupy."""
    handle = getattr(event, "cuda_event", None) or getattr(event, "ptr", None)
    if not isinstance(handle, int):
        raise InvalidInputError(f"expected a recorded CUDA event of torch or cupy, not {type(event).__name__}")
    return handle
