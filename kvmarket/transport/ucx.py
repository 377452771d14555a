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
from typing import TYPE_CHECKING

from kvmarket.deadline import Deadline
from kvmarket.errors import InvalidInputError, PeerGoneError, TransferError, TransportUnavailableError
from kvmarket.report import TransferReport
from kvmarket.transport.base import Capabilities, Connection, OnGroup, ReadRequest, ServingTransport
from kvmarket.transport.ucx_api import version as ucx_version
from kvmarket.transport.ucx_budget import ByteBudget
from kvmarket.transport.ucx_cma import CmaRegion
from kvmarket.transport.ucx_connect import PEERS_KEPT, Endpoints, PeerTable
from kvmarket.transport.ucx_driver import UcxDriver
from kvmarket.transport.ucx_iov import local_iov
from kvmarket.transport.ucx_listen import uses_ipv6
from kvmarket.transport.ucx_peer import CONNECT_S, GroupResult, Peer, Transfer
from kvmarket.transport.ucx_proof import ProofKey
from kvmarket.transport.ucx_read import Group, GroupedRead
from kvmarket.transport.ucx_rma import OneSidedRead, RemoteGroup, RemoteRegion
from kvmarket.transport.ucx_server import UcxServer
from kvmarket.transport.ucx_settings import lanes_text, reads_one_sided, ucx_settings
from kvmarket.transport.ucx_staging import StagingBuffer, StagingBuffers, wants_staging

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from kvmarket.identity import OwnerInfo
    from kvmarket.region.descriptor import RegionDescriptor
    from kvmarket.region.pages import PagedMemory
    from kvmarket.region.region import LentRegion
    from kvmarket.secret import Secret
    from kvmarket.transport.ucx_read import Start
    from kvmarket.transport.ucx_wire import Region

logger = logging.getLogger(__name__)

CLOSE_S = 5.0
LATE_S = 0.2
"""Beyond the limit of connecting, for who has no deadline: so that it is the connection that says why it failed."""
PEER_BYTES_MAX = 64 << 20
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
        connect_s: how long connecting to an owner may take, at all its addresses together. A read waits for it within
            its own deadline; what is connected later serves the next.
        stage: True has every two-sided read of scattered pages arrive in a buffer first, False none, None those that
            gain by it (see `kvmarket.transport.ucx_staging`).
        secret: the tenant's: readers and owners that do not prove to have it are refused. None or empty: anybody may
            read who knows the owner's incarnation.
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
        connect_s: float = CONNECT_S,
        stage: bool | None = None,
        secret: Secret | None = None,
    ) -> None:
        self._ipv6 = uses_ipv6(environ, addresses)
        self.settings = ucx_settings(environ, ipv6=self._ipv6)
        self._addresses, self._one_sided = addresses, one_sided
        self._direct, self.cma_readers = direct, cma_readers
        self._lock = threading.Lock()
        self._driver: UcxDriver | None = None
        self._server: UcxServer | None = None
        self.connect_s = connect_s
        self._key = ProofKey(secret)
        self._peers = PeerTable(lambda: self.driver, require, connect_s, self._key)
        self._peer_bytes_max, all_bytes_max = self.limits()
        self._budget = ByteBudget(all_bytes_max)
        self._budgets: dict[bytes, ByteBudget] = {}
        self._stage = stage
        self.staging = StagingBuffers(lambda: int(self.driver.context.handle))
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
                self._driver = self.make_driver()
                self.settings = self._driver.settings
                logger.debug("kvmarket: UCX %s with settings made here: %s", ucx_version(), self.settings)
            return self._driver

    def limits(self) -> tuple[int, int]:
        """Return how many bytes reads may have in flight from one owner, and from all."""
        return PEER_BYTES_MAX, ALL_BYTES_MAX

    def make_driver(self) -> UcxDriver:
        """Start a worker and its thread."""
        return UcxDriver(self.settings, ipv6=self._ipv6)

    def make_server(self, driver: UcxDriver, incarnation: bytes) -> UcxServer:
        """Start to listen."""
        return UcxServer(driver, incarnation, self._addresses, self._key)

    # ---- owner

    def serve(self, incarnation: bytes) -> tuple[tuple[str, int], ...]:
        """Listen for readers of this process's regions, if not yet; return the (address, port) pairs to announce."""
        driver = self.driver
        with self._lock:
            if self._server is None:
                self._server = self.make_server(driver, incarnation)
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

    def connect(self, owner: OwnerInfo, descriptor: RegionDescriptor, deadline: Deadline | None = None) -> Connection:
        return self.reach(owner, descriptor, deadline)

    def reach(self, owner: OwnerInfo, descriptor: RegionDescriptor, deadline: Deadline | None) -> UcxConnection:
        """See `connect`."""
        self.require_memory(owner, descriptor.kind)
        endpoints = descriptor.endpoints.get(self.scheme, ())
        if not endpoints:
            why = "the owner does not listen for UCX; it needs KVMARKET_TRANSPORT=ucx and the extra 'ucx'"
            raise TransportUnavailableError(why, scheme=self.scheme, peer=str(owner))
        connection = UcxConnection(self, owner, descriptor, endpoints)
        connection.reconnect(deadline or Deadline(self.connect_s + LATE_S))
        return connection

    def peer(self, owner: OwnerInfo, endpoints: Endpoints, deadline: Deadline) -> Peer:
        """Return a live connection to an owner; see `PeerTable.peer`."""
        return self._peers.peer(owner, endpoints, deadline)

    def budget(self, owner: OwnerInfo) -> ByteBudget:
        """The bytes in flight from one owner, within those of all."""
        with self._lock:
            found = self._budgets.get(owner.incarnation)
            if found is None:
                if len(self._budgets) >= PEERS_KEPT:
                    self._budgets = {key: budget for key, budget in self._budgets.items() if budget.taken}
                found = self._budgets[owner.incarnation] = ByteBudget(self._peer_bytes_max, self._budget)
            return found

    def staged(self, peer: Peer, iov: np.ndarray) -> StagingBuffer | None:
        """Return a buffer for a message that should arrive in one; with the driver's turn."""
        wanted = wants_staging(peer.lanes, iov) if self._stage is None else self._stage and len(iov) > 1
        return self.staging.take(int(iov[:, 1].sum())) if wanted else None

    def uses_one_sided(self, peer: Peer) -> bool:
        """Tell whether reads from a peer are one-sided."""
        return self._one_sided and reads_one_sided(peer.lanes)

    def uses_cma(self, peer: Peer) -> bool:
        """Tell whether the kernel copies from a peer's memory, as UCX found it would."""
        return self._direct and self.uses_one_sided(peer) and any(name == "cma" for name, _ in peer.lanes)

    def close(self) -> None:
        self.stop_serving()
        if self.staging.made and self._driver is not None and self._driver.alive:
            self._driver.call(self.staging.close, CLOSE_S)
        with self._lock:
            self._closed = True
            driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()


