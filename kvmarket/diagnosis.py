"""What the ``kvmarket`` command shows: facts gathered from a registry and by really trying the transports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.core import make_transports
from kvmarket.errors import ConfigError, KVMarketError
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.region.memory import SharedMemory, map_peer_memory
from kvmarket.registry.lmdb import LmdbRegistry
from kvmarket.transport import TransportSelector

if TYPE_CHECKING:
    from pathlib import Path

    from kvmarket.config import MarketConfig
    from kvmarket.registry import Registry


@dataclass(frozen=True, slots=True)
class Usage:
    """How full a registry is."""

    path: Path
    used_bytes: int
    limit_bytes: int
    blocks: int
    owners: int
    dead_owners: int


@dataclass(frozen=True, slots=True)
class OwnerView:
    """One live owner as seen from here."""

    name: str
    verdict: str


def check_shared_memory() -> str:
    """Make shared memory, map it the way a peer would, and compare bytes; return the verdict."""
    memory = SharedMemory(4096, "probe")
    try:
        memory.array[:64] = np.frombuffer(os.urandom(64), np.uint8)
        mapped = map_peer_memory(memory.address)
        if (mapped[:64] != memory.array[:64]).any():
            return "NO: mapped memory shows other bytes"
    except KVMarketError as error:
        return f"NO: {error}"
    finally:
        memory.close()
    return "yes, probed"


def usage(registry: Registry) -> Usage:
    """Count what is in an embedded registry."""
    registry = _embedded(registry)
    return Usage(*registry.usage())


def view_owners(registry: Registry, config: MarketConfig) -> list[OwnerView]:
    """Connect to every region of every live owner and say how, or why not."""
    registry = _embedded(registry)
    selector = TransportSelector(make_transports(config.transport))
    views: list[OwnerView] = []
    for owner, regions in registry.live_owners():
        verdicts = []
        for region_id in regions:
            try:
                wire = registry.region(owner.owner, region_id)
                if wire is None:
                    continue
                descriptor = RegionDescriptor.from_wire(wire)
                connection = selector.connection(owner, region_id, partial(_given, descriptor))
                pages = f"{descriptor.layout.num_pages} pages of {descriptor.layout.page_bytes} bytes"
                verdicts.append(f"region {region_id} ({pages}) by {connection.scheme}, {connection.path}")
            except KVMarketError as error:
                verdicts.append(f"region {region_id} NOT reachable: {error}")
        views.append(OwnerView(str(owner), "; ".join(verdicts) or "lends nothing yet"))
    selector.close()
    return views


def _embedded(registry: Registry) -> LmdbRegistry:
    if not isinstance(registry, LmdbRegistry):
        raise ConfigError(f"the {registry.scheme} registry cannot be looked at from outside")
    return registry


def _given(descriptor: RegionDescriptor) -> RegionDescriptor:
    return descriptor
