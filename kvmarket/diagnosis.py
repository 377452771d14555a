"""What the ``kvmarket`` command shows: facts gathered from a registry and by really trying the transports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.errors import ConfigError, KVMarketError, MissingExtraError, TransportError
from kvmarket.reach import has_ucx, make_transports
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.region.memory import SharedMemory, map_peer_memory
from kvmarket.registry.lmdb import LmdbRegistry
from kvmarket.registry.redis import RedisRegistry
from kvmarket.transport import TransportSelector

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kvmarket.config import MarketConfig
    from kvmarket.registry import Registry


@dataclass(frozen=True, slots=True)
class Usage:
    """How full a registry is: a file's path or a server's URL; a limit of 0 bytes is none."""

    path: Path | str
    used_bytes: int
    limit_bytes: int
    blocks: int
    owners: int
    dead_owners: int


@dataclass(frozen=True, slots=True)
class OwnerView:
    """One live owner as seen from here.

    Attributes:
        name: host and process.
        verdict: how its regions are read, or why not.
        paths: of its first region, (transport, reached, path or reason) in order of preference.
    """

    name: str
    verdict: str
    paths: tuple[tuple[str, bool, str], ...] = ()


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


def check_ucx(config: MarketConfig, environ: Mapping[str, str]) -> list[str]:
    """Start UCX and try it; return what it can do and what would improve it, or why it cannot be used."""
    if not has_ucx():
        return [f"not installed: {MissingExtraError('ucxx', 'ucx')}"]
    from kvmarket.transport.ucx_facts import gather

    try:
        facts = gather(environ)
    except TransportError as error:
        return [f"NO: {error}"]
    listens = "always" if config.transport == "ucx" else "with a registry that other hosts share"
    if config.transport in {"inproc", "shm"}:
        listens = f"never, with KVMARKET_TRANSPORT={config.transport}"
    said = [*facts.lines(), f"owners here listen for it {listens}"]
    return said + [f"to change: {text}" for text in facts.advice()]


def usage(registry: Registry, tag: str = "") -> Usage:
    """Count what is in a registry that processes share, but for namespaces of a secret other than that of `tag`."""
    registry = shared_registry(registry)
    return Usage(*registry.usage(tag))


def view_owners(registry: Registry, config: MarketConfig, *, explain: bool = False) -> list[OwnerView]:
    """Connect to every region of every live owner and say how, or why not; `explain`: of every transport."""
    registry = shared_registry(registry)
    selector = TransportSelector(make_transports(config, os.environ, config.read_secret()))
    views: list[OwnerView] = []
    for owner, regions in registry.live_owners():
        verdicts: list[str] = []
        paths: tuple[tuple[str, bool, str], ...] = ()
        for region_id in regions:
            try:
                wire = registry.region(owner.owner, region_id)
                if wire is None:
                    continue
                descriptor = RegionDescriptor.from_wire(wire)
                if explain and not paths:
                    paths = tuple(selector.explain(owner, descriptor))
                connection = selector.connection(owner, region_id, partial(_given, descriptor), prove=True)
                pages = f"{descriptor.layout.num_pages} pages of {descriptor.layout.page_bytes} bytes"
                verdicts.append(f"region {region_id} ({pages}) by {connection.scheme}, {connection.path}")
            except KVMarketError as error:
                verdicts.append(f"region {region_id} NOT reachable: {error}")
        views.append(OwnerView(str(owner), "; ".join(verdicts) or "lends nothing yet", paths))
    selector.close()
    return views


def shared_registry(registry: Registry) -> LmdbRegistry | RedisRegistry:
    """Return a registry that processes share, or raise `ConfigError`."""
    if not isinstance(registry, LmdbRegistry | RedisRegistry):
        raise ConfigError(f"the {registry.scheme} registry cannot be looked at from outside")
    return registry


def _given(descriptor: RegionDescriptor) -> RegionDescriptor:
    return descriptor
