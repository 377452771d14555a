"""What lies between this process and one UCX address: who answers there, over which lanes and how soon.

For ``kvmarket doctor``. It introduces itself as a reader does. An owner whose incarnation is not known refuses, and
that refusal is answer enough: the connection it came through has the lanes that reads would use.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvmarket.errors import ConnectError, TransportError
from kvmarket.transport.ucx_wire import (
    VERSION_MAX,
    VERSION_MIN,
    Challenge,
    Hello,
    Refused,
    Welcome,
    WireError,
    decode,
    encode,
)

if TYPE_CHECKING:
    from kvmarket.deadline import Deadline
    from kvmarket.transport.ucx_driver import UcxDriver
    from kvmarket.transport.ucx_operations import Endpoint, Payload

ROUND_TRIPS = 20
UNKNOWN = bytes(16)
"""The incarnation of nobody."""
_EXPLAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Who answered at an address.

    Attributes:
        address: that answered, a number.
        port: its port.
        lanes: (transport, device) pairs of the connection.
        connect_s: seconds until the first answer.
        round_trip_s: seconds from a question to its answer afterwards, the median.
        refusal: the owner's words, or empty where it accepted the incarnation.
        secret: it serves only who proves to have its secret, which is not tried here.
    """

    address: str
    port: int
    lanes: tuple[tuple[str, str], ...]
    connect_s: float
    round_trip_s: float
    refusal: str
    secret: bool


def probe(driver: UcxDriver, host: str, port: int, deadline: Deadline, incarnation: bytes = UNKNOWN) -> Answer:
    """Connect to whoever listens at a host's port and ask who it is, by the first of the host's addresses that answers.

    Raises:
        ConnectError: no kvmarket owner answers there in time; the message says what was found instead.
    """
    reasons = []
    addresses = resolve(host, port, deadline)
    for number, address in enumerate(addresses):
        asking = _Asking(driver, address, port, incarnation)
        driver.submit(asking.start)
        wait_s = max(0.0, deadline.remaining_s - _EXPLAIN_S) / (len(addresses) - number)
        try:
            return asking.answer.result(wait_s)
        except FutureTimeoutError:
            reasons.append(f"{address}:{port} {_explain(address, port, deadline, 'no answer over UCX')}")
        except ConnectError as error:
            reasons.append(f"{address}:{port} {_explain(address, port, deadline, str(error))}")
        finally:
            driver.submit(partial(asking.close, "asked"))
    raise ConnectError("; ".join(reasons), scheme="ucx", peer=f"{host}:{port}")


def resolve(host: str, port: int, deadline: Deadline) -> list[str]:
    """Return a host's addresses.

    Raises:
        ConnectError: it has none, or the resolver does not answer in time.
    """
    found: Future[list[str]] = Future()

    def ask() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.set_result(list(dict.fromkeys(str(entry[4][0]) for entry in entries)))
        except (OSError, ValueError) as error:
            found.set_exception(ConnectError(f"unknown host {host!r}: {error}", scheme="ucx", peer=host))

    threading.Thread(target=ask, name="kvmarket-resolve", daemon=True).start()  # it cannot be interrupted
    try:
        return found.result(deadline.remaining_s)
    except FutureTimeoutError:
        raise ConnectError(f"the resolver does not answer for {host!r}", scheme="ucx", peer=host) from None


def is_local(address: str) -> bool:
    """Tell whether an address is one of this network namespace's own."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        try:
            trial.bind((address, 0))
        except OSError:
            return False
    return True


def _explain(address: str, port: int, deadline: Deadline, why: str) -> str:
    """Say what plain TCP finds where UCX found nobody."""
    try:
        socket.create_connection((address, port), timeout=max(0.05, min(_EXPLAIN_S, deadline.remaining_s))).close()
    except ConnectionRefusedError:
        return "refuses connections: nothing listens there"
    except TimeoutError:
        return "does not answer: the host is down, or a firewall drops what is sent to it"
    except OSError as error:
        return f"cannot be reached: {error.strerror}"
    return f"takes connections but is no kvmarket owner, or one that is stopped ({why})"


class _Asking:
    """One connection on which a few HELLOs are answered. On the driver's thread; `answer` is for others."""

    def __init__(self, driver: UcxDriver, address: str, port: int, incarnation: bytes) -> None:
        self._driver, self._address, self._port = driver, address, port
        self._hello = encode(Hello(VERSION_MIN, VERSION_MAX, incarnation))
        self._endpoint: Endpoint | None = None
        self._sent, self._connect_s = 0.0, 0.0
        self._seconds: list[float] = []
        self.answer: Future[Answer] = Future()

    def start(self) -> None:
        self._sent = time.perf_counter()
        try:
            self._endpoint = self._driver.connect(self._address, self._port, self)
        except Exception as error:  # noqa: BLE001 - ucxx has an exception per status; all mean the same here
            self.on_closed(f"cannot connect: {error}")
            return
        self._ask()

    def _ask(self) -> None:
        if self._endpoint is not None:
            self._driver.send_control(self._endpoint, self._hello)

    def close(self, why: str) -> None:
        if self._endpoint is not None:
            self._driver.disconnect(self._endpoint, why)

    def on_control(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            message = decode(data)
        except WireError as error:
            self._fail(f"it sent {error}")
            return
        if not isinstance(message, Welcome | Refused | Challenge):
            self._fail("it sent what no owner sends to a reader that it does not know")
        elif self._endpoint is not None and not self.answer.done():
            if self._connect_s:
                self._seconds.append(now - self._sent)
            else:
                self._connect_s = now - self._sent
            if len(self._seconds) < ROUND_TRIPS:
                self._sent = time.perf_counter()
                self._ask()
                return
            refusal = message.text if isinstance(message, Refused) else ""
            lanes, median = self._driver.lanes(self._endpoint), statistics.median(self._seconds)
            secret = isinstance(message, Challenge)
            self.answer.set_result(Answer(self._address, self._port, lanes, self._connect_s, median, refusal, secret))

    def on_data(self, header: bytes, payload: Payload) -> None:
        del header
        self._driver.drop(payload)
        self._fail("it sent data that nobody asked for")

    def on_closed(self, why: str) -> None:
        self._fail(why)

    def _fail(self, why: str) -> None:
        if not self.answer.done():
            error: TransportError = ConnectError(why, scheme="ucx", peer=f"{self._address}:{self._port}")
            self.answer.set_exception(error)
