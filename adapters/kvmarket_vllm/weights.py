"""Which weights does this engine serve? A digest of the files, so that a model's folder name is never its identity."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import xxhash

FULL_BYTES_MAX = 4 << 30
"""Checkpoints up to this size are digested whole; larger ones at `SAMPLES` evenly spaced places."""
SAMPLES = 4096
SAMPLE_BYTES = 4096
CHUNK_BYTES = 8 << 20
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def model_identity(vllm_config: Any, model_id: str = "", weights_digest: str = "") -> dict[str, str]:
    """Return the fields of `ModelIdentity` for a vLLM configuration.

    Args:
        vllm_config: vLLM's.
        model_id: what the user calls the model, from ``kv_connector_extra_config``.
        weights_digest: what the user says its weights are.
    """
    model = vllm_config.model_config
    path = Path(model.model)
    local = path.is_dir()
    name = model_id or (_architecture(model) if local else str(model.model))
    digest = weights_digest
    if not digest and getattr(vllm_config.load_config, "load_format", "") == "dummy":
        digest = f"dummy-{model.seed}-{_config_digest(path) if local else ''}"
    elif not digest and local:
        digest = f"{_config_digest(path)}-{weights_files_digest(path)}"
    overrides = getattr(model, "hf_overrides", None)
    if overrides:
        text = json.dumps(overrides, sort_keys=True, default=str)
        digest += f"-overrides-{sha256(text.encode()).hexdigest()[:16]}"
    return {"name": name, "revision": str(model.revision or ""), "weights_digest": digest, "adapter": ""}


def _architecture(model: Any) -> str:
    return str((getattr(model.hf_config, "architectures", None) or ["model"])[0])


def _config_digest(path: Path) -> str:
    config = path / "config.json"
    return sha256(config.read_bytes()).hexdigest()[:16] if config.is_file() else "no-config"


def weights_files_digest(path: Path) -> str:
    """Digest the weight files of a checkpoint directory: sizes, and all bytes or evenly spaced samples of them."""
    files = sorted(file for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES and file.is_file())
    total = sum(file.stat().st_size for file in files)
    state = xxhash.xxh3_128()
    for file in files:
        size = file.stat().st_size
        state.update(f"{size};".encode())
        with file.open("rb") as stream:
            if total <= FULL_BYTES_MAX:
                while chunk := stream.read(CHUNK_BYTES):
                    state.update(chunk)
            else:
                state.update(stream.read(SAMPLE_BYTES))  # the header: names, shapes, dtypes
                count = max(1, SAMPLES * size // total)
                for i in range(count):
                    stream.seek(size * i // count)
                    state.update(stream.read(SAMPLE_BYTES))
    return state.hexdigest()[:24] if files else "no-weights"
