"""Who holds which block: one interface; in memory, a file for a host's processes, a server for many hosts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmarket.registry.base import LookupResult, NamespaceInfo, Registry
from kvmarket.registry.records import BlockRecords, block_keys
from kvmarket.server_url import is_server_url

if TYPE_CHECKING:
    from kvmarket.config import MarketConfig

__all__ = ["BlockRecords", "LookupResult", "NamespaceInfo", "Registry", "block_keys", "open_registry"]


def open_registry(config: MarketConfig) -> Registry:
    """Open the registry that `config` names."""
    if config.registry == "memory":
        from kvmarket.registry.memory import MemoryRegistry

        return MemoryRegistry()
    if is_server_url(config.registry):
        from kvmarket.registry.redis import RedisRegistry

        return RedisRegistry(config.registry)
    from kvmarket.registry.lmdb import LmdbRegistry

    return LmdbRegistry(config.directory, map_bytes=config.registry_bytes)
