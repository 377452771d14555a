"""Callers' arrays and tensors as raw pages, without importing torch: shape, dtype and device are checked here."""

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
        spec: what a page is.
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
        dtype, contiguous = str(kv.dtype).removeprefix("torch."), kv.is_contiguous()
        raw = torch.uint8
    elif isinstance(kv, np.ndarray):
        dtype, contiguous = kv.dtype.name, kv.flags.c_contiguous
        raw = np.uint8
        if not kv.dtype.isnative:
            raise InvalidInputError(f"{what} is not in this machine's byte order")
    else:
        raise InvalidInputError(f"{what} must be a numpy array or a torch tensor, not {type(kv).__name__}")
    if dtype not in {spec.dtype, "uint8"}:
        raise InvalidInputError(f"{what} has dtype {dtype}, expected {spec.dtype} (or raw bytes as uint8)")
    if not contiguous:
        raise InvalidInputError(f"{what} must be C-contiguous; call .contiguous() or numpy.ascontiguousarray first")
    blocks = kv.shape[0] if len(kv.shape) else 0
    if len(kv.shape) <= 1 or kv.nbytes != blocks * spec.page_bytes:
        raise InvalidInputError(
            f"{what} has shape {tuple(kv.shape)} with {kv.nbytes} bytes, "
            f"expected (num_blocks, ...) with {spec.page_bytes} bytes per block"
        )
    array: np.ndarray = kv.view(raw) if isinstance(kv, np.ndarray) else kv.detach().view(raw).numpy()
    if writable and not array.flags.writeable:
        raise InvalidInputError(f"{what} is read-only")
    return array.reshape(blocks, spec.page_bytes)
