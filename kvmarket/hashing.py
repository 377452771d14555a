"""Token ids -> chained block hashes, the same in every process and on every machine.

``h[i] = H(h[i-1] || tokens of block i as little-endian uint32 || extra keys)``, with the namespace digest as ``h[-1]``.
The chain makes a block hash stand for the whole prefix up to and including that block. Python's own ``hash`` is never
used, so PYTHONHASHSEED has no influence.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import numpy as np
import xxhash

from kvmarket.errors import ConfigError, InvalidInputError, MissingExtraError

TokenIds = Any
"""A list, tuple, numpy array or torch tensor of integer token ids, one dimension."""

HashFunction = Callable[[bytes], bytes]

TOKEN_ID_MAX = 2**32 - 1
_TOKEN = np.dtype("<u4")


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _blake3() -> HashFunction:
    try:
        from blake3 import blake3
    except ImportError as error:
        raise MissingExtraError("blake3", "blake3") from error

    def digest(data: bytes) -> bytes:
        return bytes(blake3(data).digest())

    return digest


_FUNCTIONS: dict[str, Callable[[], HashFunction]] = {
    "sha256": lambda: _sha256,
    "blake3": _blake3,
    "xxh3_128": lambda: xxhash.xxh3_128_digest,
    "xxh3_64": lambda: xxhash.xxh3_64_digest,
}
HASH_ALGORITHMS = tuple(_FUNCTIONS)


def hash_function(algorithm: str) -> HashFunction:
    """Return the function for `algorithm`.

    ``sha256`` (default) and ``blake3`` resist chosen collisions; ``xxh3_128`` and ``xxh3_64`` are faster and must only
    be used where every publisher is trusted.

    Raises:
        ConfigError: the algorithm is not one of `HASH_ALGORITHMS`.
        MissingExtraError: its library is not installed.
    """
    if algorithm not in _FUNCTIONS:
        raise ConfigError(f"hash algorithm {algorithm!r} is not one of: {', '.join(HASH_ALGORITHMS)}")
    return _FUNCTIONS[algorithm]()


def token_array(tokens: TokenIds) -> np.ndarray:
    """Return `tokens` as a contiguous (n,) little-endian uint32 array; the input is not modified.

    Raises:
        InvalidInputError: empty, not one-dimensional, not integers, negative, or above `TOKEN_ID_MAX`.
    """
    if type(tokens) is np.ndarray and tokens.dtype == _TOKEN and tokens.ndim == 1 and tokens.size:
        return np.ascontiguousarray(tokens)  # as this function makes them: every value is in range
    if hasattr(tokens, "detach"):  # a torch tensor, on any device
        if tokens.is_floating_point() or tokens.is_complex():  # numpy does not know all of these
            raise InvalidInputError(f"tokens must be integers within [0, {TOKEN_ID_MAX}], not {tokens.dtype}")
        tokens = tokens.detach().cpu().numpy()
    if isinstance(tokens, str | bytes):
        raise InvalidInputError("tokens must be integer ids, not text; tokenise it first")
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise InvalidInputError(f"tokens cannot be read as one array of integers: {error}") from error
    if array.ndim != 1:
        raise InvalidInputError(f"tokens must have one dimension, not shape {array.shape}")
    if array.size == 0:
        raise InvalidInputError("tokens are empty: a prompt needs at least one token")
    if array.dtype.kind not in "iu":
        raise InvalidInputError(f"tokens must be integers within [0, {TOKEN_ID_MAX}], not {array.dtype}")
    if np.minimum.reduce(array) < 0 or np.maximum.reduce(array) > TOKEN_ID_MAX:
        raise InvalidInputError(f"token ids must be within [0, {TOKEN_ID_MAX}]")
    return np.ascontiguousarray(array, dtype="<u4")


def hash_blocks(
    tokens: TokenIds,
    block_size: int,
    *,
    root: bytes,
    algorithm: str = "sha256",
    extra_keys: Sequence[bytes] | None = None,
) -> list[bytes]:
    """Return the chained hash of every full block of `tokens`.

    Args:
        tokens: (n,) token ids.
        block_size: tokens per block; the last ``n % block_size`` tokens are not part of any full block.
        root: what the chain starts from: the namespace digest.
        algorithm: one of `HASH_ALGORITHMS`.
        extra_keys: one entry per full block (empty bytes for none): adapter, image digests and whatever else makes
            equal tokens mean different KV.

    Raises:
        InvalidInputError: see `token_array`; also a bad block size, a wrong number of extra keys, or one not bytes.
    """
    array = token_array(tokens)
    if block_size < 1:
        raise InvalidInputError(f"block_size must be positive, not {block_size}")
    blocks = len(array) // block_size
    if extra_keys is not None and len(extra_keys) != blocks:
        raise InvalidInputError(f"extra_keys has {len(extra_keys)} entries for {blocks} full blocks")
    if extra_keys is not None and not all(isinstance(key, bytes) for key in extra_keys):
        raise InvalidInputError("extra_keys must be bytes, empty where a block has none")
    digest = hash_function(algorithm)
    data = array.tobytes()
    step = 4 * block_size
    out: list[bytes] = []
    parent = root
    if extra_keys is None and algorithm == "sha256":  # the default, in as little Python as can be
        sha256, pieces = hashlib.sha256, struct.unpack(f"{step}s" * blocks, data[: blocks * step])
        return [parent := sha256(parent + piece).digest() for piece in pieces]
    if extra_keys is None:
        for start in range(0, blocks * step, step):
            parent = digest(parent + data[start : start + step])
            out.append(parent)
        return out
    for i, extra in enumerate(extra_keys):
        payload = parent + data[i * step : (i + 1) * step]
        if extra:
            payload += msgpack.packb(extra, use_bin_type=True)
        parent = digest(payload)
        out.append(parent)
    return out
