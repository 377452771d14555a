"""Reaching owners: one live connection for each, made at whichever of its addresses answers first.

An attempt outlives the caller that began it, up to a limit of its own: a fetch waits no longer than its deadline lets
it, and the next one finds what became of the attempt.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from kvmarket.deadline import Deadline
from kvmarket.errors import PeerGoneError, TransportUnavailableError
from kvmarket.transport.ucx_peer import Peer
from kvmarket.transport.ucx_settings import lanes_text, missing_requirement

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmarket.identity import OwnerInfo
    from kvmarket.transport.ucx_driver import UcxDriver
    from kvmarket.transport.ucx_proof import ProofKey

logger = logging.getLogger(__name__)

Endpoints = tuple[tuple[str, int], ...]

HEAD_START_S = 0.25
"""How long an address is waited for before the next is tried as well (RFC 8305 has the same for the same reason)."""
SLOW_S, SILENT_S = 0.3, 3.0
"""An owner that kept a reader waiting so long in vain is not asked again for so long: a host that is down would cost
every fetch its wait."""
PEERS_KEPT = 256
_LOOK_S = 0.05


class Attempt:
    """One try to reach an owner at all its addresses. For one thread at a time; its connections go on without any."""

    def __init__(
        self, driver: UcxDriver, incarnation: bytes, endpoints: Endpoints, connect_s: float, key: ProofKey
    ) -> None:
        self._driver, self._incarnation, self._connect_s, self._key = driver, incarnation, connect_s, key
        self._untried = list(endpoints)
        self._peers: list[Peer] = []
        self.began = time.monotonic()
        self._start()

    def _start(self) -> None:
        """Begin at the next address, with what is left of the time."""
        address, port = self._untried.pop(0)
        left_s = max(0.0, self.began + self._connect_s - time.monotonic())
        peer = Peer(self._driver, self._incarnation, address, port, connect_s=left_s, key=self._key)
        self._peers.append(peer)
        self._next = time.monotonic() + HEAD_START_S
        self._driver.submit(peer.start)

    def wait(self, deadline: Deadline) -> Peer | None:
        """Return the first that is connected; None when the deadline came before, or all have failed (`over`).

        Raises:
            PeerGoneError: another incarnation answers there.
        """
        while True:
            for peer in self._peers:
                if peer.ready.done() and peer.ready.exception() is None:
                    self._close_others(peer)
                    return peer
            failed = all(peer.ready.done() for peer in self._peers)
            if self._untried and (failed or time.monotonic() >= self._next or deadline.expired):
                self._start()
            elif failed or deadline.expired or not self._driver.alive:
                self._raise_if_gone()
                return None
            else:
                limit_s = min(_LOOK_S, deadline.remaining_s)
                pending = [peer.ready for peer in self._peers if not peer.ready.done()]
                concurrent.futures.wait(pending, limit_s, concurrent.futures.FIRST_COMPLETED)

    @property
    def over(self) -> bool:
        """True when every address has failed, or the driver has stopped."""
        return not self._driver.alive or (not self._untried and all(peer.ready.done() for peer in self._peers))

    def reasons(self) -> str:
        """Say what became of each address."""
        said = []
        for peer in self._peers:
            where = f"{peer.address}:{peer.port}"
            error = peer.ready.exception() if peer.ready.done() else None
            said.append(f"{where}: {error}" if error else f"{where} does not answer yet")
        return "; ".join(said)

    def _raise_if_gone(self) -> None:
        for peer in self._peers:
            if peer.ready.done() and isinstance(error := peer.ready.exception(), PeerGoneError):
                self._close_others(None)
                raise error

    def _close_others(self, chosen: Peer | None) -> None:
        for peer in self._peers:
            if peer is not chosen:
                self._driver.submit(partial(peer.close, "another address of the owner's was sooner"))


class PeerTable:
    """The live connections of one transport, one for each owner's incarnation. Thread-safe.

    Args:
        driver: returns the transport's driver, started.
        require: lanes without which a connection is refused.
        connect_s: how long an attempt to connect may take.
        key: of the secret that both sides must prove to have, if there is one.
    """

    def __init__(self, driver: Callable[[], UcxDriver], require: str, connect_s: float, key: ProofKey) -> None:
        self._driver, self._require, self._connect_s, self._key = driver, require, connect_s, key
        self._lock = threading.Lock()
        self._gates: dict[bytes, threading.Lock] = {}
        self._peers: dict[bytes, Peer] = {}
        self._attempts: dict[bytes, Attempt] = {}
        self._silent: dict[bytes, float] = {}

    def peer(self, owner: OwnerInfo, endpoints: Endpoints, deadline: Deadline) -> Peer:
        """Return a live connection to an owner, shared by all its regions.

        Raises:
            TransportUnavailableError: it does not answer in time, or its lanes are not those required.
            PeerGoneError: another incarnation answers.
        """
        key = owner.incarnation
        with self._lock:
            self._prune()
            gate = self._gates.setdefault(key, threading.Lock())
        if not gate.acquire(timeout=deadline.remaining_s):
            self._refuse(owner, "it is still being connected to")
        try:
            peer = self._peers.get(key)
            if peer is None or peer.dead:
                peer = self._peers[key] = self._connect(owner, endpoints, deadline)
            return peer
        finally:
            gate.release()

    def _connect(self, owner: OwnerInfo, endpoints: Endpoints, deadline: Deadline) -> Peer:
        key = owner.incarnation
        attempt = self._attempts.pop(key, None)
        waits = attempt is None or attempt.over
        if attempt is None:
            if time.monotonic() < self._silent.get(key, 0.0):
                self._refuse(owner, "it did not answer a moment ago")
            attempt = Attempt(self._driver(), key, endpoints, self._connect_s, self._key)
        peer = attempt.wait(deadline if waits else Deadline(0.0))
        if peer is not None:
            return self._checked(owner, peer)
        if attempt.over:
            if time.monotonic() - attempt.began > SLOW_S:
                self._silent[key] = time.monotonic() + SILENT_S
        else:  # who comes next looks what became of it, and does not wait for it again
            self._attempts[key] = attempt
        self._refuse(owner, attempt.reasons())
        return None

    def _checked(self, owner: OwnerInfo, peer: Peer) -> Peer:
        if missing := missing_requirement(self._require, peer.lanes):
            self._driver().submit(partial(peer.close, "lanes refused"))
            self._refuse(owner, missing)
        self._silent.pop(owner.incarnation, None)
        logger.debug("kvmarket: UCX lanes to %s: %s", owner, lanes_text(peer.lanes))
        return peer

    def _refuse(self, owner: OwnerInfo, why: str) -> NoReturn:
        raise TransportUnavailableError(why, scheme="ucx", peer=str(owner))

    def _prune(self) -> None:
        """Forget the connections that are gone, when there are many."""
        if len(self._gates) < PEERS_KEPT:
            return
        for key in list(self._gates):
            peer = self._peers.get(key)
            if (peer is None or peer.dead) and not self._gates[key].locked():
                del self._gates[key]
                self._peers.pop(key, None)
                self._attempts.pop(key, None)
                self._silent.pop(key, None)
