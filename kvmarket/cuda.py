"""CUDA tensors as pages, to lend or to fetch into. Needs cupy; importing this module does not."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kvmarket.errors import InvalidInputError
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import PageLayout
from kvmarket.transport.cuda_runtime import load_cuda

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.spec import KVCacheSpec


def is_cuda(tensor: Any) -> bool:
    """Tell whether `tensor` is a torch tensor on a GPU or a cupy array, without importing either."""
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return bool(tensor.is_cuda)
    return cupy is not None and isinstance(tensor, cupy.ndarray)


def cuda_pages(layout: PageLayout, tensors: Sequence[Any], after: Any = None) -> CudaPagedMemory:
    """View the memory of CUDA tensors as pages; nothing is copied.

    Args:
        layout: where the segments of a page lie; memory number i is ``tensors[i]``, byte 0 its first byte.
        tensors: torch tensors or cupy arrays of one card, each dense in some order of its axes.
        after: see `CudaPagedMemory`.

    Raises:
        InvalidInputError: the layout does not fit, or the tensors lie on several cards or have holes.
        MissingExtraError: cupy is not installed.
    """
    return CudaPagedMemory.of(load_cuda(), layout, [cuda_bytes(tensor) for tensor in tensors], after)


def packed_cuda_pages(tensor: Any, spec: KVCacheSpec, what: str = "kv") -> CudaPagedMemory:
    """View one CUDA tensor, first axis blocks, as packed pages that are free once the current stream has come this far.

    Args:
        tensor: uint8 or the spec's dtype, with `page_bytes` bytes per block.
        spec: what a page is.
        what: its name, for errors.

    Raises:
        InvalidInputError: not such a tensor: the message names what was expected and found.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in {spec.dtype, "uint8"}:
        raise InvalidInputError(f"{what} has dtype {dtype}, expected {spec.dtype} (or raw bytes as uint8)")
    blocks = tensor.shape[0] if len(tensor.shape) else 0
    if len(tensor.shape) <= 1 or blocks == 0 or tensor.nbytes != blocks * spec.page_bytes:
        raise InvalidInputError(
            f"{what} has shape {tuple(tensor.shape)} with {tensor.nbytes} bytes, "
            f"expected (num_blocks, ...) with {spec.page_bytes} bytes per block"
        )
    contiguous = tensor.is_contiguous() if hasattr(tensor, "is_contiguous") else tensor.flags.c_contiguous
    if not contiguous:
        raise InvalidInputError(f"{what} must be C-contiguous; call .contiguous() or cupy.ascontiguousarray first")
    return cuda_pages(PageLayout.packed(blocks, spec.page_bytes), [tensor], _recorded(tensor))


def event_behind(stream: Any) -> Any:
    """Return an event behind everything that a stream of torch or cupy holds now, or None when that has ended already.

    Waiting for an event of another stream takes a card some 10 us, passed or not.
    """
    if hasattr(stream, "record_event"):  # torch's
        return None if stream.query() else stream.record_event()
    return None if stream.done else stream.record()


def _recorded(tensor: Any) -> Any:
    """Return `event_behind` the caller's current stream of the tensor's card."""
    if hasattr(tensor, "is_cuda"):
        return event_behind(sys.modules["torch"].cuda.current_stream(tensor.device))
    with tensor.device:  # an event is made on the card that is current
        return event_behind(sys.modules["cupy"].cuda.get_current_stream())


def cuda_bytes(tensor: Any) -> Any:
    """View the memory of a CUDA tensor as a flat uint8 array; nothing is copied.

    Args:
        tensor: a torch tensor on a GPU or a cupy array, dense in some order of its axes.

    Raises:
        InvalidInputError: it is neither, or has holes.
        MissingExtraError: cupy is not installed.
    """
    cupy = load_cuda().cupy
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor) and tensor.is_cuda:
        steps = sorted(zip(tensor.stride(), tensor.shape, strict=True))
        pointer, nbytes, device = tensor.data_ptr(), tensor.numel() * tensor.element_size(), tensor.device.index
    elif isinstance(tensor, cupy.ndarray):
        strides = [stride // tensor.itemsize for stride in tensor.strides]
        steps = sorted(zip(strides, tensor.shape, strict=True))
        pointer, nbytes, device = tensor.data.ptr, tensor.nbytes, tensor.data.device_id
    else:
        raise InvalidInputError(f"expected a CUDA tensor of torch or a cupy array, not {type(tensor).__name__}")
    dense = 1
    for stride, size in steps:
        if size > 1 and stride != dense:
            raise InvalidInputError("the tensor has holes or overlaps: lend the tensor it is a view of")
        dense *= size
    if nbytes == 0:
        raise InvalidInputError("the tensor is empty")
    memory = cupy.cuda.UnownedMemory(pointer, nbytes, tensor, device)
    return cupy.ndarray((nbytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
