"""Streams of our own, each with what one launch needs, and waiting for what was launched there."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.errors import InvalidInputError, TransferError
from kvmarket.region.cuda import CudaTransfer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmarket.region.cuda import CudaPagedMemory

SPIN_S = 0.002
"""A wait polls this long without sleeping."""
POLL_S = 0.0002
STUCK_S = 30.0
"""A copy that takes longer is taken for a card that hangs."""
SCHEME = "cuda_ipc"


@contextlib.contextmanager
def current_device(runtime: Any, device: int) -> Iterator[None]:
    """Make `device` current for this thread: for the runtime, and thereby its context for the driver."""
    before = runtime.getDevice()
    runtime.setDevice(device)
    try:
        yield
    finally:
        if before != device:
            runtime.setDevice(before)


class Lane:
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
        runtime.memcpyAsync(self.device.ptr, self.host.ctypes.data, nbytes, runtime.memcpyHostToDevice, self.stream.ptr)
        return int(self.device.ptr)

    def wait(self) -> None:
        """Return when everything on the stream up to the event is done; errors as `CudaTransfer.wait`."""
        began = time.monotonic()
        try:
            while not self.event.done:
                spent = time.monotonic() - began
                if spent > STUCK_S:
                    raise TransferError(f"the card did not finish within {STUCK_S:.0f} s", scheme=SCHEME)
                if spent < SPIN_S:
                    os.sched_yield()  # a sleep of 0 would take some 50 us
                else:
                    time.sleep(POLL_S)
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            raise TransferError(f"the card failed: {error}", scheme=SCHEME) from error


class LaneTransfer(CudaTransfer):
    """A launched copy. It keeps its memory alive, and its lane out of use, until it was waited for."""

    def __init__(
        self,
        lane: Lane,
        idle: list[Lane],
        memories: tuple[CudaPagedMemory, ...],
        finish: Callable[[Lane], list[bytes]] | None,
    ) -> None:
        self._lane: Lane | None = lane
        self._idle, self._memories, self._finish = idle, memories, finish
        self.digests = []

    def wait(self) -> None:
        if self._lane is not None:
            self._lane.wait()
            if self._finish is not None:
                self.digests = self._finish(self._lane)
            self._idle.append(self._lane)
            self._lane, self._memories, self._finish = None, (), None


def event_handle(event: Any) -> int:
    """Return the CUDA handle of an event of torch or cupy."""
    handle = getattr(event, "cuda_event", None) or getattr(event, "ptr", None)
    if not isinstance(handle, int):
        raise InvalidInputError(f"expected a recorded CUDA event of torch or cupy, not {type(event).__name__}")
    return handle
