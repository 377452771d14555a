"""The namespace of one rank of a vLLM engine: everything that must be equal before a block may be adopted."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm import __version__ as vllm_version

from kvmarket.config import MarketConfig
from kvmarket.errors import ConfigError
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.spec import KVCacheSpec

if TYPE_CHECKING:
    from kvmarket_vllm.messages import WorkerFacts

_OWN_KEYS = ("model_id", "weights_digest")
_MODEL_LENGTH_MATTERS = ("longrope", "dynamic", "su")


def split_extra_config(extra: dict[str, Any]) -> tuple[MarketConfig, dict[str, str]]:
    """Read ``kv_connector_extra_config``: settings of `MarketConfig`, ``model_id``, ``weights_digest``.

    Raises:
        ConfigError: an unknown key or a bad value, by name.
    """
    own = {key: str(extra[key]) for key in _OWN_KEYS if key in extra}
    settings = {key: value for key, value in extra.items() if key not in _OWN_KEYS}
    if "secret" in settings:
        raise ConfigError(
            "kv_connector_extra_config must not hold a secret, since vLLM logs it; "
            "name a file in 'secret_file', or set KVMARKET_SECRET_FILE or KVMARKET_SECRET"
        )
    unknown = sorted(set(settings) - set(MarketConfig.__dataclass_fields__))
    if unknown:
        known = ", ".join([*_OWN_KEYS, *MarketConfig.__dataclass_fields__])
        raise ConfigError(f"unknown kv_connector_extra_config key {unknown[0]!r}; known keys: {known}")
    config = MarketConfig.from_env(**settings)
    return replace(config, secret=config.read_secret(), secret_file=""), own  # both roles must have the same one


def unsupported(vllm_config: Any, kv_cache_config: Any) -> str:
    """Say why this engine's KV cache cannot be shared, or return an empty string."""
    groups = kv_cache_config.kv_cache_groups if kv_cache_config is not None else []
    if len(groups) != 1:
        return f"the model has {len(groups)} KV cache groups; only models with one are supported"
    kind = type(groups[0].kv_cache_spec).__name__
    if "FullAttention" not in kind and "MLA" not in kind:
        return f"its KV cache is a {kind}; only full attention and MLA are supported"
    if not vllm_config.cache_config.enable_prefix_caching:
        return "prefix caching is off; start without --no-enable-prefix-caching"
    return ""


def engine_facts(vllm_config: Any, order: str) -> tuple[tuple[str, str], ...]:
    """Return what else, beyond model and spec, decides the bytes of a block."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    facts = {
        "version": vllm_version,
        "order": order,
        "device": str(vllm_config.device_config.device_type),
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization or ""),
    }
    if not str(cache.prefix_caching_hash_algo).endswith("cbor"):  # hashes go through pickle
        facts["python"] = f"{sys.version_info.major}.{sys.version_info.minor}"
    rope = getattr(model.hf_config, "rope_parameters", None) or getattr(model.hf_config, "rope_scaling", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "")) in _MODEL_LENGTH_MATTERS:
        facts["max_model_len"] = str(model.max_model_len)
    return tuple(sorted(facts.items()))


def hash_algorithm(vllm_config: Any) -> str:
    """Name the engine's block hash algorithm as a namespace does."""
    return f"vllm:{vllm_config.cache_config.prefix_caching_hash_algo}"


def hash_root() -> bytes:
    """Return the root of this process's block hash chains. Only the engine core's process has it, once it is up."""
    from vllm.v1.core import kv_cache_utils

    return bytes(getattr(kv_cache_utils, "NONE_HASH", b"") or b"")


def namespace(facts: WorkerFacts, algorithm: str, root: bytes, config: MarketConfig) -> Namespace:
    """Build the namespace of the rank that `facts` describes."""
    return Namespace(
        model=ModelIdentity(**facts.model),
        spec=KVCacheSpec(**facts.spec),
        algorithm=algorithm,
        root=root,
        engine=facts.engine,
        **config.tenancy(),
    )
