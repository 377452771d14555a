"""The shape of one KV cache page, and the digest that two processes compare before they exchange one."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import msgpack

from kvmarket.errors import IncompatibleSpecError, InvalidInputError

DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "uint8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
SIZE_MAX = 2**31 - 1
_POSITIVE = ("num_layers", "num_kv_heads", "head_size", "block_size", "tp_size", "pp_size")
_RANKS = (("tp_rank", "tp_size"), ("pp_rank", "pp_size"))
_TEXTS = ("layout", "quantization", "packing")


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """What one page (the bytes of one block of one rank) holds. Immutable; bad values raise `InvalidInputError`.

    Attributes:
        num_layers: attention layers of this rank.
        num_kv_heads: KV heads of this rank (1 for MLA).
        head_size: elements per head (the latent width for MLA).
        dtype: element type, one of `DTYPE_BYTES`.
        block_size: tokens per block.
        layout: axes of a page in memory order, by name: L layer, K key/value, H head, N token, C head element.
        kv_split: True when K and V are both stored; False for an MLA latent.
        quantization: scheme of a quantised cache, or empty.
        packing: engine-specific arrangement inside a row, e.g. a CPU instruction set, or empty.
        tp_rank, tp_size, pp_rank, pp_size: which shard of the model this is.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str
    block_size: int
    layout: str = "LKNHC"
    kv_split: bool = True
    quantization: str = ""
    packing: str = ""
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= SIZE_MAX:
                raise InvalidInputError(f"KVCacheSpec.{name} must be an integer within [1, {SIZE_MAX}], not {value!r}")
        for rank, size in _RANKS:
            value = getattr(self, rank)
            if type(value) is not int or not 0 <= value < getattr(self, size):
                raise InvalidInputError(f"KVCacheSpec.{rank} must be an integer in [0, {size}), not {value!r}")
        if type(self.kv_split) is not bool:
            raise InvalidInputError(f"KVCacheSpec.kv_split must be True or False, not {self.kv_split!r}")
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise InvalidInputError(f"KVCacheSpec.{name} must be text, not {getattr(self, name)!r}")
        if self.dtype not in tuple(DTYPE_BYTES):  # a tuple: what came in may not be hashable
            known = ", ".join(sorted(DTYPE_BYTES))
            raise InvalidInputError(f"KVCacheSpec.dtype {self.dtype!r} is not one of: {known}")

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: layers x (2 if K and V) x heads x head size x tokens x element size."""
        per_token = self.num_layers * (2 if self.kv_split else 1) * self.num_kv_heads * self.head_size
        return per_token * self.block_size * DTYPE_BYTES[self.dtype]

    def as_dict(self) -> dict[str, Any]:
        """Field name -> value, as it travels in the registry."""
        return asdict(self)

    @property
    def fingerprint(self) -> bytes:
        """16 bytes that are equal exactly when every field is: SHA-256 over canonical msgpack, truncated."""
        packed = msgpack.packb(sorted(self.as_dict().items()), use_bin_type=True)
        return hashlib.sha256(b"kvmarket.spec.1" + packed).digest()[:16]

    def require_equal(self, other: KVCacheSpec) -> None:
        """Raise `IncompatibleSpecError` naming the first field in which `other` differs."""
        for name, expected in self.as_dict().items():
            found = getattr(other, name)
            if expected != found:
                raise IncompatibleSpecError(name, expected, found)
