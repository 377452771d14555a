"""The owner's side of UCX for pages on a GPU: packs what a reader asks for, off the driver's thread, and sends it."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.errors import KVMarketError
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.generations import memory_fence, readable
from kvmarket.transport import ucx_api as api
from kvmarket.transport.ucx_operations import RENDEZVOUS_BYTES
from kvmarket.transport.ucx_server import ServerSession, UcxServer
from kvmarket.transport.ucx_wire import VERSION_WHOLE, Refused, Trailer, encode_data_header

if TYPE_CHECKING:
    from kvmarket.region.region import LentRegion
    from kvmarket.transport.ucx_cuda_driver import CudaUcxDriver
    from kvmarket.transport.ucx_cuda_staging import CardStaging
    from kvmarket.transport.ucx_proof import ProofKey

logger = logging.getLogger(__name__)


class CudaServerSession(ServerSession):
    """One reader's connection."""

    _server: CudaUcxServer
    _driver: CudaUcxDriver

    def _serve(self, region: LentRegion, transfer: int, pages: np.ndarray, generations: np.ndarray) -> None:
        """Check, have the pages packed, send them, check again."""
        stale = np.flatnonzero(~readable(region.generations.values, pages, generations))
        if len(stale):
            self._send(Trailer(transfer, stale.tolist(), []))
            return
        memory_fence()  # the bytes are read after the generations
        self._begin()
        self._server.pack(self, region, transfer, pages, generations)

    def _begin(self) -> None:
        self._reads += 1
        self._driver.reads += 1

    def _end(self) -> None:
        self._reads -= 1
        self._driver.reads -= 1

    def packed(self, buffer: Any, nbytes: int, transfer: int, torn: Any) -> None:
        """Send what was packed, with the turn; `torn` tells which pages changed since."""

        def sent(status: int) -> None:
            self._end()
            self._server.staging.give_back(buffer)
            if status == api.UCS_OK:  # else the endpoint is failing; its end is reported by UCX
                memory_fence()  # the generations again after the bytes
                self._send(Trailer(transfer, [], torn()))

        address = self._server.staging.cuda.pointer(buffer)
        iov = np.array([[address, nbytes]], np.uint64)
        self._driver.send_data(self.endpoint, encode_data_header(transfer), iov, sent)

    def short(self, data: bytes, transfer: int, torn: list[int]) -> None:
        """Send few bytes and the verdict as one message, with the turn."""
        self._end()
        self._driver.send_short(self.endpoint, encode_data_header(transfer, whole=not torn), data)
        if torn:
            self._send(Trailer(transfer, [], torn))

    @property
    def takes_short(self) -> bool:
        """The reader knows messages that bring their verdict along."""
        return self._version >= VERSION_WHOLE

    def failed(self, transfer: int, why: str) -> None:
        """Tell the reader that its read cannot be served, with the turn."""
        self._end()
        self._send(Refused("cuda", why[:512], transfer))


class CudaUcxServer(UcxServer):
    """Serves regions on GPUs; arguments as of `UcxServer`.

    Args:
        staging: where pages are packed.
    """

    session_type = CudaServerSession

    def __init__(
        self, driver: CudaUcxDriver, incarnation: bytes, addresses: tuple[str, ...], key: ProofKey, staging: CardStaging
    ) -> None:
        self.staging = staging
        self._thread = ThreadPoolExecutor(1, "kvmarket-pack")
        super().__init__(driver, incarnation, addresses, key)

    def pack(
        self, session: CudaServerSession, region: LentRegion, transfer: int, pages: np.ndarray, generations: np.ndarray
    ) -> None:
        """Pack pages on a thread of its own, and go on with the session. At most `READS_MAX` of each reader wait."""
        self._thread.submit(self._pack, session, region, transfer, pages, generations)

    def _pack(
        self, session: CudaServerSession, region: LentRegion, transfer: int, pages: np.ndarray, generations: np.ndarray
    ) -> None:
        memory, values = region.pages, region.generations.values
        try:
            if not isinstance(memory, CudaPagedMemory) or region.region_id not in self.regions:
                raise KVMarketError("the region is not lent any more")  # noqa: TRY301 - as every other failure
            page_bytes = memory.layout.page_bytes
            nbytes = len(pages) * page_bytes
            buffer = self.staging.take(nbytes, memory.device)
            packed = self.staging.packed(buffer, page_bytes)
            memory.api.copy(memory, pages, packed, np.arange(len(pages))).wait()
        except KVMarketError as error:  # a buffer whose copy failed is lost: its copy may still be writing
            why = str(error)
            self.driver.submit(lambda: session.failed(transfer, why))
            return

        def torn() -> list[int]:
            found: list[int] = np.flatnonzero(values[pages] != generations).tolist()
            return found

        if nbytes < RENDEZVOUS_BYTES and session.takes_short:
            data = memory.api.download(buffer[:nbytes])
            self.staging.give_back(buffer)
            memory_fence()  # the generations again after the bytes
            now = torn()
            self.driver.submit(lambda: session.short(data, transfer, now))
        else:
            self.driver.submit(lambda: session.packed(buffer, nbytes, transfer, torn))

    def close(self) -> None:
        super().close()
        self._thread.shutdown(wait=True)  # a copy that has begun reads a region
