"""One thread that owns a UCX worker: progresses it, sleeps on its epoll descriptor when idle, runs everybody's calls.

Whoever does the worker's work has its *turn*, a lock: that thread, or for the moments of a short read the thread that
waits for it, since two hops between threads cost more than such a read (`UcxDriver.submit_and_help`). Nothing else
touches UCX or the state of its connections. Callbacks that UCX makes while it progresses only note what came; handlers
run afterwards, in the driver's loop. An idle driver uses no CPU: it is armed and blocks in ``epoll_wait``.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from concurrent.futures import Future
from ctypes import string_at
from typing import TYPE_CHECKING, Any, TypeVar

from kvmarket.errors import ConnectError, TransportUnavailableError
from kvmarket.transport import ucx_api as api
from kvmarket.transport.ucx_listen import Listener6, is_ipv6
from kvmarket.transport.ucx_open import load_ucxx, make_context
from kvmarket.transport.ucx_operations import CONTROL_ID, DATA_ID, Endpoint, Handler, Operations, Payload
from kvmarket.transport.ucx_wire import DATA_HEADER_BYTES, MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)
T = TypeVar("T")

TICK_S = 0.05
START_S = 30.0
PROGRESS_MAX = 64
"""Progress calls in a row before the loop looks at its other work."""


class UcxDriver(Operations):
    """The worker and its thread. Public methods not named otherwise belong to whoever has the turn.

    Args:
        settings: UCX settings without their prefix, see `kvmarket.transport.ucx_settings`. Afterwards `settings` has
            those that UCX took.
        ipv6: which kind of addresses its lanes have, and so which it listens on and connects to.

    Raises:
        MissingExtraError, TransportUnavailableError: UCX cannot be used in this process.
    """

    def __init__(self, settings: Mapping[str, str], *, ipv6: bool = False) -> None:
        self._ucxx = load_ucxx()
        super().__init__()
        self.settings = dict(settings)
        self._commands: deque[Callable[[], None]] = deque()
        self._inbox: deque[tuple[int, int, bytes, Payload]] = deque()
        self._failures: deque[tuple[Endpoint, str]] = deque()
        self._endpoints: dict[int, Endpoint] = {}
        self.tickers: set[Callable[[float], None]] = set()
        self._next_tick = 0.0
        self.ipv6 = ipv6
        self._stopping = False
        self._turn = threading.Lock()
        self._listener: Any = None
        self._listener6: Listener6 | None = None
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

    def submit_and_help(self, command: Callable[[], None], ended: Callable[[], bool], limit_s: float) -> None:
        """Run `command` soon; if the driver sleeps, do its work here until `ended`, or for `limit_s`. Other threads."""
        self._commands.append(command)
        if not self._turn.acquire(blocking=False):
            os.eventfd_write(self._wake, 1)
            return
        over = False
        try:
            if not self._stopping:
                over = self._help(ended, limit_s)
        finally:
            self._turn.release()
            if not over:
                os.eventfd_write(self._wake, 1)

    def _help(self, ended: Callable[[], bool], limit_s: float) -> bool:
        """Do the driver's work, with the turn; False when there is more of it for the driver's own thread."""
        self._epoll.modify(self._events, 0)  # what arrives meanwhile shall not wake it
        try:
            limit = time.perf_counter() + limit_s
            while not ended() and time.perf_counter() < limit:
                self._work()
        finally:
            self._epoll.modify(self._events, select.EPOLLIN)
        return ended() and not self._commands and self._lib.ucp_worker_arm(self._worker) != api.UCS_ERR_BUSY

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
        """Start connecting to a listener; messages may be sent at once. Failure arrives as `on_closed`.

        Raises:
            ConnectError: the address is not of the kind that this process uses.
        """
        if is_ipv6(address) != self.ipv6:
            kinds = ("IPv4", "IPv6")
            why = f"it has {kinds[not self.ipv6]}, and UCX uses {kinds[self.ipv6]} here: see UCX_TCP_AF_PRIO"
            raise ConnectError(why, scheme="ucx", peer=f"{address}:{port}")
        raw = self._ucxx.UCXEndpoint.create(self.worker, address, port, True)
        return self._adopt(raw, handler)

    def listen(self, accept: Callable[[Endpoint], Handler]) -> int:
        """Listen on a free port of every address and return the port. Once.

        Args:
            accept: gives each new connection its handler.

        Raises:
            UcxError: this host has no such addresses.
        """

        def on_request(request: int) -> None:
            endpoint = self._adopt(self._listener.create_endpoint_from_conn_request(request, True), None)
            endpoint.handler = accept(endpoint)

        self._listener = self._ucxx.UCXListener.create(self.worker, 0, on_request)  # it makes endpoints for the other
        if self.ipv6:
            self._listener6 = Listener6(self._worker, on_request)
            return self._listener6.port
        return int(self._listener.port)

    def stop_listening(self) -> None:
        """Take no more connections. Idempotent."""
        if self._listener6 is not None:
            self._listener6.close()
        self._listener = self._listener6 = None

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

    def lanes(self, endpoint: Endpoint) -> tuple[tuple[str, str], ...]:
        """Ask UCX which (transport, device) pairs the endpoint uses."""
        return api.lanes(endpoint.handle)

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
            with self._turn:
                self._stopping = True
                self._worker_close()

    def _open(self) -> None:
        self.context = make_context(self._ucxx, self.settings)
        self.worker = self._ucxx.UCXWorker(self.context)
        api.pin(self.worker)  # a forked child must never destroy its copy, nor may a collection of garbage
        self.worker.init_blocking_progress_mode()
        self._worker = int(self.worker.handle)
        self._epoll = select.epoll()
        self._events = int(self.worker.epoll_file_descriptor)
        self._epoll.register(self._events, select.EPOLLIN)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._callbacks = (api.AmCallback(self._on_control), api.AmCallback(self._on_data))
        for message_id, callback in zip((CONTROL_ID, DATA_ID), self._callbacks, strict=True):
            api.set_am_handler(self._worker, message_id, callback)

    def _step(self) -> None:
        with self._turn:
            if self._work() or self._commands or self.polls():
                return
            if self._lib.ucp_worker_arm(self._worker) == api.UCS_ERR_BUSY:
                return
            timeout = max(0.001, self._next_tick - time.monotonic()) if self.tickers else None
        for descriptor, _ in self._epoll.poll(timeout):
            if descriptor == self._wake:
                os.eventfd_read(self._wake)

    def polls(self) -> bool:
        """Tell whether to look again at once, without sleeping."""
        return False

    def _work(self) -> bool:
        """Run commands, progress the worker and hand on what came; False when there was nothing of it."""
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
        return worked

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
        content = b"" if rendezvous or length > MESSAGE_BYTES_MAX or not length else string_at(data, length)
        self._inbox.append((CONTROL_ID, param.contents.reply_ep or 0, b"", Payload(length, content, None)))
        return api.UCS_OK

    def _on_data(self, _: int, header: int, header_length: int, data: int, length: int, param: Any) -> int:
        """UCX's callback: note a data message and keep its descriptor."""
        head = string_at(header, header_length) if 0 < header_length <= DATA_HEADER_BYTES else b""
        if param.contents.recv_attr & api.AM_RECV_RNDV:
            payload = Payload(length, None, data)
        else:
            payload = Payload(length, string_at(data, length) if length <= MESSAGE_BYTES_MAX else b"", None)
        self._inbox.append((DATA_ID, param.contents.reply_ep or 0, head, payload))
        return api.UCS_INPROGRESS if payload.descriptor is not None else api.UCS_OK

    def _stop(self) -> None:
        for endpoint in list(self._endpoints.values()):
            self.disconnect(endpoint, "closed by this process")
        self._stopping = True

    def _worker_close(self) -> None:
        self._inbox.clear()
        self._epoll.close()
        self.stop_listening()
        for endpoint in self._endpoints.values():
            endpoint.raw = None
        self._endpoints.clear()
        worker = self.worker
        del self.worker, self.context
        api.unpin(worker)
