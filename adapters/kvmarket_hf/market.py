"""One model's caches, shared: fetch the longest published prefix, publish what was computed."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvmarket import (
    DeadlineExceededError,
    InvalidInputError,
    MarketConfig,
    MarketCore,
    MissReason,
    ModelIdentity,
    Namespace,
)
from kvmarket.arena_publish import ArenaPublisher, close_market
from kvmarket.deadline import Deadline
from kvmarket.hashing import token_array
from kvmarket.prefix_keys import PrefixKeys
from kvmarket_hf.identity import cache_spec, engine_facts, model_identity
from kvmarket_hf.pages import empty_cache, fill, paged, tensors_of

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from kvmarket import TransferReport


@dataclass(frozen=True, slots=True)
class FetchedCache:
    """What `CacheMarket.fetch` returns.

    Attributes:
        cache: a `DynamicCache` of the first `tokens` tokens, to pass on as ``past_key_values``; empty after a miss.
        tokens: tokens it holds, all of them proven to be those asked for.
        reason, detail: why it is not more.
        transfers: what carried the bytes, one report per transfer.
        seconds: time taken.
    """

    cache: Any
    tokens: int
    reason: MissReason
    detail: str
    transfers: tuple[TransferReport, ...]
    seconds: float


class CacheMarket:
    """Publishes and fetches the KV cache of one model, on the device where the model is. Thread-safe.

    When the weights change, or adapters are switched, call `bump_epoch` first, and make a new one.

    Args:
        model: a causal language model of transformers, in evaluation mode, with full attention in every layer.
        block_size: tokens per block; only full blocks travel.
        identity: which weights these are; default: a digest of all of them, which takes seconds for a large model.
        config: settings; default: from ``KVMARKET_*``. ``arena_bytes`` is taken on the model's device.

    Raises:
        ConfigError, InvalidInputError, RegistryError: at construction, when something cannot be used.
    """

    def __init__(
        self,
        model: Any,
        *,
        block_size: int = 16,
        identity: ModelIdentity | None = None,
        config: MarketConfig | None = None,
    ) -> None:
        if model.training:
            raise InvalidInputError("the model is in training mode, where its cache is random; call model.eval()")
        self._model, self._spec = model, cache_spec(model, block_size)
        empty_cache(model, self._spec)  # a model that cannot be shared is refused here
        self._config = config or MarketConfig.from_env()
        namespace = Namespace(
            identity or model_identity(model),
            self._spec,
            self._config.hash,
            engine=engine_facts(model),
            **self._config.tenancy(),
        )
        self.core = MarketCore(namespace, self._config)
        self._prefix_keys = PrefixKeys(namespace.digest, block_size, self._config.hash, namespace.sealer)
        self._lock = threading.Lock()
        self._arena: ArenaPublisher | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def fetch(self, tokens: Any, *, deadline_s: float | None = None) -> FetchedCache:
        """Return a cache with the longest published prefix of a prompt; the last token is always left to compute.

        Args:
            tokens: (n,) or (1, n) token ids without padding: list, array or tensor.
            deadline_s: seconds; default `MarketConfig.fetch_deadline_s`.

        Raises:
            InvalidInputError: not the token ids of one prompt.
            MarketClosedError: this market is closed.
        """
        self.core.require_open()
        began = time.perf_counter()
        deadline = Deadline(self._config.fetch_deadline_s if deadline_s is None else deadline_s)
        prompt = _one_prompt(tokens)
        keys = self._prefix_keys.of(prompt)[: (len(prompt) - 1) // self._spec.block_size]
        cache, blocks = empty_cache(self._model, self._spec), 0
        if not keys:
            return FetchedCache(cache, 0, MissReason.SHORT_PROMPT, "", (), time.perf_counter() - began)
        found, reason, detail = self.core.fetcher.lookup(keys)
        transfers: tuple[TransferReport, ...] = ()
        if found.blocks:
            tensors = self._allocate(found.blocks)
            outcome = self.core.fetcher.read(
                found, paged(tensors, self._spec, found.blocks), np.arange(found.blocks), deadline
            )
            blocks, transfers = outcome.blocks, tuple(outcome.transfers)
            if outcome.reason is not MissReason.NONE:
                reason, detail = outcome.reason, outcome.detail
            if blocks:
                fill(cache, tensors, blocks * self._spec.block_size)
        seconds = time.perf_counter() - began
        return FetchedCache(cache, blocks * self._spec.block_size, reason, detail, transfers, seconds)

    def _allocate(self, blocks: int) -> list[torch.Tensor]:
        spec = self._spec
        shape = (1, spec.num_kv_heads, blocks * spec.block_size, spec.head_size)
        dtype, device = getattr(torch, spec.dtype), self._model.device
        return [torch.empty(shape, dtype=dtype, device=device) for _ in range(2 * spec.num_layers)]

    def publish(self, tokens: Any, cache: Any, *, deadline_s: float | None = None) -> int:
        """Offer the full blocks that `cache` holds to every process of the namespace; copies new ones once.

        Args:
            tokens: (n,) or (1, n) token ids without padding; the cache may hold fewer, as it does after ``generate``.
            cache: the model's `DynamicCache` of these tokens.
            deadline_s: seconds; default `MarketConfig.publish_deadline_s`.

        Returns:
            Tokens that peers can fetch now.

        Raises:
            InvalidInputError: the cache is not one of this model and one sequence; nothing was published.
            DeadlineExceededError, RegistryError: the registry did not take them in time, or at all.
        """
        self.core.require_open()
        prompt, tensors = _one_prompt(tokens), tensors_of(cache, self._spec)
        blocks = min(len(prompt), tensors[0].shape[2]) // self._spec.block_size
        deadline = Deadline(self._config.publish_deadline_s if deadline_s is None else deadline_s)
        if not blocks:
            return 0
        keys, pages = self._prefix_keys.of(prompt)[:blocks], paged(tensors, self._spec, blocks)
        with self._lock:
            if self._arena is None:
                self._arena = ArenaPublisher(self.core, like=pages)
            arena = self._arena
            _, announced = arena.put(keys, pages)
        if announced is not None:
            try:
                announced.result(deadline.remaining_s)
            except TimeoutError as error:
                raise DeadlineExceededError("the registry did not take the blocks in time") from error
        with self._lock:
            return arena.offered(keys) * self._spec.block_size

    def bump_epoch(self) -> int:
        """Make every process forget all blocks of this model, for new weights; returns the new epoch."""
        with self._lock:
            epoch = self.core.bump_epoch()
            if self._arena is not None:
                self._arena.clear()
            return epoch

    def close(self) -> None:
        """Take everything back. Idempotent; no fetch may be running."""
        with self._lock:
            arena, self._arena = self._arena, None
        close_market(self.core, arena)


def _one_prompt(tokens: Any) -> np.ndarray:
    shape = tuple(getattr(tokens, "shape", ()))
    if len(shape) == 2:  # noqa: PLR2004 - (batch, tokens)
        if shape[0] != 1:
            raise InvalidInputError(f"expected the token ids of one prompt, not of {shape[0]}")
        tokens = tokens[0]
    return token_array(tokens)
