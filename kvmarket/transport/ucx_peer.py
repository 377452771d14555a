"""The reader's side of one connection to an owner: handshake, reads in flight, and the watch over a silent peer.

Everything here runs with the driver's turn. A `Transfer` ends exactly once, and only when UCX no longer writes to its
memory: that is the promise `Connection.read` rests on.
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmarket.errors import ConnectError, PeerGoneError, TransportError, TransportUnavailableError
from kvmarket.transport import ucx_api as api
from kvmarket.transport.ucx_driver import TICK_S, UcxDriver
from kvmarket.transport.ucx_proof import ProofKey, fresh_nonce, same
from kvmarket.transport.ucx_wire import (
    VERSION_MAX,
    VERSION_MIN,
    Challenge,
    Describe,
    Hello,
    Message,
    Ping,
    Pong,
    Proof,
    Proven,
    Read,
    Refused,
    Region,
    Trailer,
    Welcome,
    WireError,
    decode,
    decode_data_header,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from kvmarket.transport.ucx_operations import Endpoint, Payload
    from kvmarket.transport.ucx_staging import StagingBuffer

CONNECT_S = 3.0
HEARTBEAT_S = 0.9
"""A peer that owes an answer and is silent this long, in ticks this process really had, is given up."""
_SILENT_TICKS_MAX = round(HEARTBEAT_S / TICK_S)
_PING_AFTER_TICKS = 4


@dataclass(slots=True)
class GroupResult:
    """How the read of a group of pages ended. `error` is empty when every page is good, stale or torn."""

    stale: list[int] = field(default_factory=list)
    torn: list[int] = field(default_factory=list)
    error: str = ""


class Transfer:
    """Operations under way that write to one group's memory.

    Args:
        finish: called once with the result when nothing writes any more.
    """

    def __init__(self, number: int, finish: Callable[[GroupResult], None]) -> None:
        self.number, self._finish = number, finish
        self.ended = False
        self.writing = 0
        """Operations that UCX has not completed and that write to local memory."""
        self.staged: StagingBuffer | None = None
        """Where the bytes are until they are copied to their pages, packed in their order; None: in their pages."""
        self.result: GroupResult | None = None

    def start(self) -> None:
        """Begin, where the transfer begins by itself."""

    def end(self, result: GroupResult) -> None:
        """End as soon as nothing writes any more; the first result counts, an error over all others."""
        if self.result is None or (result.error and not self.result.error):
            self.result = result
        self.settle()

    def settle(self) -> None:
        """Report the end if it has come."""
        if self.result is not None and not self.writing and not self.ended:
            self.ended = True
            self._finish(self.result)


class TwoSidedRead(Transfer):
    """The owner sends one data message, then its verdict on every page."""

    def __init__(
        self, number: int, iov: np.ndarray, finish: Callable[[GroupResult], None], staged: StagingBuffer | None = None
    ) -> None:
        super().__init__(number, finish)
        self.iov, self.staged = iov, staged
        self.nbytes = sum(iov[:, 1].tolist())
        self.arrived = False
        self.trailer: Trailer | None = None

    def judge(self) -> None:
        """End when both the bytes and the verdict are here; a verdict of stale pages comes without bytes."""
        if self.trailer is not None and (self.arrived or self.trailer.stale):
            self.end(GroupResult(list(self.trailer.stale), list(self.trailer.torn)))


class Peer:
    """One owner's incarnation, reached through one endpoint. Create, then `start` with the driver's turn.

    Args:
        driver: whose worker connects.
        incarnation: 16 bytes that the owner must know as its own.
        address: of the owner.
        port: of the owner.
        connect_s: a connection that has not been made after so long is given up. The heartbeat begins afterwards: until
            then there may be nobody to answer, as RDMA connections and loaded machines take their time.
        key: of the secret that both sides must prove to have; without one, owners that demand it are refused.
    """

    def __init__(
        self,
        driver: UcxDriver,
        incarnation: bytes,
        address: str,
        port: int,
        *,
        connect_s: float = CONNECT_S,
        key: ProofKey | None = None,
    ) -> None:
        self.driver, self._incarnation, self._key = driver, incarnation, key or ProofKey()
        self._expected = b""
        """The proof that the owner owes."""
        self._proven = not self._key
        self.address, self.port = address, port
        self.endpoint: Endpoint | None = None
        self.lanes: tuple[tuple[str, str], ...] = ()
        self.ready: Future[None] = Future()
        self.dead = ""
        self.rkeys: list[int] = []
        self._numbers = itertools.count(1)
        self._transfers: dict[int, Transfer] = {}
        self._describes: dict[int, Future[Region]] = {}
        self._silent_ticks = 0
        self._connect_s = connect_s
        self._connect_until = 0.0

    def start(self) -> None:
        """Connect and introduce this process; `ready` tells when that is done or has failed."""
        self._connect_until = time.monotonic() + self._connect_s
        try:
            self.endpoint = self.driver.connect(self.address, self.port, self)
        except Exception as error:  # noqa: BLE001 - ucxx has an exception per status; all mean the same here
            self.on_closed(f"cannot connect: {error}")
            return
        self._send(Hello(VERSION_MIN, VERSION_MAX, self._incarnation))
        self._watch()

    def close(self, why: str) -> None:
        """End the connection now; every transfer ends before this returns."""
        if self.endpoint is not None:
            self.driver.disconnect(self.endpoint, why)

    # ---- what a reader asks for

    def describe(self, region: int, answer: Future[Region], *, keys: bool) -> None:
        """Ask the owner about a region."""
        if self.dead:
            answer.set_exception(self._gone())
            return
        number = next(self._numbers)
        self._describes[number] = answer
        self._send(Describe(number, region, keys))
        self._watch()

    def read(
        self,
        region: int,
        pages: np.ndarray,
        generations: np.ndarray,
        iov: np.ndarray,
        finish: Callable[[GroupResult], None],
        *,
        staged: StagingBuffer | None = None,
    ) -> Transfer:
        """Ask for a group of pages, to be put into `iov`, which lies in `staged` if that is not None."""
        transfer = TwoSidedRead(next(self._numbers), iov, finish, staged)
        if self._enter(transfer):
            self._send(Read.of(transfer.number, region, pages, generations))
        return transfer

    def one_sided(self, make: Callable[[int], Transfer]) -> Transfer:
        """Start a transfer of another kind, so that it is watched and ends with the peer."""
        transfer = make(next(self._numbers))
        if self._enter(transfer):
            transfer.start()
        return transfer

    def abandon(self, transfer: Transfer) -> None:
        """Stop waiting for a transfer. It ends at once unless UCX is writing; then it ends with its operations."""
        transfer.end(GroupResult(error="abandoned"))

    def forget(self, transfer: Transfer) -> None:
        """Take an ended transfer off the watch."""
        self._transfers.pop(transfer.number, None)
        self._unwatch()

    def _enter(self, transfer: Transfer) -> bool:
        if self.dead:
            transfer.end(GroupResult(error=self.dead))
            return False
        self._transfers[transfer.number] = transfer
        self._watch()
        return True

    # ---- what the owner says

    def on_control(self, data: bytes) -> None:
        """Take one message of the owner's."""
        self.heard()
        try:
            message = decode(data)
        except WireError as error:
            self.close(f"the owner sent {error}")
            return
        if isinstance(message, Welcome):
            self._welcome(message)
        elif isinstance(message, Refused):
            self._refused(message)
        elif isinstance(message, Challenge):
            self._challenged(message)
        elif isinstance(message, Proven):
            self._proven = bool(self._expected) and same(message.proof, self._expected)
        elif isinstance(message, Region):
            answer = self._describes.pop(message.transfer, None)
            if answer is not None:
                answer.set_result(message)
        elif isinstance(message, Trailer):
            transfer = self._transfers.get(message.transfer)
            if isinstance(transfer, TwoSidedRead):
                transfer.trailer = message
                transfer.judge()
        elif not isinstance(message, Pong):
            self.close("the owner sent a message that only readers send")
        self._unwatch()

    def on_data(self, header: bytes, payload: Payload) -> None:
        """Put the bytes of a read in place, or drop them when nobody waits for them any more."""
        self.heard()
        number, whole = decode_data_header(header) or (0, False)
        transfer = self._transfers.get(number)
        if not isinstance(transfer, TwoSidedRead) or transfer.result is not None or self.endpoint is None:
            self.driver.drop(payload)
            return
        if payload.length != transfer.nbytes or transfer.arrived or transfer.writing:
            self.driver.drop(payload)
            self.close(f"the owner sent {payload.length} bytes where {transfer.nbytes} were asked for")
            return

        def done(status: int) -> None:
            self.heard()
            transfer.writing -= 1
            if status == api.UCS_OK:
                transfer.arrived = True
                if whole:
                    transfer.trailer = Trailer(number, [], [])
                transfer.judge()
                transfer.settle()
            else:
                transfer.end(GroupResult(error=api.status_text(status)))

        transfer.writing += 1
        memory = transfer.staged.memory if transfer.staged is not None else 0
        self.driver.receive(self.endpoint, payload, transfer.iov, done, memory)

    def on_closed(self, why: str) -> None:
        """End everything: the connection is gone, and with it every operation."""
        self.dead = self.dead or why
        for rkey in self.rkeys:
            api.libucp().ucp_rkey_destroy(rkey)
        self.rkeys.clear()
        self.driver.tickers.discard(self.tick)
        if not self.ready.done():
            self.ready.set_exception(ConnectError(why, scheme="ucx", peer=f"{self.address}:{self.port}"))
        for answer in self._describes.values():
            answer.set_exception(self._gone())
        self._describes.clear()
        for transfer in list(self._transfers.values()):
            transfer.end(GroupResult(error=why))

    def _gone(self) -> TransportError:
        return PeerGoneError(self.dead, scheme="ucx", peer=f"{self.address}:{self.port}")

    def _welcome(self, message: Welcome) -> None:
        if not VERSION_MIN <= message.version <= VERSION_MAX:
            self.close(f"the owner chose version {message.version}, which was not offered")
        elif not self._proven:
            self._give_up("the owner did not prove that it has the secret of this process")
        elif self.endpoint is not None and not self.ready.done():
            self.lanes = self.driver.lanes(self.endpoint)
            self._silent_ticks = 0
            self.ready.set_result(None)

    def _challenged(self, message: Challenge) -> None:
        """Prove that this process has the secret, once."""
        if not self._key:
            self._give_up("the owner demands a secret (KVMARKET_SECRET_FILE), and this process has none")
        elif self._expected:
            self.close("the owner asked for a second proof")
        else:
            nonce = fresh_nonce()
            asked = self._incarnation, message.nonce, nonce
            self._expected = self._key.of_owner(*asked)
            self._send(Proof(nonce, self._key.of_reader(*asked)))

    def _give_up(self, why: str, kind: type[TransportError] = TransportUnavailableError) -> None:
        """End a connection that is not made yet, and say why."""
        if not self.ready.done():
            self.ready.set_exception(kind(why, scheme="ucx", peer=self.address))
        self.close(why)

    def _refused(self, message: Refused) -> None:
        why = f"the owner refused: {message.text}"
        if answer := self._describes.pop(message.transfer, None):
            answer.set_exception(TransportUnavailableError(why, scheme="ucx", peer=self.address))
        elif transfer := self._transfers.get(message.transfer):
            transfer.end(GroupResult(error=why))
        elif not self.ready.done():
            self._give_up(why, PeerGoneError if message.code == "incarnation" else TransportUnavailableError)

    # ---- the watch

    def heard(self) -> None:
        """Note a sign of life."""
        self._silent_ticks = 0

    def tick(self, now: float) -> None:
        """Every 50 ms while an answer is owed. Counted in ticks, so that a pause of this process blames nobody."""
        if not self.ready.done():
            if now > self._connect_until:
                self.close(f"it does not answer: no connection within {self._connect_s:.2g} s")
            return
        self._silent_ticks += 1
        if self._silent_ticks > _SILENT_TICKS_MAX:
            self.close(f"no answer for {HEARTBEAT_S:g} s")
        elif self._silent_ticks >= _PING_AFTER_TICKS:
            self._send(Ping())

    def _watch(self) -> None:
        if self.tick not in self.driver.tickers:
            self._silent_ticks = 0
            self.driver.tickers.add(self.tick)

    def _unwatch(self) -> None:
        if self.ready.done() and not self._transfers and not self._describes:
            self.driver.tickers.discard(self.tick)

    def _send(self, message: Message) -> None:
        if self.endpoint is not None:
            self.driver.send_control(self.endpoint, encode(message))
