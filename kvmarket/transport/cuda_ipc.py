"""Between processes of one host, GPU to GPU: map the owner's allocations, copy all layers of many pages in one launch.

`kvmarket.transport.cuda_stream` has the copies and their checks.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmarket.errors import MissingExtraError, PeerGoneError, TransportUnavailableError
from kvmarket.region.cuda import CudaAddress, CudaApi, CudaPagedMemory
from kvmarket.region.generations import PeerGenerations, readable
from kvmarket.transport.base import Capabilities, Connection, OnGroup, ReadRequest, Stream, Transport
from kvmarket.transport.cuda_stream import GROUP_BYTES_MAX, CudaStream
from kvmarket.transport.inproc import local_regions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from kvmarket.deadline import Deadline
    from kvmarket.identity import OwnerInfo
    from kvmarket.region.descriptor import RegionDescriptor
    from kvmarket.region.pages import PagedMemory
    from kvmarket.report import TransferReport


READ_GROUPS, READ_GROUP_BYTES_MIN = 4, 8 << 20
"""A read whose caller wants to hear of groups goes in about so many launches, of at least so many bytes; others in one,
if it is not too large."""


@dataclass(eq=False)
class _Allocation:
    """A peer's mapped allocation. Shared by all connections that read from it, and unmapped with the last of them."""

    array: Any


class PeerAllocations:
    """Mappings of peers' allocations, each opened once per card. Thread-safe.

    Attributes:
        api: the CUDA that opens them.
    """

    def __init__(self, api: CudaApi) -> None:
        self.api = api
        self._lock = threading.Lock()
        self._open: weakref.WeakValueDictionary[tuple[bytes, int, bytes, int], _Allocation] = (
            weakref.WeakValueDictionary()
        )

    def get(self, incarnation: bytes, address: CudaAddress, device: int) -> _Allocation:
        """Return an allocation of that incarnation, mapped for card `device`. Errors as `CudaApi.open`."""
        key = (incarnation, address.buffer_id, address.handle, device)
        with self._lock:
            found = self._open.get(key)
            if found is None:
                self._open[key] = found = _Allocation(self.api.open(address, device))
            return found


class CudaIpcTransport(Transport):
    """One-sided reads of CUDA memory, by kernels of the reader's card.

    Connecting looks at host memory only. The owner's allocations are mapped, and its probe is read, for each card that
    reads when it first does (`Connection.prepare`): a process that only asks what is fresh gets no CUDA context.

    Args:
        boot_id: identity of the kernel that this process runs on, to tell which owners are within reach.
        pid_namespace: this process's, for the same.
        load: returns the CUDA to use; called at the first connection to CUDA memory.
    """

    scheme = "cuda_ipc"
    capabilities = Capabilities(one_sided=True, memory=frozenset({"cuda"}), cross_process=True, cross_host=False)

    def __init__(self, boot_id: str, pid_namespace: int, load: Callable[[], CudaApi]) -> None:
        self._boot_id, self._pid_namespace, self._load = boot_id, pid_namespace, load
        self._lock = threading.Lock()
        self._allocations: PeerAllocations | None = None

    def connect(self, owner: OwnerInfo, descriptor: RegionDescriptor, deadline: Deadline | None = None) -> Connection:
        del deadline  # nobody is waited for
        self.require_memory(owner, descriptor.kind)
        region = local_regions.get(owner.incarnation, descriptor.region_id)
        if region is not None:  # one's own handles cannot be opened, and need not be
            if region.generations.probe != descriptor.probe:
                raise PeerGoneError("the region is not the one described", scheme=self.scheme, peer=str(owner))
            pages = region.pages
            if not isinstance(pages, CudaPagedMemory):
                raise PeerGoneError("the region is not the one described", scheme=self.scheme, peer=str(owner))
            return CudaIpcConnection("kernel(same process)", region.generations.values, descriptor.digest, pages)
        if owner.boot_id != self._boot_id:
            self._refuse(owner, f"{owner.host} is another host")
        if owner.pid_namespace != self._pid_namespace:
            self._refuse(owner, "the owner runs in another PID namespace; let both containers share one (--pid)")
        if not descriptor.cuda:
            self._refuse(owner, "the owner's memory is private: it was lent without an export of CUDA memory")
        generations = _generations(owner, descriptor)
        peer = _PeerMemory(self._opened(owner), owner, descriptor)
        return CudaIpcConnection("kernel(cuda_ipc)", generations.values, descriptor.digest, None, peer)

    def _opened(self, owner: OwnerInfo) -> PeerAllocations:
        with self._lock:
            if self._allocations is None:
                try:
                    self._allocations = PeerAllocations(self._load())
                except MissingExtraError as error:
                    raise TransportUnavailableError(str(error), scheme=self.scheme, peer=str(owner)) from error
            return self._allocations

    def _refuse(self, owner: OwnerInfo, why: str) -> None:
        raise TransportUnavailableError(why, scheme=self.scheme, peer=str(owner))

    def close(self) -> None:
        """Mappings go with their connections."""


def _generations(owner: OwnerInfo, descriptor: RegionDescriptor) -> PeerGenerations:
    """Map a region's table and prove it. Errors as `PeerGenerations`."""
    return PeerGenerations(descriptor.generations, owner.incarnation, descriptor.layout.num_pages, descriptor.probe)


