"""The owner's side of the UCX transport: a listener, and one session per reader that connected.

A session is a plain state machine over messages (`ServerSession.on_control`); its only effects are calls of the driver.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.errors import TransportUnavailableError
from kvmarket.region.generations import memory_fence, readable
from kvmarket.transport import ucx_api as api
from kvmarket.transport.ucx_iov import PIECES_MAX, local_iov
from kvmarket.transport.ucx_listen import host_addresses, is_ipv6
from kvmarket.transport.ucx_operations import RENDEZVOUS_BYTES
from kvmarket.transport.ucx_proof import ProofKey, fresh_nonce, same
from kvmarket.transport.ucx_wire import (
    VERSION_MAX,
    VERSION_MIN,
    VERSION_PROOF,
    VERSION_WHOLE,
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
    common_version,
    decode,
    encode,
    encode_data_header,
)

if TYPE_CHECKING:
    from kvmarket.region.pages import PagedMemory
    from kvmarket.region.region import LentRegion
    from kvmarket.transport.ucx_driver import UcxDriver
    from kvmarket.transport.ucx_operations import Endpoint, Payload

logger = logging.getLogger(__name__)

SESSIONS_MAX = 1024
READS_MAX = 64
"""Reads of one reader that may be under way at once."""
READ_BYTES_MAX = 64 << 20
"""Bytes of one read, unless a single page has more."""
HELLO_S = 5.0
"""A connection that does not introduce itself within this is closed."""
CALL_S = 5.0


class RegionKeys:
    """Registrations of one region for one-sided reads, made when the first reader asks."""

    def __init__(self, context: int, region: LentRegion) -> None:
        self._context = context
        self._handles: list[int] = []
        self.memories = [self._register(array) for array in region.pages.memories]
        self.table = [self._register(region.generations.memory.array)]

    def _register(self, array: np.ndarray) -> tuple[int, int, bytes]:
        address, nbytes = array.ctypes.data, array.nbytes
        handle = api.map_memory(self._context, address, nbytes)
        self._handles.append(handle)
        return address, nbytes, api.pack_rkey(self._context, handle)

    def close(self) -> None:
        """Give the registrations back."""
        for handle in self._handles:
            api.libucp().ucp_mem_unmap(self._context, handle)
        self._handles.clear()


class UcxServer:
    """Serves the regions of one owner. Every reader must know the owner's incarnation, which only the registry tells.

    Args:
        driver: whose worker listens; the server's state belongs to the driver's thread.
        incarnation: 16 bytes.
        addresses: addresses to announce; default: this host's, see `host_addresses`.
        key: of the secret that readers must prove to have; without one they need not.

    Raises:
        TransportUnavailableError: this host has no addresses of the kind that the driver uses.
    """

    session_type: type[ServerSession]

    def __init__(
        self, driver: UcxDriver, incarnation: bytes, addresses: tuple[str, ...] = (), key: ProofKey | None = None
    ) -> None:
        self.driver, self.incarnation, self.key = driver, incarnation, key or ProofKey()
        self.regions: dict[int, LentRegion] = {}
        self.sessions: set[ServerSession] = set()
        self._keys: dict[int, RegionKeys] = {}
        try:
            port = driver.call(lambda: driver.listen(self._accept), CALL_S)
        except api.UcxError as error:
            raise TransportUnavailableError(f"cannot listen: {error}", scheme="ucx") from error
        chosen = [address for address in addresses if is_ipv6(address) == driver.ipv6]
        if len(chosen) < len(addresses):
            logger.warning("kvmarket: of %s only %s are announced: UCX uses one kind of addresses", addresses, chosen)
        self.endpoints = tuple((address, port) for address in chosen or host_addresses(ipv6=driver.ipv6))

    def add(self, region: LentRegion) -> None:
        """Serve a region from now on. Any thread."""
        self.regions[region.region_id] = region

    def keys(self, region: LentRegion) -> RegionKeys:
        """Return a region's registrations, making them on first use."""
        if region.region_id not in self._keys:
            self._keys[region.region_id] = RegionKeys(int(self.driver.context.handle), region)
        return self._keys[region.region_id]

    def _accept(self, endpoint: Endpoint) -> ServerSession:
        session = self.session_type(self, endpoint)
        self.sessions.add(session)
        self.driver.tickers.add(session.tick)
        if len(self.sessions) > SESSIONS_MAX:
            self.driver.submit(lambda: self.driver.disconnect(endpoint, "too many readers"))
        return session

    def close(self) -> None:
        """Stop listening and drop every reader; no region's memory is touched after it. Other threads; idempotent."""
        if self.driver.alive:
            self.driver.call(self._close, CALL_S)

    def _close(self) -> None:
        self.driver.stop_listening()
        self.regions.clear()
        for session in list(self.sessions):
            self.driver.disconnect(session.endpoint, "the owner closed")
        for keys in self._keys.values():
            keys.close()
        self._keys.clear()


