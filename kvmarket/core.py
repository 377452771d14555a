"""The synchronous heart of a marketplace: one namespace, one owner, a registry and the transports.

`kvmarket.Marketplace` puts asyncio around it; engines with threads of their own use it directly. All methods are thread-safe.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from typing import TYPE_CHECKING

from kvmarket.config import MarketConfig
from kvmarket.errors import InvalidInputError, MarketClosedError, MissingExtraError, TransportUnavailableError
from kvmarket.fetch import Fetcher
from kvmarket.metrics import Metrics
from kvmarket.publish import Publisher
from kvmarket.region.region import LentRegion
from kvmarket.registry import Registry, open_registry
from kvmarket.registry.host import boot_id, pid_namespace
from kvmarket.transport import ServingTransport, Transport, TransportSelector
from kvmarket.transport.inproc import InprocTransport, local_regions
from kvmarket.transport.shm import ShmTransport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmarket.identity import Namespace, OwnerInfo
    from kvmarket.region.memory import SharedMemory
    from kvmarket.region.pages import PagedMemory

logger = logging.getLogger(__name__)


def make_transports(config: MarketConfig, environ: Mapping[str, str]) -> list[Transport]:
    """Return the backends that ``KVMARKET_TRANSPORT`` allows, in order.

    ``auto`` has UCX when ucxx is installed, for owners that the others do not reach; it starts with the first of them.

    Raises:
        MissingExtraError: ``ucx`` is asked for and ucxx is not installed.
    """
    if config.transport == "inproc":
        return [InprocTransport()]
    shm = ShmTransport(boot_id(), pid_namespace())
    if config.transport == "shm":
        return [shm]
    has_ucx = importlib.util.find_spec("ucxx") is not None
    if config.transport == "ucx" and not has_ucx:
        raise MissingExtraError("ucxx", "ucx")
    if not has_ucx:
        return [InprocTransport(), shm]
    from kvmarket.transport.ucx import UcxTransport

    addresses = tuple(item.strip() for item in config.ucx_addresses.split(",") if item.strip())
    ucx = UcxTransport(environ, require=config.ucx_require, addresses=addresses)
    return [ucx] if config.transport == "ucx" else [InprocTransport(), shm, ucx]


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
        self.namespace = namespace
        self.config = config or MarketConfig.from_env()
        self.metrics = Metrics()
        self._owns_registry = registry is None
        self.registry = registry if registry is not None else open_registry(self.config)
        self._incarnation = os.urandom(16)
        self._lock = threading.RLock()
        self._owner: OwnerInfo | None = None
        self._regions: list[LentRegion] = []
        self._publishers: list[Publisher] = []
        self._closed = False
        self.registry.sweep()
        self.registry.open_namespace(namespace.digest, namespace.describe())
        transports = make_transports(self.config, os.environ)
        self.transports = TransportSelector(transports)
        self._servers = self._serving(transports)
        self.fetcher = Fetcher(namespace, self.registry, self.transports, self.config, self.metrics)

    @property
    def owner(self) -> OwnerInfo:
        """This process as an owner, registered on first use."""
        with self._lock:
            self._require_open()
            if self._owner is None:
                self._owner = self.registry.register_owner(self._incarnation)
            return self._owner

    def lend(self, pages: PagedMemory, shared: Sequence[SharedMemory] = ()) -> LentRegion:
        """Let peers read `pages` in place. Nothing is readable until it is published.

        Args:
            pages: the pages; `pages.layout.page_bytes` must be the spec's.
            shared: the shared memories behind `pages.memories`, in that order; empty for memory that is private to
                this process, which only marketplaces of this process can then read.

        Raises:
            InvalidInputError: page size, memories or layout do not fit.
        """
        if pages.layout.page_bytes != self.namespace.spec.page_bytes:
            raise InvalidInputError(
                f"pages of {pages.layout.page_bytes} bytes do not fit a spec of {self.namespace.spec.page_bytes}"
            )
        if shared and len(shared) != len(pages.memories):
            raise InvalidInputError(f"{len(shared)} shared memories for {len(pages.memories)} memories")
        with self._lock:
            owner = self.owner
            region = LentRegion(len(self._regions), owner.incarnation, pages, shared, self.namespace.spec.fingerprint)
            endpoints = self._listen(owner.incarnation)
            for server in self._servers:
                server.lend(region)
            self.registry.register_region(owner.owner, region.region_id, region.describe(endpoints).to_wire())
            local_regions.add(owner.incarnation, region)
            self._regions.append(region)
            return region

    def _serving(self, transports: Sequence[Transport]) -> list[ServingTransport]:
        """Those that must listen for readers of our regions: with ``auto`` only where other hosts can look us up."""
        if self.config.transport == "auto" and self.registry.local:
            return []
        return [transport for transport in transports if isinstance(transport, ServingTransport)]

    def _listen(self, incarnation: bytes) -> dict[str, tuple[tuple[str, int], ...]]:
        """Start the listeners of the transports that serve; ``auto`` does without one that cannot."""
        endpoints = {}
        for server in list(self._servers):
            try:
                endpoints[server.scheme] = server.serve(incarnation)
            except TransportUnavailableError as error:
                if self.config.transport != "auto":
                    raise
                logger.warning("kvmarket: other hosts cannot fetch from here: %s", error)
                self._servers.remove(server)
        return endpoints

    def publisher(self, region: LentRegion) -> Publisher:
        """Return a publisher for a lent region; it ends with this core."""
        with self._lock:
            publisher = Publisher(
                self.namespace, self.registry, self.owner, region, self.metrics, self.config.verify != "none"
            )
            self._publishers.append(publisher)
            return publisher

    def bump_epoch(self) -> int:
        """Make every process forget all blocks of this namespace (new weights); return the new epoch."""
        epoch = self.registry.bump_epoch(self.namespace.digest)
        for publisher in list(self._publishers):
            publisher.forget_all(epoch)
        return epoch

    def close(self) -> None:
        """Withdraw everything, make every page unreadable, release all handles. Idempotent; no fetch may be running."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for publisher in self._publishers:
            publisher.close()
        self.fetcher.close()
        for server in self._servers:
            server.stop_serving()  # before the regions' memory goes
        self.transports.close()
        for region in self._regions:
            region.close()
        if self._owner is not None:
            self.registry.release_owner(self._owner.owner)
        if self._owns_registry:
            self.registry.close()

    def _require_open(self) -> None:
        if self._closed:
            raise MarketClosedError("this marketplace is closed")
