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

import ctypes as c
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.deadline import Deadline
from kvmarket.errors import InvalidInputError, MissingExtraError, TransportUnavailableError
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import PageLayout
from kvmarket.report import TransferReport
from kvmarket.transport import ucx_api as api
from kvmarket.transport.base import Capabilities, Connection, OnGroup, ReadRequest
from kvmarket.transport.ucx import UcxTransport
from kvmarket.transport.ucx_cuda_server import CudaUcxServer
from kvmarket.transport.ucx_cuda_staging import CardStaging
from kvmarket.transport.ucx_driver import UcxDriver
from kvmarket.transport.ucx_operations import DATA_ID
from kvmarket.transport.ucx_settings import is_rdma

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvmarket.identity import OwnerInfo
    from kvmarket.region.cuda import CudaApi, CudaTransfer
    from kvmarket.region.descriptor import RegionDescriptor
    from kvmarket.report import MissReason
    from kvmarket.transport.ucx_operations import Endpoint, Payload

HOST_BOUNCE = "host_bounce"
NO_HOST_BOUNCE = "no_host_bounce"
CHUNK_BYTES = 8 << 20
"""Read into one staging buffer before the kernel spreads it, while the next chunk arrives."""
LANES_S = 1.0
PEERMEM = Path("/sys/module/nvidia_peermem")
"""There while network cards can reach GPU memory through the kernel."""


def reaches_cuda(lanes: tuple[tuple[str, str], ...]) -> bool:
    """Tell whether lanes read GPU memory themselves; where that cannot be told (dma-buf), the answer is no."""
    names = {name for name, device in lanes if device}
    return "cuda_ipc" in names or (any(map(is_rdma, names)) and PEERMEM.exists())


class CudaUcxDriver(UcxDriver):
    """A driver whose data messages are single pieces of GPU memory."""

    def __init__(self, settings: Mapping[str, str], cuda: CudaApi, staging: CardStaging, *, ipv6: bool) -> None:
        self._cuda, self._staging = cuda, staging
        super().__init__(settings, ipv6=ipv6)

    def _open(self) -> None:
        self._cuda.make_current(0)
        super()._open()

    def send_data(self, endpoint: Endpoint, header: bytes, iov: np.ndarray, done: Callable[[int], None]) -> None:
        """Send one piece; see `Operations.send_data`."""
        if endpoint.closed:
            done(api.UCS_ERR_CANCELED)
            return
        flags = api.AM_SEND_REPLY | api.AM_SEND_COPY_HEADER | api.AM_SEND_RNDV
        param = api.RequestParam(op_attr_mask=api.OP_FIELD_FLAGS, flags=flags)
        (address, nbytes), *_ = iov.tolist()
        request = self._lib.ucp_am_send_nbx(
            endpoint.handle, DATA_ID, header, len(header), address, nbytes, c.byref(param)
        )
        self._track(endpoint, request, done, iov)

    def receive(
        self, endpoint: Endpoint, payload: Payload, iov: np.ndarray, done: Callable[[int], None], memory: int = 0
    ) -> None:
        """Put a message into one piece of a staging buffer; see `Operations.receive`."""
        del memory  # of buffers on the host
        if endpoint.closed:
            self.drop(payload)
            done(api.UCS_ERR_CANCELED)
            return
        (address, nbytes), *_ = iov.tolist()
        if payload.data is not None:  # it travelled inside the message
            self._cuda.upload(payload.data, self._staging.view(address, nbytes))
            done(api.UCS_OK)
            return
        param = api.RequestParam(op_attr_mask=api.OP_NO_IMMEDIATE)
        descriptor, payload.descriptor = payload.descriptor, None
        request = self._lib.ucp_am_recv_data_nbx(self._worker, descriptor, address, nbytes, c.byref(param))
        self._track(endpoint, request, done, iov)


class CudaUcxTransport(UcxTransport):
    """UCX between processes for memory of GPUs; arguments as of `UcxTransport`.

    Args:
        load: returns the CUDA to use; called when the first region on a card is lent or read.
    """

    scheme = "ucx_cuda"
    capabilities = Capabilities(one_sided=False, memory=frozenset({"cuda"}), cross_process=True, cross_host=True)

    def __init__(
        self, environ: Mapping[str, str], load: Callable[[], CudaApi], *, require: str = "", **options: Any
    ) -> None:
        super().__init__(environ, require="" if require == NO_HOST_BOUNCE else require, **options)
        self._load, self._refuse_bounce = load, require == NO_HOST_BOUNCE
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

    def make_driver(self) -> UcxDriver:
        return CudaUcxDriver(self.settings, self.cuda, self.card_staging, ipv6=self._ipv6)

    def make_server(self, driver: UcxDriver, incarnation: bytes) -> CudaUcxServer:
        return CudaUcxServer(driver, incarnation, self._addresses, self._key, self.card_staging)

    def uses_one_sided(self, peer: Any) -> bool:
        del peer
        return False

    def connect(self, owner: OwnerInfo, descriptor: RegionDescriptor, deadline: Deadline | None = None) -> Connection:
        inner = super().connect(owner, descriptor, deadline)
        lanes = inner.reconnect(deadline or Deadline(LANES_S)).peer.lanes  # type: ignore[attr-defined]
        direct = reaches_cuda(lanes)
        if self._refuse_bounce and not direct:
            why = (
                f"require={NO_HOST_BOUNCE}, but {inner.path} does not reach GPU memory: bytes would go through the host"
            )
            raise TransportUnavailableError(why, scheme=self.scheme, peer=str(owner))
        return CudaUcxConnection(self, inner, descriptor, direct=direct)


