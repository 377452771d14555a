"""Between marketplaces of one process: the region itself is the connection."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING

from kvmarket.errors import PeerGoneError, TransportUnavailableError
from kvmarket.transport.base import Capabilities, Connection, Transport
from kvmarket.transport.mapped import MappedConnection

if TYPE_CHECKING:
    from kvmarket.deadline import Deadline
    from kvmarket.identity import OwnerInfo
    from kvmarket.region.descriptor import RegionDescriptor
    from kvmarket.region.region import LentRegion


class LocalRegions:
    """Regions lent by this process, by (process, incarnation, region). Holds no region alive. Thread-safe.

    The process counts because a forked child inherits this table: what was its parent's memory is a copy there, and
    only the generations, which are shared, would still change.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._regions: weakref.WeakValueDictionary[tuple[int, bytes, int], LentRegion] = weakref.WeakValueDictionary()

    def add(self, incarnation: bytes, region: LentRegion) -> None:
        """Make a region visible to the other marketplaces of this process."""
        with self._lock:
            self._regions[os.getpid(), incarnation, region.region_id] = region

    def get(self, incarnation: bytes, region_id: int) -> LentRegion | None:
        """Return a region of this process, or None."""
        with self._lock:
            return self._regions.get((os.getpid(), incarnation, region_id))


local_regions = LocalRegions()
"""The one thing every marketplace of a process shares: that is what "same process" means."""


class InprocTransport(Transport):
    """Copies within this process."""

    scheme = "inproc"
    capabilities = Capabilities(one_sided=True, memory=frozenset({"host"}), cross_process=False, cross_host=False)

    def connect(self, owner: OwnerInfo, descriptor: RegionDescriptor, deadline: Deadline | None = None) -> Connection:
        del deadline  # nobody is waited for
        region = local_regions.get(owner.incarnation, descriptor.region_id)
        if region is None:
            raise TransportUnavailableError("the owner is another process", scheme=self.scheme, peer=str(owner))
        self.require_memory(owner, region.pages.kind)
        if region.generations.probe != descriptor.probe:
            raise PeerGoneError("the region is not the one described", scheme=self.scheme, peer=str(owner))
        return MappedConnection(self.scheme, "memcpy", region.pages, region.generations.values)

    def close(self) -> None:
        """Nothing is held."""