class ServerSession:
    """One reader's connection."""

    def __init__(self, server: UcxServer, endpoint: Endpoint) -> None:
        self._server, self._driver, self.endpoint = server, server.driver, endpoint
        self._version = 0
        self._challenge: tuple[bytes, int] | None = None
        """What the reader was asked, and the version to speak once it has answered."""
        self._reads = 0
        self._hello_until = time.monotonic() + HELLO_S

    def tick(self, now: float) -> None:
        """Close a connection that never introduced itself."""
        if now > self._hello_until:
            self._driver.disconnect(self.endpoint, "no HELLO came")

    def on_control(self, data: bytes) -> None:
        """Answer one message; anything that is not one ends the session."""
        try:
            message = decode(data)
        except WireError as error:
            logger.debug("kvmarket: a reader sent %s", error)
            self._driver.disconnect(self.endpoint, str(error))
            return
        if isinstance(message, Hello):
            self._hello(message)
        elif isinstance(message, Proof):
            self._proof(message)
        elif not self._version:
            self._driver.disconnect(self.endpoint, "a message came before HELLO")
        elif isinstance(message, Read):
            self._read(message)
        elif isinstance(message, Describe):
            self._describe(message)
        elif isinstance(message, Ping):
            self._send(Pong())
        else:
            self._driver.disconnect(self.endpoint, "a message came that only owners send")

    def on_data(self, header: bytes, payload: Payload) -> None:
        """Readers send no data."""
        del header
        self._driver.drop(payload)
        self._driver.disconnect(self.endpoint, "a reader sent data")

    def on_closed(self, why: str) -> None:
        """Forget the reader."""
        logger.debug("kvmarket: a reader is gone: %s", why)
        self._server.sessions.discard(self)
        self._driver.tickers.discard(self.tick)

    def _send(self, message: Message) -> None:
        self._driver.send_control(self.endpoint, encode(message))

    def _hello(self, hello: Hello) -> None:
        version = common_version(hello)
        if version is None:
            wanted = f"{hello.version_min} to {hello.version_max}"
            self._send(Refused("version", f"this owner speaks {VERSION_MIN} to {VERSION_MAX}, not {wanted}"))
        elif hello.incarnation != self._server.incarnation:
            self._send(Refused("incarnation", "another incarnation listens here"))
        elif not self._server.key or self._version:  # who is known already need not prove itself again
            self._welcome(version)
        elif version < VERSION_PROOF:
            why = f"this owner serves who proves to have its secret, which takes version {VERSION_PROOF}"
            self._send(Refused("secret", why))
        else:
            self._challenge = fresh_nonce(), version
            self._send(Challenge(self._challenge[0]))

    def _proof(self, proof: Proof) -> None:
        """Judge a proof: one for each challenge, so that nothing can be tried or replayed."""
        if self._challenge is None:
            self._driver.disconnect(self.endpoint, "a proof came that nobody asked for")
            return
        (nonce, version), self._challenge = self._challenge, None
        key, asked = self._server.key, (self._server.incarnation, nonce, proof.nonce)
        if not same(proof.proof, key.of_reader(*asked)):
            self._send(Refused("secret", "this owner has another secret"))
            return
        self._send(Proven(key.of_owner(*asked)))
        self._welcome(version)

    def _welcome(self, version: int) -> None:
        self._version = version
        self._driver.tickers.discard(self.tick)
        self._send(Welcome(version))

    def _describe(self, ask: Describe) -> None:
        region = self._server.regions.get(ask.region)
        if region is None:
            self._send(Refused("region", f"region {ask.region} is not lent here", ask.transfer))
            return
        probe = region.generations.probe
        if not ask.keys:
            self._send(Region(ask.transfer, probe, [], []))
            return
        try:
            keys = self._server.keys(region)
        except api.UcxError as error:
            self._send(Refused("keys", f"the memory cannot be registered: {error}", ask.transfer))
            return
        self._send(Region(ask.transfer, probe, keys.memories, keys.table))

    def _read(self, ask: Read) -> None:
        region = self._server.regions.get(ask.region)
        if region is None:
            self._send(Refused("region", f"region {ask.region} is not lent here", ask.transfer))
            return
        pages, generations = ask.page_numbers, ask.page_generations
        layout = region.layout
        nbytes, pieces = len(pages) * layout.page_bytes, len(pages) * len(layout.segments)
        too_large = len(pages) > 1 and (nbytes > READ_BYTES_MAX or pieces > PIECES_MAX)
        if int(pages.max()) >= layout.num_pages or too_large:
            self._send(Refused("read", f"{len(pages)} pages are too many, or not of this region", ask.transfer))
        elif self._reads >= READS_MAX:
            self._send(Refused("busy", f"{READS_MAX} reads are under way", ask.transfer))
        else:
            self._serve(region, ask.transfer, pages, generations)

    def _serve(self, region: LentRegion, transfer: int, pages: np.ndarray, generations: np.ndarray) -> None:
        """Check, send in place, check again."""
        values, leases = region.generations.values, region.leases
        lease = leases.hold(pages.tolist()) if leases is not None else 0
        stale = np.flatnonzero(~readable(values, pages, generations))
        if len(stale):
            if leases is not None:
                leases.release(lease)
            self._send(Trailer(transfer, stale.tolist(), []))
            return
        memory_fence()  # the bytes are read after the generations
        if len(pages) * region.layout.page_bytes < RENDEZVOUS_BYTES and self._version >= VERSION_WHOLE:
            self._serve_short(region, transfer, pages, generations)
            return
        self._reads += 1

        def sent(status: int) -> None:
            self._reads -= 1
            if leases is not None:
                leases.release(lease)
            if status != api.UCS_OK:
                return  # the endpoint is failing; its end is reported by UCX
            memory_fence()  # and the generations again after the bytes
            self._send(Trailer(transfer, [], np.flatnonzero(values[pages] != generations).tolist()))

        self._driver.send_data(self.endpoint, encode_data_header(transfer), local_iov(region.pages, pages), sent)

    def _serve_short(self, region: LentRegion, transfer: int, pages: np.ndarray, generations: np.ndarray) -> None:
        """Copy, check again, and send bytes and verdict as one message; UCX would copy such bytes, too."""
        data = bytes_of(region.pages, pages)
        memory_fence()  # the generations again after the bytes
        torn = np.flatnonzero(region.generations.values[pages] != generations).tolist()
        self._driver.send_short(self.endpoint, encode_data_header(transfer, whole=not torn), data)
        if torn:
            self._send(Trailer(transfer, [], torn))


UcxServer.session_type = ServerSession


def bytes_of(memory: PagedMemory, pages: np.ndarray) -> bytes:
    """Return a copy of the bytes of pages, in their order."""
    return b"".join([view.data for page in pages.tolist() for view in memory.views(page)])