class CudaUcxConnection(Connection):
    """One region on a card of an owner, read by way of staging buffers."""

    scheme = "ucx_cuda"
    fills = frozenset({"cuda"})
    digests = True

    def __init__(
        self, transport: CudaUcxTransport, inner: Connection, descriptor: RegionDescriptor, *, direct: bool
    ) -> None:
        self._transport, self._inner, self.digest = transport, inner, descriptor.digest
        self._layout, self._direct = descriptor.layout, direct

    @property
    def path(self) -> str:  # type: ignore[override]
        """The lanes, and whether the bytes went through the host."""
        return self._inner.path if self._direct else f"{self._inner.path} {HOST_BOUNCE}"

    def read(self, request: ReadRequest, *, deadline: Deadline, on_group: OnGroup | None = None) -> TransferReport:
        began, local = time.perf_counter(), request.local
        if not isinstance(local, CudaPagedMemory):
            raise TransportUnavailableError("the target must be CUDA memory", scheme=self.scheme)
        if local.layout.page_bytes != self._layout.page_bytes or len(request.pages) != len(request.local_pages):
            raise InvalidInputError("local and remote pages differ in size or number")
        local.layout.check_pages(request.local_pages)
        local.api.make_current(local.device)
        reading = _StagedRead(self._inner, self._transport.card_staging, request, local, on_group)
        try:
            reading.run(deadline)
        finally:
            reading.drain()
        nbytes, seconds = reading.valid * local.layout.page_bytes, time.perf_counter() - began
        return TransferReport(
            self.scheme, self.path, reading.valid, nbytes, seconds, reading.copy_seconds, reading.refused, self.tier
        )

    def close(self) -> None:
        self._inner.close()


class _StagedRead:
    """The chunks of one read: the kernel spreads one while UCX brings the next."""

    def __init__(
        self,
        inner: Connection,
        staging: CardStaging,
        request: ReadRequest,
        local: CudaPagedMemory,
        on_group: OnGroup | None,
    ) -> None:
        self._inner, self._staging, self._request, self._local = inner, staging, request, local
        self._on_group = on_group
        self.refused: dict[int, MissReason] = {}
        self.valid, self.copy_seconds = 0, 0.0
        self._spreading: tuple[np.ndarray, CudaTransfer, Any] | None = None

    def run(self, deadline: Deadline) -> None:
        page_bytes, total = self._local.layout.page_bytes, len(self._request.pages)
        step = max(1, CHUNK_BYTES // page_bytes)
        for start in range(0, total, step):
            if self.refused:
                self.refused |= dict.fromkeys(range(start, total), self.refused[min(self.refused)])
                break
            self._chunk(np.arange(start, min(start + step, total)), deadline)
        self._finish()

    def _chunk(self, indices: np.ndarray, deadline: Deadline) -> None:
        request, page_bytes = self._request, self._local.layout.page_bytes
        buffer = self._staging.take(len(indices) * page_bytes, self._local.device)
        try:
            layout = PageLayout.packed(len(indices), page_bytes)
            staged = CudaPagedMemory(layout, (buffer[: len(indices) * page_bytes],), self._local.api)
            slots = np.arange(len(indices))
            wanted = ReadRequest(request.pages[indices], request.generations[indices], staged, slots)
            report = self._inner.read(wanted, deadline=deadline)
            self.copy_seconds += report.copy_seconds
            self.refused |= {int(indices[slot]): reason for slot, reason in report.refused.items()}
            good = np.delete(slots, list(report.refused)) if report.refused else slots
            self._finish()
            if len(good):
                chosen = indices[good]
                digest = None if request.digest is None else request.digest[chosen]
                transfer = self._local.api.copy(staged, good, self._local, request.local_pages[chosen], digest)
                self._spreading, buffer = (chosen, transfer, buffer), None
        finally:
            if buffer is not None:
                self._staging.give_back(buffer)

    def _finish(self) -> None:
        """Wait for the chunk that is being spread, and report it."""
        if self._spreading is None:
            return
        indices, transfer, buffer = self._spreading
        transfer.wait()
        self._spreading = None
        self._staging.give_back(buffer)
        request = self._request
        self.valid += len(indices)
        if len(transfer.digests) and request.digest is not None and request.on_digests:
            request.on_digests(indices[request.digest[indices]], transfer.digests)
        if self._on_group is not None:
            self._on_group(indices)

    def drain(self) -> None:
        """Wait for what was launched, without looking at it."""
        if self._spreading is not None:
            _, transfer, buffer = self._spreading
            self._spreading = None
            transfer.wait()
            self._staging.give_back(buffer)
