"""One thread that owns a UCX worker: progresses it, sleeps on its epoll descriptor when idle, runs everybody's calls.

Nothing else touches UCX, so no call here needs a lock. Callbacks that UCX makes while it progresses only note what
came; handlers run afterwards, in the driver's loop. An idle driver uses no CPU: it is armed and blocks in
``epoll_wait``.
"""

from __future__ import annotations

import ctypes as c
import logging
import os
import select
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from kvmarket.errors import MissingExtraError, TransportUnavailableError
from kvmarket.transport import ucx_api as api
from kvmarket.transport.ucx_wire import DATA_HEADER_BYTES, MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONTROL_ID, DATA_ID = 17, 18
"""Active message ids; ucxx itself uses 0."""
RENDEZVOUS_BYTES = 16 << 10
"""Data messages from this size on go straight into place by rendezvous; shorter ones travel inside the message."""
FRAGMENTS = "UCX_RNDV_FRAG_MEM_TYPE"
TICK_S = 0.05
START_S = 30.0
PROGRESS_MAX = 64
"""Progress calls in a row before the loop looks at its other work."""


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


def load_ucxx() -> Any:
    """Import ucxx's core module, or raise `MissingExtraError` / `TransportUnavailableError`.

    ucxx prints an error line on standard output for each connection that breaks, which here is a normal event with a
    report of its own: unless the user chose a level, only fatal ones are left. At its import it also sets where staging
    fragments lie, which every later look at the environment would take for the user's choice: that is undone. And it
    turns off a cache that UCX reads when it is loaded, which is too late and gives a warning: here it is in time.
    """
    os.environ.setdefault("UCXX_LOG_LEVEL", "fatal")
    os.environ.setdefault("UCX_MEMTYPE_CACHE", "n")
    fragments = os.environ.get(FRAGMENTS)
    try:
        from ucxx._lib import libucxx
    except ModuleNotFoundError as error:
        raise MissingExtraError("ucxx", "ucx") from error
    except ImportError as error:
        raise TransportUnavailableError(f"ucxx is installed but cannot be loaded: {error}", scheme="ucx") from error
    if fragments is None:
        os.environ.pop(FRAGMENTS, None)
    return libucxx


