"""The synchronous heart of a marketplace: one namespace, one owner, a registry and the transports.

`kvmarket.Marketplace` puts asyncio around it; engines with threads of their own use it directly. All methods are
thread-safe.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING

from kvmarket.addresses import listening_address
from kvmarket.config import MarketConfig
from kvmarket.digest import default_digest
from kvmarket.disk_place import forget_on_disk
from kvmarket.errors import (
    InvalidInputError,
    KVMarketError,
    MarketClosedError,
    RegistryError,
    RegistryUnavailableError,
)
from kvmarket.fetch import Fetcher
from kvmarket.logs import Log, set_format
from kvmarket.metrics import Metrics
from kvmarket.publish import Publisher
from kvmarket.reach import Listeners, make_transports
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.region import LentRegion
from kvmarket.registry import Registry, open_registry
from kvmarket.transport import TransportSelector
from kvmarket.transport.cuda_ipc import CudaExports
from kvmarket.transport.inproc import local_regions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.exporter import Endpoint
    from kvmarket.identity import Namespace, OwnerInfo
    from kvmarket.region.leases import PageLeases
    from kvmarket.region.memory import SharedMemory
    from kvmarket.region.pages import PagedMemory


events = Log(__name__)


class MarketCore:
    """Publishing, matching and fetching in one namespace.

    Args:
        namespace: what must be equal for a block to be found.
        config: settings; default `MarketConfig.from_env`.
        registry: a registry to share with other cores (it is then not closed here); default: the one `config` names.

    Raises:
        ConfigError, RegistryError: the settings or the registry cannot be used.
    """

    def __init__(
        self, namespace: Namespace, config: MarketConfig | None = None, registry: Registry | None = None
    ) -> None:
        self.namespace, self._digest = namespace, namespace.digest
        self.config = config or MarketConfig.from_env()
        set_format(self.config.log_format)
        self.metrics, self._endpoint = Metrics(), self._make_endpoint()
        self._owns_registry = registry is None
        self.registry = registry if registry is not None else open_registry(self.config)
        self._incarnation, self._pid = os.urandom(16), os.getpid()
        self._lock = threading.RLock()
        self._owner: OwnerInfo | None = None
        self._regions: list[LentRegion] = []
        self._publishers: list[Publisher] = []
        self._closed = False
        try:
            self._open()
        except KVMarketError:
            if self._owns_registry:
                self.registry.close()
            raise
        transports = make_transports(self.config, os.environ, namespace.secret)
        self.transports = TransportSelector(transports)
        auto, local = self.config.transport == "auto", self.registry.local
        self._listeners = Listeners(transports, auto=auto, this_host_only=local)
        self.fetcher = Fetcher(namespace, self.registry, self.transports, self.config, self.metrics)
        self._measure()

    def _make_endpoint(self) -> Endpoint | None:
        if not self.config.metrics:
            return None
        from kvmarket.exporter import endpoint

        return endpoint(*listening_address(self.config.metrics))

    def _measure(self) -> None:
        """Name what can be read at any time, and serve it where that is asked for."""
        self.metrics.gauge("marketplaces", lambda: 1)
        self.metrics.gauge("epoch", self.epoch_hint)
        for name in ("announce_queue", "announce_backlog", "offered_blocks"):
            self.metrics.gauge(name, partial(self._of_publishers, name))
        if self._endpoint is not None:
            self._endpoint.attach(self.sources)

    def _of_publishers(self, name: str) -> int:
        return sum(publisher.waiting[name] for publisher in list(self._publishers))

    @property
    def sources(self) -> tuple[Metrics, Metrics]:
        """What this marketplace counts, and what its registry does; see `kvmarket.exporter.MarketCollector`."""
        return self.metrics, self.registry.metrics

    def _open(self) -> None:
        try:
            self.registry.sweep()
        except RegistryUnavailableError as error:  # what the dead left behind only takes room: look-ups skip it
            events.warning("not_swept", "the registry is not swept", error=error)
        self.registry.open_namespace(self._digest, self.namespace.describe())

    @property
    def owner(self) -> OwnerInfo:
        """This process as an owner, registered on first use."""
        with self._lock:
            self.require_open()
            if self._owner is None:
                self._owner = self.registry.register_owner(self._incarnation)
            return self._owner

    def lend(
        self,
        pages: PagedMemory,
        shared: Sequence[SharedMemory] = (),
        *,
        tier: str = "engine",
        leases: PageLeases | None = None,
    ) -> LentRegion:
        """Let peers read `pages` in place. Nothing is readable until it is published.

        Args:
            pages: the pages; `pages.layout.page_bytes` must be the spec's.
            shared: the shared memories behind `pages.memories`, in that order; empty for memory that is private to
                this process, which only marketplaces of this process can then read.
            tier: what holds them, see `LentRegion`.
            leases: where readers that this process knows of say which pages they read.

        Raises:
            InvalidInputError: page size, memories or layout do not fit.
            RegistrationError: CUDA memory that cannot be exported; the message says what to change.
        """
        if pages.layout.page_bytes != self.namespace.spec.page_bytes:
            raise InvalidInputError(
                f"pages of {pages.layout.page_bytes} bytes do not fit a spec of {self.namespace.spec.page_bytes}"
            )
        if shared and len(shared) != len(pages.memories):
            raise InvalidInputError(f"{len(shared)} shared memories for {len(pages.memories)} memories")
        for number, (memory, array) in enumerate(zip(shared, pages.memories, strict=False)):
            if memory.address.nbytes != len(array) or memory.contains(array.ctypes.data, len(array)) != 0:
                raise InvalidInputError(f"memory {number} of the pages is not shared memory {number}")
        with self._lock:
            owner = self.owner
            endpoints = self._listeners.endpoints(owner.incarnation, pages.kind)
            region = LentRegion(
                len(self._regions),
                owner.incarnation,
                pages,
                shared,
                self.namespace.spec.fingerprint,
                exports=self._exports(pages),
                digest=default_digest(pages.kind),
                verify=self.config.verify,
                tier=tier,
                leases=leases,
            )
            try:
                self.registry.register_region(owner.owner, region.region_id, region.describe(endpoints).to_wire())
            except RegistryError:
                region.close()
                raise
            self._listeners.lend(region)
            local_regions.add(owner.incarnation, region)
            self._regions.append(region)
            return region

    def _exports(self, pages: PagedMemory) -> CudaExports | None:
        if not isinstance(pages, CudaPagedMemory):
            return None
        if not any("cuda" in transport.capabilities.memory for transport in self.transports.transports):
            raise InvalidInputError(
                f"CUDA memory cannot be lent with KVMARKET_TRANSPORT={self.config.transport}; use auto, cuda_ipc or ucx"
            )
        if not any(transport.scheme == "cuda_ipc" for transport in self.transports.transports):
            return None  # nothing is mapped, so it need not be memory that can be
        return CudaExports(pages)

    def publisher(self, region: LentRegion) -> Publisher:
        """Return a publisher for a lent region; it ends with this core."""
        with self._lock:
            with_digests = self.config.verify != "none"
            publisher = Publisher(
                self.namespace, self.registry, self.owner, region, self.metrics, with_digests=with_digests
            )
            self._publishers.append(publisher)
            return publisher

    def epoch_hint(self) -> int:
        """Return the namespace's epoch as far as this process knows: a new one means that all were told to forget.

        Never waits; see `Registry.epoch_hint`.
        """
        return self.registry.epoch_hint(self._digest)

    def bump_epoch(self) -> int:
        """Make every process forget all blocks of this namespace (new weights); return the new epoch."""
        try:
            forget_on_disk(self.config.disk_directory, self.namespace)  # first: who sees the new epoch sees this
        except OSError as error:
            raise RegistryUnavailableError(f"blocks on disk cannot be made worthless: {error}") from error
        epoch = self.registry.bump_epoch(self._digest)
        for publisher in list(self._publishers):
            publisher.forget_all(epoch)
        return epoch

    def close(self) -> None:
        """Withdraw everything, make every page unreadable, release all handles. Idempotent; no fetch may be running.

        In a forked child it does nothing: all of it is the parent's.
        """
        with self._lock:
            if self._closed or self._pid != os.getpid():
                return
            self._closed = True
        if self._endpoint is not None:
            self._endpoint.detach(self.sources)
        for publisher in self._publishers:
            publisher.close()
        self.fetcher.close()
        self._listeners.close()  # before the memory of the regions goes
        self.transports.close()
        for region in self._regions:
            region.close()
        if self._owner is not None:
            try:
                self.registry.release_owner(self._owner.owner)
            except RegistryError as error:  # its lock is gone, so its records are dead, and swept later
                events.warning("not_released", "the registry keeps records of a closed marketplace", error=error)
        if self._owns_registry:
            self.registry.close()

    def require_open(self) -> None:
        """Raise `MarketClosedError` when this core is closed, or belongs to the process this one was forked from."""
        if self._closed:
            raise MarketClosedError("this marketplace is closed")
        if self._pid != os.getpid():
            raise MarketClosedError("this marketplace belongs to the parent process; make one after the fork")