@dataclass(frozen=True, slots=True)
class Way:
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
        endpoints: Endpoints,
    ) -> None:
        self.path = "not connected"
        self._transport, self._owner, self._descriptor, self._endpoints = transport, owner, descriptor, endpoints
        self._lock = threading.Lock()
        self._way: Way | None = None  # replaced as a whole, so that reads on other threads see one or the other

    def readers(self, local: PagedMemory) -> int:
        """As the transport was told where the kernel copies for each thread that asks; UCX has one thread for all."""
        del local
        way = self._way
        return self._transport.cma_readers if way is not None and way.mapped is not None else 1

    def reconnect(self, deadline: Deadline) -> Way:
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

    def connected(self, deadline: Deadline) -> Way:
        """As `reconnect`, for a read: who could be reached and cannot be any more is gone, a `PeerGoneError`."""
        try:
            return self._live() or self.reconnect(deadline)
        except TransportUnavailableError as error:
            raise PeerGoneError(str(error), scheme=self.scheme, peer=str(self._owner)) from error

    def _live(self) -> Way | None:
        way = self._way
        return None if way is None or way.peer.dead else way

    def _connect(self, deadline: Deadline) -> Way:
        peer = self._transport.peer(self._owner, self._endpoints, deadline)
        one_sided = self._transport.uses_one_sided(peer)
        remote = self._describe(peer, deadline, keys=one_sided)
        mapped = self._map(peer, remote)
        kind = "cma" if mapped is not None else "rma" if one_sided else "am"
        return Way(peer, remote, mapped, f"{kind}({lanes_text(peer.lanes)})")

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
        way = self.connected(deadline)
        if way.mapped is not None:
            valid, refused, copy_s = way.mapped.read(request, deadline, on_group)
            seconds = time.perf_counter() - began
            return TransferReport(self.scheme, way.path, valid, valid * layout.page_bytes, seconds, copy_s, refused)
        segments = max(len(layout.segments), len(request.local.layout.segments))
        reading = GroupedRead(
            self._transport.driver, way.peer, self._transport.budget(self._owner), request, layout.page_bytes,
            layout.num_pages, segments, self._starter(way.peer, way.remote, request), deadline, on_group,
            self._transport.staging.give_back,
        )  # fmt: skip
        reading.run()
        seconds = time.perf_counter() - began
        nbytes = reading.valid * layout.page_bytes
        return TransferReport(
            self.scheme, way.path, reading.valid, nbytes, seconds, reading.copy_seconds, reading.refused
        )

    def _starter(self, peer: Peer, remote: RemoteRegion | None, request: ReadRequest) -> Start:
        region = self._descriptor.region_id

        def start(group: Group, finish: Callable[[GroupResult], None]) -> Transfer:
            pages, generations = request.pages[group.indices], request.generations[group.indices]
            iov = local_iov(request.local, request.local_pages[group.indices])
            if remote is None or peer.endpoint is None:
                staged = self._transport.staged(peer, iov)
                if staged is not None:
                    iov = staged.iov(int(iov[:, 1].sum()))
                return peer.read(region, pages, generations, iov, finish, staged=staged)
            endpoint = peer.endpoint
            remote_group = RemoteGroup(remote, pages, generations, iov)
            return peer.one_sided(lambda number: OneSidedRead(number, peer, endpoint, remote_group, finish))

        return start

    def _check(self, request: ReadRequest) -> None:
        """Raise `InvalidInputError` for a request that would write elsewhere than into its local pages."""
        local = request.local.layout
        if len(request.pages) != len(request.local_pages):
            raise InvalidInputError(f"{len(request.pages)} remote pages for {len(request.local_pages)} local ones")
        if local.page_bytes != self._descriptor.layout.page_bytes:
            raise InvalidInputError("local and remote pages differ in size")
        local.check_pages(request.local_pages)

    def close(self) -> None:
        """The peer's connection is shared by its regions and goes with the transport."""