class UcxDriver:
    """The worker and its thread. Public methods not named otherwise belong to the driver's thread.

    Args:
        settings: UCX settings without their prefix, see `kvmarket.transport.ucx_settings`. Afterwards `settings` has
            those that UCX took.

    Raises:
        MissingExtraError, TransportUnavailableError: UCX cannot be used in this process.
    """

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._ucxx = load_ucxx()
        self._lib = api.libucp()
        self.settings = dict(settings)
        self._commands: deque[Callable[[], None]] = deque()
        self._inbox: deque[tuple[int, int, bytes, Payload]] = deque()
        self._failures: deque[tuple[Endpoint, str]] = deque()
        self._endpoints: dict[int, Endpoint] = {}
        self._operations: set[_Operation] = set()
        self.tickers: set[Callable[[float], None]] = set()
        self._next_tick = 0.0
        self._stopping = False
        self._listener: Any = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="kvmarket-ucx", daemon=True)
        self._thread.start()
        started.result(START_S)

    # ---- any thread

    def submit(self, command: Callable[[], None]) -> None:
        """Run `command` soon on the driver's thread. Any thread; commands after `close` are dropped."""
        self._commands.append(command)
        os.eventfd_write(self._wake, 1)

    def call(self, function: Callable[[], T], timeout_s: float) -> T:
        """Run `function` on the driver's thread and return what it returns. Any other thread."""
        result: Future[T] = Future()

        def command() -> None:
            try:
                result.set_result(function())
            except Exception as error:  # noqa: BLE001 - handed to the caller, whatever it is
                result.set_exception(error)

        self.submit(command)
        return result.result(timeout_s)

    @property
    def alive(self) -> bool:
        """False once the driver has stopped. Any thread."""
        return self._thread.is_alive()

    def close(self, timeout_s: float = 5.0) -> None:
        """Close every endpoint and stop the thread: nothing of UCX's touches memory then. Other threads; idempotent."""
        if self._thread.is_alive():
            self.submit(self._stop)
            self._thread.join(timeout_s)

    # ---- endpoints

    def connect(self, address: str, port: int, handler: Handler) -> Endpoint:
        """Start connecting to a listener; messages may be sent at once. Failure arrives as `on_closed`."""
        raw = self._ucxx.UCXEndpoint.create(self.worker, address, port, True)
        return self._adopt(raw, handler)

    def listen(self, accept: Callable[[Endpoint], Handler]) -> int:
        """Listen on a free port of every address and return the port. There is one listener.

        Args:
            accept: gives each new connection its handler.
        """

        def on_request(request: int) -> None:
            endpoint = self._adopt(self._listener.create_endpoint_from_conn_request(request, True), None)
            endpoint.handler = accept(endpoint)

        self._listener = self._ucxx.UCXListener.create(self.worker, 0, on_request)
        return int(self._listener.port)

    def stop_listening(self) -> None:
        """Take no more connections. Idempotent."""
        self._listener = None

    def _adopt(self, raw: Any, handler: Handler | None) -> Endpoint:
        endpoint = Endpoint(raw)
        endpoint.handler = handler
        self._endpoints[endpoint.handle] = endpoint
        raw.set_close_callback(lambda: self._failures.append((endpoint, "the connection broke")))
        return endpoint

    def disconnect(self, endpoint: Endpoint, why: str) -> None:
        """Close at once, without the peer. Operations end with an error first, then the handler is told."""
        if endpoint.closed:
            return
        endpoint.closed = True
        if endpoint.raw.alive:
            endpoint.raw.remove_close_callback()
        endpoint.raw.close_blocking(1_000_000_000, 1)
        endpoint.raw = None  # it holds the worker, and with its callback a cycle
        self._endpoints.pop(endpoint.handle, None)
        self._settle(endpoint)
        if endpoint.handler is not None:
            endpoint.handler.on_closed(why)

    def _settle(self, endpoint: Endpoint) -> None:
        """Give every operation of a closed endpoint its callback; UCX completes them when it closes the endpoint."""
        limit = time.monotonic() + 1.0
        while endpoint.operations and time.monotonic() < limit:
            self._lib.ucp_worker_progress(self._worker)
            self._reap(list(endpoint.operations))
        if endpoint.operations:  # never seen; a request that UCX does not give back must not be forgotten
            logger.error("kvmarket: %d UCX requests outlive their endpoint", len(endpoint.operations))

    def lanes(self, endpoint: Endpoint) -> tuple[tuple[str, str], ...]:
        """Ask UCX which (transport, device) pairs the endpoint uses."""
        return api.lanes(endpoint.handle)

    # ---- operations

    def send_control(self, endpoint: Endpoint, data: bytes) -> None:
        """Send a control message; a failure shows as the endpoint's end."""
        if endpoint.closed:
            return
        param = api.RequestParam(op_attr_mask=api.OP_FIELD_FLAGS, flags=api.AM_SEND_REPLY | api.AM_SEND_EAGER)
        buffer = c.create_string_buffer(data, len(data))
        request = self._lib.ucp_am_send_nbx(
            endpoint.handle, CONTROL_ID, None, 0, c.addressof(buffer), len(data), c.byref(param)
        )
        self._track(endpoint, request, _ignore, buffer)

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
            source = np.frombuffer(payload.data, np.uint8).ctypes.data
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

    # ---- the thread

    def _run(self, started: Future[None]) -> None:
        try:
            self._open()
        except Exception as error:  # noqa: BLE001 - ucxx has an exception per status; the constructor reports it
            started.set_exception(
                TransportUnavailableError(f"UCX does not start: {error}", scheme="ucx")
                if not isinstance(error, TransportUnavailableError)
                else error
            )
            return
        started.set_result(None)
        try:
            while not self._stopping:
                self._step()
        finally:  # whatever ends the loop, no worker outlives it that could still write somewhere
            self._worker_close()

    def _open(self) -> None:
        self.context = self._make_context()
        self.worker = self._ucxx.UCXWorker(self.context)
        api.pin(self.worker)  # a forked child must never destroy its copy, nor may a collection of garbage
        self.worker.init_blocking_progress_mode()
        self._worker = int(self.worker.handle)
        self._epoll = select.epoll()
        self._epoll.register(self.worker.epoll_file_descriptor, select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._get_param = c.pointer(api.RequestParam(op_attr_mask=0))
        self._callbacks = (api.AmCallback(self._on_control), api.AmCallback(self._on_data))
        for message_id, callback in zip((CONTROL_ID, DATA_ID), self._callbacks, strict=True):
            api.set_am_handler(self._worker, message_id, callback)

    def _make_context(self) -> Any:
        """Make the context; settings that this UCX does not know (of a module it lacks) are left out, and said so."""
        features = (self._ucxx.Feature.WAKEUP, self._ucxx.Feature.AM, self._ucxx.Feature.RMA)
        try:
            return self._ucxx.UCXContext(self.settings, features)
        except Exception:  # noqa: BLE001 - ucxx has an exception per status; the attempts below tell
            for name in list(self.settings):
                try:
                    self._ucxx.UCXContext({name: self.settings[name]}, features)
                except Exception as error:  # noqa: BLE001 - as above
                    logger.debug("kvmarket: UCX does not take UCX_%s: %s", name, error)
                    del self.settings[name]
            return self._ucxx.UCXContext(self.settings, features)

    def _step(self) -> None:
        worked = self._run_commands()
        for _ in range(PROGRESS_MAX):
            if not self._lib.ucp_worker_progress(self._worker):
                break
            worked = True
        if self._operations:
            worked |= self._reap(list(self._operations))
        worked |= self._deliver()
        if self.tickers and time.monotonic() >= self._next_tick:
            now = time.monotonic()
            self._next_tick = now + TICK_S
            for ticker in list(self.tickers):
                ticker(now)
        if not worked and not self._commands:
            self._sleep()

    def _sleep(self) -> None:
        if self._lib.ucp_worker_arm(self._worker) == api.UCS_ERR_BUSY:
            return  # something came meanwhile
        timeout = max(0.001, self._next_tick - time.monotonic()) if self.tickers else None
        for descriptor, _ in self._epoll.poll(timeout):
            if descriptor == self._wake:
                os.eventfd_read(self._wake)

    def _run_commands(self) -> bool:
        ran = False
        while self._commands and not self._stopping:
            self._commands.popleft()()
            ran = True
        return ran

    def _deliver(self) -> bool:
        """Hand on what the callbacks noted."""
        worked = bool(self._inbox or self._failures)
        while self._inbox:
            message_id, handle, header, payload = self._inbox.popleft()
            endpoint = self._endpoints.get(handle)
            if endpoint is None or endpoint.handler is None:
                self.drop(payload)
            elif message_id == DATA_ID:
                endpoint.handler.on_data(header, payload)
            else:
                endpoint.handler.on_control(payload.data if payload.data is not None else b"")
        while self._failures:
            endpoint, why = self._failures.popleft()
            self.disconnect(endpoint, why)
        return worked

    def _on_control(self, *arguments: Any) -> int:
        """UCX's callback: note a control message. One that is too long is noted without its bytes and so refused."""
        _, _, _, data, length, param = arguments
        rendezvous = bool(param.contents.recv_attr & api.AM_RECV_RNDV)
        content = b"" if rendezvous or length > MESSAGE_BYTES_MAX or not length else c.string_at(data, length)
        self._inbox.append((CONTROL_ID, param.contents.reply_ep or 0, b"", Payload(length, content, None)))
        return api.UCS_OK

    def _on_data(self, _: int, header: int, header_length: int, data: int, length: int, param: Any) -> int:
        """UCX's callback: note a data message and keep its descriptor."""
        head = c.string_at(header, header_length) if 0 < header_length <= DATA_HEADER_BYTES else b""
        if param.contents.recv_attr & api.AM_RECV_RNDV:
            payload = Payload(length, None, data)
        else:
            payload = Payload(length, c.string_at(data, length) if length <= MESSAGE_BYTES_MAX else b"", None)
        self._inbox.append((DATA_ID, param.contents.reply_ep or 0, head, payload))
        return api.UCS_INPROGRESS if payload.descriptor is not None else api.UCS_OK

    def _stop(self) -> None:
        for endpoint in list(self._endpoints.values()):
            self.disconnect(endpoint, "closed by this process")
        self._stopping = True

    def _worker_close(self) -> None:
        self._inbox.clear()
        self._epoll.close()
        self._listener = None
        for endpoint in self._endpoints.values():
            endpoint.raw = None
        self._endpoints.clear()
        worker = self.worker
        del self.worker, self.context
        api.unpin(worker)
