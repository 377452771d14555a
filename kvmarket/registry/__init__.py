"""Who holds which block: one interface, a reference in memory and an embedded file shared by a host's processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmarket.registry.base import LookupResult, NamespaceInfo, Registry
from kvmarket.registry.records import BlockRecords, block_keys

if TYPE_CHECKING:
    from kvmarket.config import MarketConfig

__all__ = ["BlockRecords", "LookupResult", "NamespaceInfo", "Registry", "block_keys", "open_registry"]


def open_registry(config: MarketConfig) -> Registry:
    """Open the registry that `config` names."""
    if config.registry == "memory":
        from kvmarket.registry.memory import MemoryRegistry

        return MemoryRegistry()
    from kvmarket.registry.lmdb import LmdbRegistry

    return LmdbRegistry(config.directory, map_bytes=config.registry_bytes)