class _PeerMemory:
    """A peer's region as cards of this process see it: one view per card that reads, made on demand. Thread-safe."""

    def __init__(self, allocations: PeerAllocations, owner: OwnerInfo, descriptor: RegionDescriptor) -> None:
        self._allocations, self._owner, self._descriptor = allocations, owner, descriptor
        self._api = allocations.api
        self._device = self._api.ordinal(descriptor.cuda[0].device)  # None: CUDA_VISIBLE_DEVICES hides it from us
        self._lock = threading.Lock()
        self._views: dict[int, CudaPagedMemory] = {}
        self._kept: list[_Allocation] = []

    def pages(self, device: int | None = None) -> CudaPagedMemory:
        """Return the region, mapped for card `device` and proven by reading the owner's probe through the mapping.

        Args:
            device: default: the owner's card, or the first where that one is hidden from this process.

        Raises:
            TransportUnavailableError: that card cannot read it.
            PeerGoneError: what is there is not what was announced.
        """
        if device is None:
            device = self._device or 0
        with self._lock:
            if device not in self._views:
                self._views[device] = self._map(device)
            return self._views[device]

    def _map(self, device: int) -> CudaPagedMemory:
        if self._device is not None and not self._api.peer_access(device, self._device):
            raise self._refusal(f"cards {device} and {self._device} have no peer access to each other")
        try:
            probe, *memories = [self._view(address, device) for address in self._descriptor.cuda]
        except TransportUnavailableError as error:
            _generations(self._owner, self._descriptor)  # who died since the connection was made is gone, and no more
            if self._device is None:  # CUDA maps memory of hidden cards, too, where both cards have peer access
                why = "this process does not see the owner's card; let CUDA_VISIBLE_DEVICES name it, too"
                raise self._refusal(f"{error}; {why}") from error
            raise
        if self._api.download(probe) != self._descriptor.probe:
            raise PeerGoneError("the probe read other bytes than the owner announced", scheme="cuda_ipc")
        return CudaPagedMemory(self._descriptor.layout, tuple(memories), self._api)

    def _view(self, address: CudaAddress, device: int) -> Any:
        allocation = self._allocations.get(self._owner.incarnation, address, device)
        self._kept.append(allocation)
        return allocation.array[address.offset : address.offset + address.nbytes]

    def _refusal(self, why: str) -> TransportUnavailableError:
        return TransportUnavailableError(why, scheme="cuda_ipc", peer=str(self._owner))


class CudaIpcConnection(Connection):
    """One region. Reads into pages of any card that reaches it.

    Args:
        path: how the bytes travel, for reports.
        generations: the owner's table.
        digest: the algorithm of the owner's digests.
        pages: the region, when it is this process's own.
        peer: the region, when it is another process's.
    """

    scheme = "cuda_ipc"
    fills = frozenset({"cuda"})
    digests = True

    def __init__(
        self,
        path: str,
        generations: np.ndarray,
        digest: str,
        pages: CudaPagedMemory | None,
        peer: _PeerMemory | None = None,
    ) -> None:
        self.path, self.digest = path, digest
        self._generations, self._pages, self._peer = generations, pages, peer

    def fresh(self, pages: np.ndarray, generations: np.ndarray) -> np.ndarray:
        """Look at the generation table."""
        return readable(self._generations, pages, generations)

    def read(self, request: ReadRequest, *, deadline: Deadline, on_group: OnGroup | None = None) -> TransferReport:
        group_bytes = GROUP_BYTES_MAX
        if on_group is not None:
            nbytes = len(request.pages) * request.local.layout.page_bytes
            group_bytes = max(nbytes // READ_GROUPS, READ_GROUP_BYTES_MIN)
        stream = self._stream(request.local, on_group, group_bytes)
        try:
            stream.add(request, deadline)
        except BaseException:
            stream.abandon()
            raise
        return stream.finish()

    def prepare(self, local: PagedMemory | None = None) -> None:
        if isinstance(local, CudaPagedMemory):
            self._source(local.device)
        elif local is None and self._peer is not None:
            self._peer.pages()

    def stream(self, local: PagedMemory) -> Stream | None:
        return self._stream(local)

    def _stream(
        self, local: PagedMemory, on_group: OnGroup | None = None, group_bytes: int = GROUP_BYTES_MAX
    ) -> CudaStream:
        if not isinstance(local, CudaPagedMemory):
            raise TransportUnavailableError("the target must be CUDA memory", scheme=self.scheme)
        source = self._source(local.device)
        return CudaStream(self.path, local, source, self._generations, on_group, group_bytes, self.tier)

    def _source(self, device: int) -> CudaPagedMemory:
        if self._pages is not None:
            if not self._pages.api.peer_access(device, self._pages.device):
                why = f"cards {device} and {self._pages.device} have no peer access to each other"
                raise TransportUnavailableError(why, scheme=self.scheme)
            return self._pages
        if self._peer is None:
            raise PeerGoneError("the connection is closed", scheme=self.scheme)
        return self._peer.pages(device)

    def close(self) -> None:
        """Mappings go with the last array that refers to them."""
        self._pages = self._peer = None


class CudaExports:
    """The addresses by which peers reach lent CUDA memory, and the probe that they read first.

    Args:
        pages: the memory.

    Raises:
        RegistrationError: an allocation cannot be exported; the message says what to change.
    """

    def __init__(self, pages: CudaPagedMemory) -> None:
        self._api, self._device = pages.api, pages.device
        self._memories = tuple(self._api.export(memory) for memory in pages.memories)
        self._probe: Any = None

    def addresses(self, probe: bytes) -> Sequence[CudaAddress]:
        """Put `probe` into CUDA memory of its own; return its address and those of the lent memories."""
        self._probe = self._api.allocate(len(probe), self._device)
        self._api.upload(probe, self._probe)
        return (self._api.export(self._probe), *self._memories)

    def close(self) -> None:
        """Give the probe's memory back."""
        self._probe = None
