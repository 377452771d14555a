"""The driver of a UCX worker whose data messages are single pieces of GPU memory."""

from __future__ import annotations

import ctypes as c
import os
import time
from typing import TYPE_CHECKING

from kvmarket.transport import ucx_api as api
from kvmarket.transport.ucx_driver import UcxDriver
from kvmarket.transport.ucx_operations import DATA_ID

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from kvmarket.region.cuda import CudaApi
    from kvmarket.transport.ucx_cuda_staging import CardStaging
    from kvmarket.transport.ucx_operations import Endpoint, Payload

POLL_S = 0.002
"""So long after the last thing that happened a driver polls while something is under way; then it sleeps as others do.
A copy between cards ends within that time, and what wakes a sleeping driver takes as long as the copy itself."""


class CudaUcxDriver(UcxDriver):
    """`UcxDriver` for GPU memory.

    Args:
        cuda: whose memory it is.
        staging: the buffers that the pieces lie in.

    Attributes:
        reads: reads of others that are being served here.
    """

    def __init__(self, settings: Mapping[str, str], cuda: CudaApi, staging: CardStaging, *, ipv6: bool) -> None:
        self._cuda, self._staging = cuda, staging
        self.reads = 0
        self._poll_until = 0.0
        super().__init__(settings, ipv6=ipv6)

    def _open(self) -> None:
        self._cuda.make_current(0)
        super()._open()

    def polls(self) -> bool:
        if not (self._operations or self.reads or self.tickers) or time.monotonic() > self._poll_until:
            return False
        os.sched_yield()  # lets other threads of Python go on
        return True

    def _work(self) -> bool:
        worked = super()._work()
        if worked:
            self._poll_until = time.monotonic() + POLL_S
        return worked

    def send_data(self, endpoint: Endpoint, header: bytes, iov: np.ndarray, done: Callable[[int], None]) -> None:
        """Send one piece; see `Operations.send_data`."""
        if endpoint.closed:
            done(api.UCS_ERR_CANCELED)
            return
        flags = api.AM_SEND_REPLY | api.AM_SEND_COPY_HEADER | api.AM_SEND_RNDV
        param = api.RequestParam(op_attr_mask=api.OP_FIELD_FLAGS, flags=flags)
        (address, nbytes), *_ = iov.tolist()
        request = self._lib.ucp_am_send_nbx(
            endpoint.handle, DATA_ID, header, len(header), address, nbytes, c.byref(param)
        )
        self._track(endpoint, request, done, iov)

    def receive(
        self, endpoint: Endpoint, payload: Payload, iov: np.ndarray, done: Callable[[int], None], memory: int = 0
    ) -> None:
        """Put a message into one piece of a staging buffer; see `Operations.receive`."""
        del memory  # of buffers on the host
        if endpoint.closed:
            self.drop(payload)
            done(api.UCS_ERR_CANCELED)
            return
        (address, nbytes), *_ = iov.tolist()
        if payload.data is not None:  # it travelled inside the message
            self._cuda.upload(payload.data, self._staging.view(address, nbytes))
            done(api.UCS_OK)
            return
        param = api.RequestParam(op_attr_mask=api.OP_NO_IMMEDIATE)
        descriptor, payload.descriptor = payload.descriptor, None
        request = self._lib.ucp_am_recv_data_nbx(self._worker, descriptor, address, nbytes, c.byref(param))
        self._track(endpoint, request, done, iov)
