"""How replicas of stock vLLM are started on cards, which several of them share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmarket.testing.shared_prefix import CONNECTOR
from kvmarket.testing.vllm_replica import ReplicaConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BLOCK_SIZE = 16

_ENVIRON = {
    "PYTHONHASHSEED": "0",  # before 0.30 it decides the root of the block hashes
    "TRITON_F32_DEFAULT": "ieee",  # products of float32 would be of TensorFloat-32: then tokens depend on chunks
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it would be compiled on the first use
}


def gpu_replica(
    model: Path,
    runtime_dir: Path,
    *,
    plain: bool = False,
    cards: str = "",
    environ: Mapping[str, str] | None = None,
    engine_args: Mapping[str, Any] | None = None,
    **fields: Any,
) -> ReplicaConfig:
    """Describe a replica on the first card that it sees, with the connector unless `plain`.

    Start it with a `ReplicaHost` that does not preload vLLM. `cards` are those that it sees, its own first, as in
    ``CUDA_VISIBLE_DEVICES``; default: those that this process sees. `fields` are those of `ReplicaConfig`.
    """
    seen = {"CUDA_VISIBLE_DEVICES": cards} if cards else {}
    defaults = {
        "model": model,
        "connector": None if plain else CONNECTOR,
        "block_size": BLOCK_SIZE,
        "environ": {**_ENVIRON, **seen, "KVMARKET_RUNTIME_DIR": str(runtime_dir), **(environ or {})},
        # vLLM asks for this share of the card to be free, and takes what weights and `kv_cache_bytes` come to
        "engine_args": {"gpu_memory_utilization": 0.2, **(engine_args or {})},
    }
    return ReplicaConfig(**{**defaults, **fields})
