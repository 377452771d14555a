"""Between hosts, and between processes that cannot map each other's memory: UCX, over whatever lanes it finds.

An owner listens and serves the regions it lends; a reader connects by the addresses in the region's descriptor. Two
ways to read give the same reports: *one-sided*, where lanes can read remote memory without the owner's CPU (RDMA, CMA),
and *two-sided*, where the owner sends pages in place as one scatter/gather message.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvmarket.deadline import Deadline
from kvmarket.errors import ConnectError, InvalidInputError, PeerGoneError, TransferError, TransportUnavailableError
from kvmarket.report import TransferReport
from kvmarket.transport.base import Capabilities, Connection, OnGroup, ReadRequest, ServingTransport
from kvmarket.transport.ucx_api import version as ucx_version
from kvmarket.transport.ucx_budget import ByteBudget
from kvmarket.transport.ucx_cma import CmaRegion
from kvmarket.transport.ucx_driver import UcxDriver
from kvmarket.transport.ucx_iov import local_iov
from kvmarket.transport.ucx_peer import GroupResult, Peer, Transfer
from kvmarket.transport.ucx_read import GroupedRead
from kvmarket.transport.ucx_rma import OneSidedRead, RemoteGroup, RemoteRegion
from kvmarket.transport.ucx_server import UcxServer
from kvmarket.transport.ucx_settings import lanes_text, missing_requirement, reads_one_sided, ucx_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from kvmarket.identity import OwnerInfo
    from kvmarket.region.descriptor import RegionDescriptor
    from kvmarket.region.pages import PagedMemory
    from kvmarket.region.region import LentRegion
    from kvmarket.transport.ucx_wire import Region

logger = logging.getLogger(__name__)

CONNECT_S = 1.0
"""For all addresses of an owner together; each has an equal share of what is left."""
SLOW_S, SILENT_S = 0.3, 3.0
"""An owner that kept a reader waiting so long in vain is not asked again for so long: a host that is down would cost
every fetch its wait."""
PEERS_KEPT = 256
PEER_BYTES_MAX = 32 << 20
ALL_BYTES_MAX = 128 << 20


class UcxTransport(ServingTransport):
    """UCX for one process: one worker, driven by one thread, that reads from peers and serves this process's regions.

    Args:
        environ: the environment, in which ``UCX_...`` settings of the user win over ours.
        require: refuse connections without ``rdma``, ``shm`` or ``one_sided`` lanes; empty takes any.
        addresses: addresses to announce as an owner; default: this host's.
        one_sided: False makes every read two-sided.
        direct: False leaves one-sided reads over CMA lanes to UCX.
        cma_readers: threads that share a large read over CMA lanes. More than one is safe, but where it was measured
            (docs/BENCHMARKS.md) it took longer and cost more CPU: each part has its own looks at the generations.
    """

    scheme = "ucx"
    capabilities = Capabilities(one_sided=True, memory=frozenset({"host"}), cross_process=True, cross_host=True)

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        require: str = "",
        addresses: tuple[str, ...] = (),
        one_sided: bool = True,
        direct: bool = True,
        cma_readers: int = 1,
    ) -> None:
        self.settings = ucx_settings(environ)
        self._require, self._addresses, self._one_sided = require, addresses, one_sided
        self._direct, self.cma_readers = direct, cma_readers
        self._lock = threading.Lock()
        self._driver: UcxDriver | None = None
        self._server: UcxServer | None = None
        self._peers: dict[bytes, Peer] = {}
        self._connecting: dict[bytes, threading.Lock] = {}
        self._silent: dict[bytes, float] = {}
        self._budget = ByteBudget(ALL_BYTES_MAX)
        self._budgets: dict[bytes, ByteBudget] = {}
        self._closed = False

    @property
    def driver(self) -> UcxDriver:
        """The worker and its thread, started on first use.

        Raises:
            MissingExtraError: ucxx is not installed.
            TransportUnavailableError: UCX does not start, or this transport is closed.
        """
        with self._lock:
            if self._closed:
                raise TransportUnavailableError("this transport is closed", scheme=self.scheme)
            if self._driver is not None and not self._driver.alive:
                raise TransportUnavailableError("the UCX driver has stopped", scheme=self.scheme)
            if self._driver is None:
                self._driver = UcxDriver(self.settings)
                self.settings = self._driver.settings
                logger.debug("kvmarket: UCX %s with settings made here: %s", ucx_version(), self.settings)
            return self._driver

    # ---- owner

    def serve(self, incarnation: bytes) -> tuple[tuple[str, int], ...]:
        """Listen for readers of this process's regions, if not yet; return the (address, port) pairs to announce."""
        driver = self.driver
        with self._lock:
            if self._server is None:
                self._server = UcxServer(driver, incarnation, self._addresses)
            return self._server.endpoints

    def lend(self, region: LentRegion) -> None:
        """Serve a region of host memory; `serve` must have been called."""
        if self._server is not None and region.pages.kind in self.capabilities.memory:
            self._server.add(region)

    def stop_serving(self) -> None:
        """Drop every reader; when it returns, no region's memory is touched any more. Idempotent."""
        if self._server is not None:
            self._server.close()

    # ---- reader

    def connect(self, owner: OwnerInfo, descriptor: RegionDescriptor) -> Connection:
        self.require_memory(owner, descriptor.kind)
        endpoints = descriptor.endpoints.get(self.scheme, ())
        if not endpoints:
            why = "the owner does not listen for UCX; it needs KVMARKET_TRANSPORT=ucx and the extra 'ucx'"
            raise TransportUnavailableError(why, scheme=self.scheme, peer=str(owner))
        connection = UcxConnection(self, owner, descriptor, endpoints)
        connection.reconnect(Deadline(CONNECT_S))
        return connection

    def peer(self, owner: OwnerInfo, endpoints: tuple[tuple[str, int], ...], deadline: Deadline) -> Peer:
        """Return a live connection to an owner, shared by all its regions.

        Raises:
            TransportUnavailableError: it does not answer, or its lanes are not those required.
            PeerGoneError: another incarnation answers.
        """
        with self._lock:
            self._prune()
            gate = self._connecting.setdefault(owner.incarnation, threading.Lock())
        with gate:
            peer = self._peers.get(owner.incarnation)
            if peer is None or peer.dead:
                if time.monotonic() < self._silent.get(owner.incarnation, 0.0):
                    why = "it did not answer a moment ago"
                    raise TransportUnavailableError(why, scheme=self.scheme, peer=str(owner))
                peer = self._open_peer(owner, endpoints, deadline)
                self._peers[owner.incarnation] = peer
            return peer

    def _prune(self) -> None:
        """Forget the connections that are gone, when there are many."""
        if len(self._connecting) < PEERS_KEPT:
            return
        gone = [key for key in self._connecting if key not in self._peers or self._peers[key].dead]
        for incarnation in gone:
            if not self._connecting[incarnation].locked():
                del self._connecting[incarnation]
                self._peers.pop(incarnation, None)
                self._budgets.pop(incarnation, None)
                self._silent.pop(incarnation, None)

    def budget(self, owner: OwnerInfo) -> ByteBudget:
        """The bytes in flight from one owner, within those of all."""
        with self._lock:
            return self._budgets.setdefault(owner.incarnation, ByteBudget(PEER_BYTES_MAX, self._budget))

    def _open_peer(self, owner: OwnerInfo, endpoints: tuple[tuple[str, int], ...], deadline: Deadline) -> Peer:
        reasons: list[str] = []
        began = time.monotonic()
        for number, (address, port) in enumerate(endpoints):
            if deadline.expired:
                break
            peer = Peer(self.driver, owner.incarnation, address, port)
            self.driver.submit(peer.start)
            try:
                peer.ready.result(deadline.remaining_s / (len(endpoints) - number))
            except FutureTimeoutError:
                reasons.append(f"{address}:{port} does not answer")
                self.driver.submit(partial(peer.close, "it did not answer"))
                continue
            except (ConnectError, TransportUnavailableError) as error:
                reasons.append(f"{address}:{port}: {error}")
                continue
            if missing := missing_requirement(self._require, peer.lanes):
                self.driver.submit(partial(peer.close, "lanes refused"))
                raise TransportUnavailableError(missing, scheme=self.scheme, peer=str(owner))
            self._silent.pop(owner.incarnation, None)
            logger.debug("kvmarket: UCX lanes to %s: %s", owner, lanes_text(peer.lanes))
            return peer
        if time.monotonic() - began > SLOW_S:
            self._silent[owner.incarnation] = time.monotonic() + SILENT_S
        why = "; ".join(reasons) or "no time was left to connect"
        raise TransportUnavailableError(why, scheme=self.scheme, peer=str(owner))

    def uses_one_sided(self, peer: Peer) -> bool:
        """Tell whether reads from a peer are one-sided."""
        return self._one_sided and reads_one_sided(peer.lanes)

    def uses_cma(self, peer: Peer) -> bool:
        """Tell whether the kernel copies from a peer's memory, as UCX found it would."""
        return self._direct and self.uses_one_sided(peer) and any(name == "cma" for name, _ in peer.lanes)

    def close(self) -> None:
        self.stop_serving()
        with self._lock:
            self._closed = True
            driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()


