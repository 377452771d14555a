"""UCX for pages on a GPU: packed on the card, sent from there, unpacked on the reader's card.

A scatter/gather list of thousands of pieces of GPU memory is slow in every lane that UCX has, so the owner's kernel
packs pages into one buffer of its card, UCX carries that buffer as it can (cuda_ipc on one host, GPUDirect where a
network card has it, else by way of the host), and the reader's kernel spreads it. Reads are two-sided; the owner looks
at the generations before it packs and again when everything was sent. What UCX carried through the host is said in the
report (`HOST_BOUNCE`), and ``UCX_REQUIRE=no_host_bounce`` refuses it.

These transports have a worker of their own, started with the first region on a card: UCX must find a CUDA context when
it opens its workers, and processes that have nothing on a GPU shall not get one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmarket.deadline import Deadline
from kvmarket.errors import InvalidInputError, MissingExtraError, TransportUnavailableError
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.report import TransferReport
from kvmarket.transport.base import Capabilities, Connection, OnGroup, ReadRequest
from kvmarket.transport.ucx import UcxTransport
from kvmarket.transport.ucx_cuda_driver import CudaUcxDriver
from kvmarket.transport.ucx_cuda_read import CardRead, staged_start
from kvmarket.transport.ucx_cuda_server import CudaUcxServer
from kvmarket.transport.ucx_cuda_staging import BYTES_MAX as STAGING_BYTES_MAX
from kvmarket.transport.ucx_cuda_staging import CardStaging
from kvmarket.transport.ucx_settings import is_rdma

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmarket.identity import OwnerInfo
    from kvmarket.region.cuda import CudaApi
    from kvmarket.region.descriptor import RegionDescriptor
    from kvmarket.transport.ucx import UcxConnection
    from kvmarket.transport.ucx_driver import UcxDriver
    from kvmarket.transport.ucx_peer import Peer

HOST_BOUNCE = "host_bounce"
NO_HOST_BOUNCE = "no_host_bounce"
DIRECT_BYTES, DIRECT_WINDOW = 64 << 20, 4
"""Of pages in one message, and messages in flight, where lanes reach GPU memory. What a message costs hardly depends on
its size on a card that two processes share: see docs/GPU.md."""
BOUNCED_BYTES, BOUNCED_WINDOW = 8 << 20, 2
"""The same by way of the host: a message takes its time there, and a read that is over waits for those in flight."""
READ_GROUPS, GROUP_BYTES_MIN = 8, 4 << 20
"""A read goes in about so many messages, of at least so many bytes, so that its steps overlap."""
READING_BYTES_MAX = STAGING_BYTES_MAX * 3 // 4
"""Of the staging buffers, for all reads together: what this process sends needs some, too."""
LANES_S = 1.0
PEERMEM = Path("/sys/module/nvidia_peermem")
"""There while network cards can reach GPU memory through the kernel."""


def reaches_cuda(lanes: tuple[tuple[str, str], ...]) -> bool:
    """Tell whether lanes read GPU memory themselves; where that cannot be told (dma-buf), the answer is no."""
    names = {name for name, device in lanes if device}
    return "cuda_ipc" in names or (any(map(is_rdma, names)) and PEERMEM.exists())


class CudaUcxTransport(UcxTransport):
    """UCX between processes for memory of GPUs; arguments as of `UcxTransport`.

    Args:
        load: returns the CUDA to use; called when the first region on a card is lent or read.

    Attributes:
        refuses_bounce: connections whose bytes would go through the host are refused.
    """

    scheme = "ucx_cuda"
    capabilities = Capabilities(one_sided=False, memory=frozenset({"cuda"}), cross_process=True, cross_host=True)

    def __init__(
        self, environ: Mapping[str, str], load: Callable[[], CudaApi], *, require: str = "", **options: Any
    ) -> None:
        super().__init__(environ, require="" if require == NO_HOST_BOUNCE else require, **options)
        self._load, self.refuses_bounce = load, require == NO_HOST_BOUNCE
        self._staging: CardStaging | None = None

    @property
    def cuda(self) -> CudaApi:
        """The CUDA to use. Raises `TransportUnavailableError` where there is none."""
        try:
            return self._load()
        except MissingExtraError as error:
            raise TransportUnavailableError(str(error), scheme=self.scheme) from error

    @property
    def card_staging(self) -> CardStaging:
        """Buffers on cards, for readers and for what is sent."""
        if self._staging is None:
            self._staging = CardStaging(self.cuda)
        return self._staging

    def make_driver(self) -> CudaUcxDriver:
        return CudaUcxDriver(self.settings, self.cuda, self.card_staging, ipv6=self._ipv6)

    def make_server(self, driver: UcxDriver, incarnation: bytes) -> CudaUcxServer:
        assert isinstance(driver, CudaUcxDriver)  # noqa: S101 - `make_driver` made it
        return CudaUcxServer(driver, incarnation, self._addresses, self._key, self.card_staging)

    def uses_one_sided(self, peer: Any) -> bool:
        del peer
        return False

    def connect(self, owner: OwnerInfo, descriptor: RegionDescriptor, deadline: Deadline | None = None) -> Connection:
        inner = self.reach(owner, descriptor, deadline)
        connection = CudaUcxConnection(self, inner, owner, descriptor)
        connection.way(deadline or Deadline(LANES_S))
        return connection

    def limits(self) -> tuple[int, int]:
        return READING_BYTES_MAX, READING_BYTES_MAX


class CudaUcxConnection(Connection):
    """One region on a card of an owner, read by way of staging buffers."""

    scheme = "ucx_cuda"
    fills = frozenset({"cuda"})
    digests = True

    def __init__(
        self, transport: CudaUcxTransport, inner: UcxConnection, owner: OwnerInfo, descriptor: RegionDescriptor
    ) -> None:
        self._transport, self._inner, self._owner = transport, inner, owner
        self._region, self._layout, self.digest = descriptor.region_id, descriptor.layout, descriptor.digest
        self.path = "not connected"

    def way(self, deadline: Deadline) -> tuple[Peer, bool]:
        """Return the live peer, and whether its lanes reach GPU memory; connect again if needed.

        Raises:
            PeerGoneError: it cannot be reached any more.
            TransportUnavailableError: it is reached by other lanes than are required.
        """
        way = self._inner.connected(deadline)
        direct = reaches_cuda(way.peer.lanes)
        if not direct and self._transport.refuses_bounce:
            why = f"require={NO_HOST_BOUNCE}, but {way.path} does not reach GPU memory: bytes would go through the host"
            raise TransportUnavailableError(why, scheme=self.scheme, peer=str(self._owner))
        self.path = way.path if direct else f"{way.path} {HOST_BOUNCE}"
        return way.peer, direct

    def read(self, request: ReadRequest, *, deadline: Deadline, on_group: OnGroup | None = None) -> TransferReport:
        began, local = time.perf_counter(), request.local
        if not isinstance(local, CudaPagedMemory):
            raise TransportUnavailableError("the target must be CUDA memory", scheme=self.scheme)
        if local.layout.page_bytes != self._layout.page_bytes or len(request.pages) != len(request.local_pages):
            raise InvalidInputError("local and remote pages differ in size or number")
        local.layout.check_pages(request.local_pages)
        local.api.make_current(local.device)
        peer, direct = self.way(deadline)
        path, transport, layout = self.path, self._transport, self._layout
        bytes_max, window = (DIRECT_BYTES, DIRECT_WINDOW) if direct else (BOUNCED_BYTES, BOUNCED_WINDOW)
        group_bytes = min(max(len(request.pages) * layout.page_bytes // READ_GROUPS, GROUP_BYTES_MIN), bytes_max)
        start = staged_start(peer, self._region, request, layout.page_bytes, transport.cuda)
        reading = CardRead(
            transport.driver, peer, transport.budget(self._owner), request, layout.page_bytes, layout.num_pages,
            len(layout.segments), start, deadline, on_group, transport.staging.give_back, group_bytes, window,
            local=local, staging=transport.card_staging,
        )  # fmt: skip
        reading.run()
        nbytes, seconds = reading.valid * layout.page_bytes, time.perf_counter() - began
        return TransferReport(
            self.scheme, path, reading.valid, nbytes, seconds, reading.copy_seconds, reading.refused, self.tier
        )

    def close(self) -> None:
        self._inner.close()
