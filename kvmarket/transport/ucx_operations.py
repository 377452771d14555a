"""Operations on UCX endpoints: messages and one-sided reads are posted here, and reaped when UCX has completed them.

Every call belongs to whoever has the turn of the worker (see `kvmarket.transport.ucx_driver`).
"""

from __future__ import annotations

import ctypes as c
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kvmarket.transport import ucx_api as api

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

logger = logging.getLogger(__name__)

CONTROL_ID, DATA_ID = 17, 18
"""Active message ids; ucxx itself uses 0."""
RENDEZVOUS_BYTES = 16 << 10
"""Data messages from this size on go straight into place by rendezvous; shorter ones travel inside the message."""


@dataclass(slots=True)
class Payload:
    """The bytes of a data message: here already (`data`), or waiting at the sender (`descriptor`)."""

    length: int
    data: bytes | None
    descriptor: int | None


class Handler(Protocol):
    """Who is told what happens on an endpoint. All calls come from the driver's thread."""

    def on_control(self, data: bytes) -> None:
        """A control message came."""

    def on_data(self, header: bytes, payload: Payload) -> None:
        """A data message came; give it to `UcxDriver.receive` or to `UcxDriver.drop`."""

    def on_closed(self, why: str) -> None:
        """The endpoint is gone. Every operation on it has had its callback before."""