@dataclass(frozen=True, slots=True)
class _Way:
    """How a region is read now: its peer, for one-sided reads the region there, and what reports call it."""

    peer: Peer
    remote: RemoteRegion | None
    mapped: CmaRegion | None
    path: str


class UcxConnection(Connection):
    """One region of one owner. Connects again by itself after its connection was lost or cut."""

    scheme = "ucx"

    def __init__(
        self,
        transport: UcxTransport,
        owner: OwnerInfo,
        descriptor: RegionDescriptor,
        endpoints: tuple[tuple[str, int], ...],
    ) -> None:
        self.path = "not connected"
        self._transport, self._owner, self._descriptor, self._endpoints = transport, owner, descriptor, endpoints
        self._lock = threading.Lock()
        self._way: _Way | None = None  # replaced as a whole, so that reads on other threads see one or the other

    def readers(self, local: PagedMemory) -> int:
        """As the transport was told where the kernel copies for each thread that asks; UCX has one thread for all."""
        del local
        way = self._way
        return self._transport.cma_readers if way is not None and way.mapped is not None else 1

    def reconnect(self, deadline: Deadline) -> _Way:
        """Return the live way to the region; connect and prove it first if needed.

        Raises:
            TransportUnavailableError, PeerGoneError: see `UcxTransport.peer`.
        """
        way = self._live()
        if way is not None:
            return way
        if not self._lock.acquire(timeout=deadline.remaining_s):
            why = "another read is still connecting"
            raise TransportUnavailableError(why, scheme=self.scheme, peer=str(self._owner))
        try:
            way = self._live()  # somebody else may have connected meanwhile
            if way is None:
                way = self._way = self._connect(deadline)
                self.path = way.path
            return way
        finally:
            self._lock.release()

    def _live(self) -> _Way | None:
        way = self._way
        return None if way is None or way.peer.dead else way

    def _connect(self, deadline: Deadline) -> _Way:
        peer = self._transport.peer(self._owner, self._endpoints, deadline)
        one_sided = self._transport.uses_one_sided(peer)
        remote = self._describe(peer, deadline, keys=one_sided)
        mapped = self._map(peer, remote)
        kind = "cma" if mapped is not None else "rma" if one_sided else "am"
        return _Way(peer, remote, mapped, f"{kind}({lanes_text(peer.lanes)})")

    def _map(self, peer: Peer, remote: RemoteRegion | None) -> CmaRegion | None:
        if remote is None or not self._transport.uses_cma(peer):
            return None
        try:
            return CmaRegion(self._owner.pid, remote)
        except (PeerGoneError, TransferError) as error:
            logger.debug("kvmarket: UCX reads from %s: %s", self._owner, error)
            return None

    def _describe(self, peer: Peer, deadline: Deadline, *, keys: bool) -> RemoteRegion | None:
        """Ask the owner for the region's probe bytes and keys; they must be the announced ones."""
        driver, wanted = self._transport.driver, self._descriptor
        answer: Future[Region] = Future()
        driver.submit(lambda: peer.describe(wanted.region_id, answer, keys=keys))
        try:
            region = answer.result(max(deadline.remaining_s, 0.05))
        except FutureTimeoutError as error:
            why = "the owner does not describe its region"
            raise TransportUnavailableError(why, scheme=self.scheme, peer=str(self._owner)) from error
        if region.probe != wanted.probe:
            why = "the probe read other bytes than the owner announced"
            raise PeerGoneError(why, scheme=self.scheme, peer=str(self._owner))
        if not keys:
            return None
        return driver.call(
            lambda: RemoteRegion(peer, self._owner.incarnation, wanted, region), max(deadline.remaining_s, 0.05)
        )

    def read(self, request: ReadRequest, *, deadline: Deadline, on_group: OnGroup | None = None) -> TransferReport:
        began = time.perf_counter()
        layout = self._descriptor.layout
        self._check(request)
        try:
            way = self.reconnect(Deadline(min(CONNECT_S, deadline.remaining_s)))
        except TransportUnavailableError as error:
            raise PeerGoneError(str(error), scheme=self.scheme, peer=str(self._owner)) from error
        if way.mapped is not None:
            valid, refused, copy_s = way.mapped.read(request, deadline, on_group)
            seconds = time.perf_counter() - began
            return TransferReport(self.scheme, way.path, valid, valid * layout.page_bytes, seconds, copy_s, refused)
        segments = max(len(layout.segments), len(request.local.layout.segments))
        reading = GroupedRead(
            self._transport.driver, way.peer, self._transport.budget(self._owner), request, layout.page_bytes,
            layout.num_pages, segments, self._starter(way.peer, way.remote, request), deadline, on_group,
        )  # fmt: skip
        reading.run()
        seconds = time.perf_counter() - began
        nbytes = reading.valid * layout.page_bytes
        return TransferReport(
            self.scheme, way.path, reading.valid, nbytes, seconds, reading.copy_seconds, reading.refused
        )

    def _starter(
        self, peer: Peer, remote: RemoteRegion | None, request: ReadRequest
    ) -> Callable[[np.ndarray, Callable[[GroupResult], None]], Transfer]:
        region = self._descriptor.region_id

        def start(indices: np.ndarray, finish: Callable[[GroupResult], None]) -> Transfer:
            pages, generations = request.pages[indices], request.generations[indices]
            iov = local_iov(request.local, request.local_pages[indices])
            if remote is None or peer.endpoint is None:
                return peer.read(region, pages, generations, iov, finish)
            endpoint = peer.endpoint
            group = RemoteGroup(remote, pages, generations, iov)
            return peer.one_sided(lambda number: OneSidedRead(number, peer, endpoint, group, finish))

        return start

    def _check(self, request: ReadRequest) -> None:
        """Raise `InvalidInputError` for a request that would write elsewhere than into its local pages."""
        local = request.local.layout
        if len(request.pages) != len(request.local_pages):
            raise InvalidInputError(f"{len(request.pages)} remote pages for {len(request.local_pages)} local ones")
        if local.page_bytes != self._descriptor.layout.page_bytes:
            raise InvalidInputError("local and remote pages differ in size")
        pages = request.local_pages
        if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < local.num_pages:
            raise InvalidInputError(f"local page number outside [0, {local.num_pages})")

    def close(self) -> None:
        """The peer's connection is shared by its regions and goes with the transport."""
