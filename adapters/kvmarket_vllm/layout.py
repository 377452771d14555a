"""Where a block's bytes lie in vLLM's KV cache tensors, found from the tensors themselves."""

from __future__ import annotations

from functools import partial
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from kvmarket.errors import InvalidInputError
from kvmarket.region import PagedMemory, PageLayout, Segment, SharedMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

RUNS_MAX = 512
"""Runs of bytes per block and layer: K and V of every head may lie apart, single rows may not."""


def paged_memory(
    tensors: Mapping[str, torch.Tensor], num_blocks: int, shared: Sequence[SharedMemory]
) -> tuple[PagedMemory, list[SharedMemory], str]:
    """Describe a KV cache in host memory as pages, without copying.

    Args:
        tensors: layer name -> its KV cache, as vLLM registers them.
        num_blocks: blocks in the cache; the block axis is found by it, never by position.
        shared: shared memories that may back the tensors.

    Returns:
        The pages; the shared memories behind them in order, empty when some layer is in private memory; and a name for
        the order of bytes inside a page, equal between two engines exactly when raw bytes may move between them.

    Raises:
        InvalidInputError: a tensor's blocks cannot be described as runs of bytes.
    """
    memories: list[np.ndarray] = []
    owners: list[SharedMemory] = []
    place = partial(_memory_of, shared=shared, memories=memories, owners=owners)
    layout, order = _page_layout(tensors, num_blocks, place)
    private = len(owners) < len(memories)
    return PagedMemory(layout, tuple(memories)), [] if private else owners, order


def storage_layout(tensors: Mapping[str, torch.Tensor], num_blocks: int) -> tuple[PageLayout, list[torch.Tensor], str]:
    """Describe a KV cache on a card as pages over the storages behind its tensors, without copying.

    Args:
        tensors: layer name -> its KV cache, as vLLM registers them.
        num_blocks: as for `paged_memory`.

    Returns:
        The layout; each storage whole, as a flat uint8 tensor, memory number i of the layout being the i-th; and the
        name of the order of bytes, see `paged_memory`.

    Raises:
        InvalidInputError: as for `paged_memory`.
    """
    storages: dict[int, torch.Tensor] = {}

    def place(tensor: torch.Tensor) -> tuple[int, int]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            storages[storage.data_ptr()] = empty.set_(storage)
        return list(storages).index(storage.data_ptr()), tensor.storage_offset() * tensor.element_size()

    layout, order = _page_layout(tensors, num_blocks, place)
    return layout, list(storages.values()), order


def _page_layout(
    tensors: Mapping[str, torch.Tensor], num_blocks: int, place: Callable[[torch.Tensor], tuple[int, int]]
) -> tuple[PageLayout, str]:
    """Return the layout and the name of its order of bytes; `place` says in which memory a tensor begins, and where."""
    segments: list[Segment] = []
    names: list[str] = []
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:  # layers that share one KV cache
            continue
        seen.add(tensor.data_ptr())
        number, base = place(tensor)
        runs, order = _runs_of_block(name, tensor, num_blocks)
        segments += [Segment(number, base + offset, stride, nbytes) for offset, stride, nbytes in runs]
        names.append(order)
    order = names[0] if len(set(names)) == 1 else "+".join(names)
    return PageLayout(num_blocks, tuple(segments)), order


def _memory_of(
    tensor: torch.Tensor, shared: Sequence[SharedMemory], memories: list[np.ndarray], owners: list[SharedMemory]
) -> tuple[int, int]:
    """Return the number of the memory a tensor lies in, added to `memories` if new, and its offset there."""
    storage = tensor.untyped_storage()
    for memory in shared:
        offset = memory.contains(storage.data_ptr(), storage.nbytes())
        if offset is not None:
            if memory not in owners:
                memories.append(memory.array)
                owners.append(memory)
            number = next(i for i, array in enumerate(memories) if array is memory.array)
            return number, offset + tensor.storage_offset() * tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    for number, array in enumerate(memories):
        if array.ctypes.data == flat.ctypes.data:
            return number, tensor.storage_offset() * tensor.element_size()
    memories.append(flat)
    return len(memories) - 1, tensor.storage_offset() * tensor.element_size()


def _runs_of_block(name: str, tensor: torch.Tensor, num_blocks: int) -> tuple[list[tuple[int, int, int]], str]:
    """Return (offset, stride per block, bytes) of every run of bytes of block 0, and the name of their inner order."""
    shape, strides, itemsize = tuple(tensor.shape), tensor.stride(), tensor.element_size()
    candidates = [axis for axis, size in enumerate(shape) if size == num_blocks]
    kernel_blocks = 1
    if not candidates:  # an attention kernel with smaller blocks splits each into several consecutive ones
        candidates = [axis for axis, size in enumerate(shape[:2]) if size > num_blocks and size % num_blocks == 0]
        if candidates:
            kernel_blocks = shape[candidates[0]] // num_blocks
    if not candidates:
        raise InvalidInputError(f"layer {name}: no axis of {shape} has {num_blocks} blocks")
    axis = candidates[0]
    outer = [i for i in range(len(shape)) if i != axis and strides[i] > strides[axis] and shape[i] > 1]
    rest = (i for i in range(len(shape)) if i != axis and i not in outer and shape[i] > 1)
    inner = sorted(rest, key=lambda i: -strides[i])
    length, first = 1, len(inner)  # a run is made of the axes inner[first:], which lie in memory without a gap
    while first and strides[inner[first - 1]] == length:
        first -= 1
        length *= shape[inner[first]]
    apart = [*outer, *inner[:first]]
    count = prod(shape[i] for i in apart)
    if count > RUNS_MAX or any(strides[i] < length for i in apart):
        raise InvalidInputError(
            f"layer {name}: a block of shape {shape} and strides {strides} is scattered over {count} runs"
        )
    if kernel_blocks > 1 and (first or strides[axis] != length):
        raise InvalidInputError(f"layer {name}: the {kernel_blocks} kernel blocks of a block are not adjacent")
    nbytes = length * kernel_blocks * itemsize
    stride = strides[axis] * kernel_blocks * itemsize
    runs = [
        (sum(index * strides[i] for index, i in zip(indices, apart, strict=True)) * itemsize, stride, nbytes)
        for indices in product(*(range(shape[i]) for i in apart))
    ]
    order = f"axes={len(shape)},block={axis},outer={[shape[i] for i in outer]},inner={[(i, shape[i]) for i in inner]}"
    return runs, order if kernel_blocks == 1 else f"{order},split={kernel_blocks}"


def kv_dtype(tensors: Mapping[str, Any]) -> str:
    """Return the one element type of the cache by our name for it."""
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if len(dtypes) != 1:
        raise InvalidInputError(f"layers have different dtypes: {sorted(dtypes)}")
    return dtypes.pop()
