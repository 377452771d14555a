"""Reproducible specs, prompts and KV for tests: the KV of a block depends on its whole prefix, as a model's does."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.spec import KVCacheSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

SPEC = KVCacheSpec(num_layers=2, num_kv_heads=2, head_size=16, dtype="float16", block_size=16)
"""Pages of 4 KiB."""
VOCAB_SIZE = 50_000


def sample_spec(page_bytes: int = SPEC.page_bytes, **changes: Any) -> KVCacheSpec:
    """Return `SPEC` with pages of about `page_bytes` (a multiple of its own) and further fields changed."""
    return replace(SPEC, **{"num_layers": SPEC.num_layers * page_bytes // SPEC.page_bytes, **changes})


def sample_tokens(seed: int, blocks: int, *, tail: int = 0, block_size: int = SPEC.block_size) -> list[int]:
    """Return the token ids of `blocks` full blocks and `tail` tokens more; a longer prompt of a seed continues it."""
    rng = np.random.default_rng(seed)
    return [int(token) for token in rng.integers(0, VOCAB_SIZE, blocks * block_size + tail)]


def sample_kv(tokens: Sequence[int], spec: KVCacheSpec = SPEC) -> np.ndarray:
    """Return the pages of the full blocks of `tokens`: (blocks, page_bytes) uint8, no two prefixes alike."""
    blocks = len(tokens) // spec.block_size
    pages = np.empty((blocks, spec.page_bytes), np.uint8)
    prefix = hashlib.sha256()
    for block in range(blocks):
        prefix.update(np.asarray(tokens[block * spec.block_size : (block + 1) * spec.block_size], "<u4").tobytes())
        seed = int.from_bytes(prefix.digest()[:8], "little")
        pages[block] = np.random.default_rng(seed).integers(0, 256, spec.page_bytes, np.uint8)
    return pages
