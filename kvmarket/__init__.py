"""kvmarket: a memcached for transformer attention states.

One process computes the KV cache of a prefix and publishes it; every other one fetches it, straight from the memory of
the process that holds it.

    async with kvmarket.Marketplace("my-model", spec) as marketplace:
        await marketplace.publish(tokens, kv)
        result = await marketplace.fetch(tokens)
"""

from kvmarket.config import MarketConfig
from kvmarket.core import MarketCore
from kvmarket.errors import (
    ArenaFullError,
    ConfigError,
    DeadlineExceededError,
    IncompatibleSpecError,
    InvalidInputError,
    KVMarketError,
    MarketClosedError,
    MissingExtraError,
    RegistryError,
    TransportError,
)
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.marketplace import Marketplace
from kvmarket.outcome import FetchResult
from kvmarket.report import FetchReport, MatchReport, MissReason, PublishReport, TransferReport
from kvmarket.spec import KVCacheSpec

__version__ = "0.1.0"

__all__ = [
    "ArenaFullError",
    "ConfigError",
    "DeadlineExceededError",
    "FetchReport",
    "FetchResult",
    "IncompatibleSpecError",
    "InvalidInputError",
    "KVCacheSpec",
    "KVMarketError",
    "MarketClosedError",
    "MarketConfig",
    "MarketCore",
    "Marketplace",
    "MatchReport",
    "MissReason",
    "MissingExtraError",
    "ModelIdentity",
    "Namespace",
    "PublishReport",
    "RegistryError",
    "TransferReport",
    "TransportError",
]
