"""What decides the bytes of a model's KV cache: its weights and configuration, the page, the software."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import transformers
import xxhash

from kvmarket import InvalidInputError, KVCacheSpec, ModelIdentity

_NAMES = ("_name_or_path", "transformers_version")
"""Entries of a configuration that say where it came from, not what it computes."""


def cache_spec(model: Any, block_size: int = 16) -> KVCacheSpec:
    """Return the page of a model's KV cache; heads come before tokens, as in a `DynamicCache`.

    Raises:
        InvalidInputError: its configuration does not say how many heads there are and how wide.
    """
    config = model.config.get_text_config()
    try:
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        dtype = str(model.dtype).removeprefix("torch.")
        return KVCacheSpec(config.num_hidden_layers, kv_heads, width, dtype, block_size, layout="LKHNC")
    except AttributeError as error:
        raise InvalidInputError(f"the model's configuration does not describe its KV cache: {error}") from error


def model_identity(model: Any) -> ModelIdentity:
    """Digest every weight and buffer of `model`, and its configuration. Reads all of it: seconds for a large model.

    Where the weights come from does not count, so two processes agree whatever their folders are called.
    """
    state = xxhash.xxh3_128()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        state.update(raw.numpy().data)
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NAMES}
    text = json.dumps(config, sort_keys=True, default=str)
    digest = f"{hashlib.sha256(text.encode()).hexdigest()[:16]}-{state.hexdigest()}"
    return ModelIdentity(type(model).__name__, weights_digest=digest)


def engine_facts(model: Any) -> tuple[tuple[str, str], ...]:
    """Return what else must be equal: the same weights give other bytes under other kernels."""
    return (
        ("engine", "transformers"),
        ("transformers", transformers.__version__),
        ("torch", str(torch.__version__)),
        ("device", model.device.type),
        ("attention", str(getattr(model.config, "_attn_implementation", ""))),
    )
