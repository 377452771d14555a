"""Small random decoder models on disk, to drive real inference engines without a download.

A model is a Llama-type checkpoint (``config.json`` and ``model.safetensors``) with weights drawn
from a seeded generator: the same size and seed give the same bytes in every process. There is no
tokenizer; prompts are token ids.

The scale of the weights is chosen so that the model is worth testing with. A naive random model
repeats one token and barely looks at its context, so a corrupted KV cache would go unnoticed.
Here attention is peaked on a few positions and its output rivals the token's own embedding:
greedy outputs vary, and a change far back in the prompt changes them.

Torch and safetensors are imported when a model is written, not before.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    import torch

__all__ = ["BENCH_MODEL", "TINY_MODEL", "ModelSize", "random_prompt", "write_model"]

#: Bumped when the recipe below changes, so that cached checkpoints are written anew.
_RECIPE = 1

#: Standard deviation of a projection's output for an input of unit variance. Query and key are
#: above one so that the softmax over a long context stays peaked instead of averaging it away;
#: the output projection makes up for what averaging remains.
_GAINS = {"q_proj": 2.0, "k_proj": 2.0, "o_proj": 3.0}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The dimensions of a random decoder model.

    Attributes:
        name: Prefix of the checkpoint's directory.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_layers: Decoder layers.
        num_heads: Query heads; ``num_heads * head_size`` may differ from ``hidden_size``.
        num_kv_heads: Key and value heads, a divisor of ``num_heads``.
        head_size: Elements per head.
        vocab_size: Token ids run from 0 to ``vocab_size - 1``.
        max_positions: Longest sequence in tokens.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int = 2048
    max_positions: int = 4096

    @property
    def num_parameters(self) -> int:
        """Weights in the checkpoint, embeddings included."""
        return sum(rows * columns for _, rows, columns in _matrices(self)) + sum(
            self.hidden_size for _ in _norm_names(self)
        )

    def kv_bytes_per_token(self, element_bytes: int = 4) -> int:
        """Bytes of KV cache that one token takes, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * element_bytes


#: About 4 M parameters: starts fast, for tests that compare tokens.
TINY_MODEL = ModelSize("tiny", 256, 640, 4, 8, 2, 32)

#: About 140 M parameters: prefill costs seconds on one thread, for measuring time to first token.
BENCH_MODEL = ModelSize("bench", 1024, 2816, 12, 16, 4, 64)


def write_model(root: str | os.PathLike[str], size: ModelSize, *, seed: int = 0, weights: bool = True) -> Path:
    """Write the checkpoint of ``size`` under ``root`` unless it is there, and return its directory.

    The directory's name carries a digest of size, seed and recipe, so a later call with the same
    arguments finds it. Safe against other processes that write the same model: it is moved into
    place whole.

    Args:
        root: Directory for checkpoints; created if absent.
        size: Dimensions of the model.
        seed: Seed of the weights. Another seed gives an unrelated model of equal shape.
        weights: False writes the configuration only, for engines that make up weights themselves.

    Returns:
        The directory with ``config.json`` and ``model.safetensors`` (bfloat16 weights).

    Raises:
        OSError: The directory cannot be written.
    """
    key = json.dumps([_RECIPE, seed, asdict(size)], sort_keys=True).encode()
    target = Path(root) / f"{size.name}-{hashlib.sha256(key).hexdigest()[:12]}{'' if weights else '-bare'}"
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        staged = Path(scratch) / "model"
        staged.mkdir()
        if weights:
            _write_weights(staged / "model.safetensors", size, seed)
        (staged / "config.json").write_text(json.dumps(_config(size), indent=1, sort_keys=True))
        try:
            staged.rename(target)
        except OSError:
            # Another process was faster: its directory holds the same bytes.
            if not (target / "config.json").exists():
                raise
    return target


def random_prompt(num_tokens: int, *, seed: int, size: ModelSize = TINY_MODEL) -> list[int]:
    """Return ``num_tokens`` uniformly drawn token ids; the same seed gives the same prompt.

    A longer prompt of one seed starts with the shorter one.
    """
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    return [rng.randrange(size.vocab_size) for _ in range(num_tokens)]


def _matrices(size: ModelSize) -> Iterator[tuple[str, int, int]]:
    """Yield (name, rows, columns) of every weight matrix, in the order they are drawn."""
    hidden, inter = size.hidden_size, size.intermediate_size
    queries, kv = size.num_heads * size.head_size, size.num_kv_heads * size.head_size
    yield "model.embed_tokens.weight", size.vocab_size, hidden
    for layer in range(size.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", queries, hidden
        yield f"{prefix}.self_attn.k_proj.weight", kv, hidden
        yield f"{prefix}.self_attn.v_proj.weight", kv, hidden
        yield f"{prefix}.self_attn.o_proj.weight", hidden, queries
        yield f"{prefix}.mlp.gate_proj.weight", inter, hidden
        yield f"{prefix}.mlp.up_proj.weight", inter, hidden
        yield f"{prefix}.mlp.down_proj.weight", hidden, inter
    yield "lm_head.weight", size.vocab_size, hidden


def _norm_names(size: ModelSize) -> Iterator[str]:
    for layer in range(size.num_layers):
        yield f"model.layers.{layer}.input_layernorm.weight"
        yield f"model.layers.{layer}.post_attention_layernorm.weight"
    yield "model.norm.weight"


def _write_weights(path: Path, size: ModelSize, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, rows, columns in _matrices(size):
        weight = torch.randn(rows, columns, generator=generator)
        tensors[name] = (weight * _std(name, columns)).to(torch.bfloat16)
    for name in _norm_names(size):
        tensors[name] = torch.ones(size.hidden_size, dtype=torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})


def _std(name: str, fan_in: int) -> float:
    if name == "model.embed_tokens.weight":
        return 1.0
    module = name.split(".")[-2]
    return float(_GAINS.get(module, 1.0) / fan_in**0.5)


def _config(size: ModelSize) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": size.head_size,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": size.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        # No end token: outputs have the length that was asked for.
        "bos_token_id": None,
        "eos_token_id": None,
    }