class Endpoint:
    """One connection. Its handler gets `on_closed` exactly once."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.handle = raw, int(raw.handle)
        self.handler: Handler | None = None
        self.closed = False
        self.failed: str | None = None
        self.operations: set[_Operation] = set()


Piece = tuple[int, int, int, int]
"""Of a one-sided read: local address, bytes, remote address, handle of the remote key."""


def _ignore(status: int) -> None:
    """A control message that cannot be sent shows as the end of its endpoint."""
    del status


class _Operation:
    __slots__ = ("done", "endpoint", "keep", "request")

    def __init__(self, endpoint: Endpoint, request: int, done: Callable[[int], None], keep: object) -> None:
        self.endpoint, self.request, self.done, self.keep = endpoint, request, done, keep


class Operations:
    """Posts operations of one worker and gives each its callback once, when UCX has completed it."""

    def __init__(self) -> None:
        self._lib = api.libucp()
        self._worker = 0
        self._operations: set[_Operation] = set()
        short = api.RequestParam(op_attr_mask=api.OP_FIELD_FLAGS)
        short.flags = api.AM_SEND_REPLY | api.AM_SEND_EAGER | api.AM_SEND_COPY_HEADER
        self._short_param = c.pointer(short)
        self._get_param = c.pointer(api.RequestParam(op_attr_mask=0))

    def send_control(self, endpoint: Endpoint, data: bytes) -> None:
        """Send a control message; a failure shows as the endpoint's end."""
        if endpoint.closed:
            return
        request = self._lib.ucp_am_send_nbx(endpoint.handle, CONTROL_ID, None, 0, data, len(data), self._short_param)
        self._track(endpoint, request, _ignore, data)

    def send_short(self, endpoint: Endpoint, header: bytes, data: bytes) -> None:
        """Send a short data message from a copy of its bytes; a failure shows as the endpoint's end.

        Args:
            endpoint: where to.
            header: at most `DATA_HEADER_BYTES` that go with it.
            data: at most `RENDEZVOUS_BYTES`.
        """
        if endpoint.closed:
            return
        request = self._lib.ucp_am_send_nbx(
            endpoint.handle, DATA_ID, header, len(header), data, len(data), self._short_param
        )
        self._track(endpoint, request, _ignore, (header, data))

    def send_data(self, endpoint: Endpoint, header: bytes, iov: np.ndarray, done: Callable[[int], None]) -> None:
        """Send memory in place.

        Args:
            endpoint: where to.
            header: at most `DATA_HEADER_BYTES` that go with it.
            iov: (n, 2) uint64 addresses and lengths.
            done: called with the status when the memory may change again.
        """
        if endpoint.closed:
            done(api.UCS_ERR_CANCELED)
            return
        rendezvous = int(iov[:, 1].sum()) >= RENDEZVOUS_BYTES
        flags = api.AM_SEND_REPLY | api.AM_SEND_COPY_HEADER | (api.AM_SEND_RNDV if rendezvous else api.AM_SEND_EAGER)
        param = api.RequestParam(
            op_attr_mask=api.OP_FIELD_FLAGS | api.OP_FIELD_DATATYPE, flags=flags, datatype=api.DATATYPE_IOV
        )
        request = self._lib.ucp_am_send_nbx(
            endpoint.handle, DATA_ID, header, len(header), iov.ctypes.data, len(iov), c.byref(param)
        )
        self._track(endpoint, request, done, iov)

    def receive(self, endpoint: Endpoint, payload: Payload, iov: np.ndarray, done: Callable[[int], None]) -> None:
        """Put a data message into memory.

        Args:
            endpoint: where it came from.
            payload: as it was handed to `Handler.on_data`.
            iov: (n, 2) uint64 addresses and lengths that add up to the payload's length.
            done: called with the status when nothing writes there any more.
        """
        if endpoint.closed:
            self.drop(payload)
            done(api.UCS_ERR_CANCELED)
            return
        if payload.data is not None:
            source = c.cast(c.c_char_p(payload.data), c.c_void_p).value or 0
            for address, nbytes in iov.tolist():
                c.memmove(address, source, nbytes)
                source += nbytes
            done(api.UCS_OK)
            return
        param = api.RequestParam(op_attr_mask=api.OP_FIELD_DATATYPE | api.OP_NO_IMMEDIATE, datatype=api.DATATYPE_IOV)
        descriptor, payload.descriptor = payload.descriptor, None
        request = self._lib.ucp_am_recv_data_nbx(self._worker, descriptor, iov.ctypes.data, len(iov), c.byref(param))
        self._track(endpoint, request, done, iov)

    def drop(self, payload: Payload) -> None:
        """Refuse the bytes of a data message; the sender's operation completes."""
        if payload.descriptor is not None:
            self._lib.ucp_am_data_release(self._worker, payload.descriptor)
            payload.descriptor = None

    def get(self, endpoint: Endpoint, piece: Piece, done: Callable[[int], None]) -> None:
        """Read a piece of a peer's registered memory; `done(status)` when nothing writes to the local end any more."""
        if endpoint.closed:
            done(api.UCS_ERR_CANCELED)
            return
        local, nbytes, remote, rkey = piece
        request = self._lib.ucp_get_nbx(endpoint.handle, local, nbytes, remote, rkey, self._get_param)
        if not request:
            done(api.UCS_OK)
        else:
            self._track(endpoint, request, done, None)

    def _track(self, endpoint: Endpoint, request: int | None, done: Callable[[int], None], keep: object) -> None:
        status = api.pointer_status(request)
        if status is not None:
            done(status)
            return
        operation = _Operation(endpoint, request or 0, done, keep)
        endpoint.operations.add(operation)
        self._operations.add(operation)

    def _reap(self, operations: list[_Operation]) -> bool:
        """Finish those of `operations` that UCX has completed."""
        finished = False
        check = self._lib.ucp_request_check_status
        for operation in operations:
            if operation not in self._operations:
                continue  # another operation's callback closed the endpoint
            status = check(operation.request)
            if status == api.UCS_INPROGRESS:
                continue
            self._lib.ucp_request_free(operation.request)
            self._operations.discard(operation)
            operation.endpoint.operations.discard(operation)
            operation.done(status)
            finished = True
        return finished

    def _settle(self, endpoint: Endpoint) -> None:
        """Give every operation of a closed endpoint its callback; UCX completes them when it closes the endpoint."""
        limit = time.monotonic() + 1.0
        while endpoint.operations and time.monotonic() < limit:
            self._lib.ucp_worker_progress(self._worker)
            self._reap(list(endpoint.operations))
        if endpoint.operations:  # never seen; a request that UCX does not give back must not be forgotten
            logger.error("kvmarket: %d UCX requests outlive their endpoint", len(endpoint.operations))
