"""Callers' arrays and tensors as raw pages, without importing torch: shape, dtype and device are checked here, by name."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.errors import InvalidInputError

if TYPE_CHECKING:
    from kvmarket.spec import KVCacheSpec


def as_pages(kv: Any, spec: KVCacheSpec, *, writable: bool = False, what: str = "kv") -> np.ndarray:
    """View `kv` as a C-contiguous (num_blocks, page_bytes) uint8 array; nothing is copied.

    Args:
        kv: a numpy array or CPU torch tensor whose first axis is blocks; either uint8 of (num_blocks, page_bytes), or
            the spec's dtype with `page_bytes` bytes per block in any further shape.
        writable: the memory will be written to.
        what: its name, for errors.

    Raises:
        InvalidInputError: not such an array: the message names what was expected and found.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(kv, torch.Tensor):
        if kv.device.type != "cpu":
            raise InvalidInputError(f"{what} is on {kv.device}; only host memory can be used with this transport")
        dtype = str(kv.dtype).removeprefix("torch.")
        if not kv.is_contiguous():
            raise InvalidInputError(f"{what} must be contiguous; call .contiguous() first")
        array = kv.detach().view(torch.uint8).numpy() if kv.dim() else kv.detach().numpy()
    elif isinstance(kv, np.ndarray):
        dtype = kv.dtype.name
        if not kv.flags.c_contiguous:
            raise InvalidInputError(f"{what} must be C-contiguous")
        array = kv.view(np.uint8) if kv.ndim else kv
    else:
        raise InvalidInputError(f"{what} must be a numpy array or a torch tensor, not {type(kv).__name__}")
    if dtype not in (spec.dtype, "uint8"):
        raise InvalidInputError(f"{what} has dtype {dtype}, expected {spec.dtype} (or raw bytes as uint8)")
    blocks = kv.shape[0] if len(kv.shape) else 0
    if len(kv.shape) < 2 or array.nbytes != blocks * spec.page_bytes:
        found = f"shape {tuple(kv.shape)} with {array.nbytes} bytes"
        raise InvalidInputError(
            f"{what} has {found}, expected (num_blocks, ...) with {spec.page_bytes} bytes per block"
        )
    if writable and not array.flags.writeable:
        raise InvalidInputError(f"{what} is read-only")
    return array.reshape(blocks, spec.page_bytes)
