"""The tensors of a `DynamicCache` as pages: nothing is copied, a page is a run of tokens in each head of each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvmarket import InvalidInputError
from kvmarket.cuda import cuda_pages
from kvmarket.region.pages import PagedMemory, PageLayout, Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket import KVCacheSpec


def layout_of(spec: KVCacheSpec, blocks: int, capacity: int) -> PageLayout:
    """Return where the first `blocks` pages lie in contiguous (1, heads, capacity, width) tensors.

    Memory number 2 * layer is that layer's keys, the next one its values.
    """
    row = spec.page_bytes // (spec.num_layers * 2 * spec.num_kv_heads * spec.block_size)
    run = spec.block_size * row
    segments = [
        Segment(memory, head * capacity * row, run, run)
        for memory in range(2 * spec.num_layers)
        for head in range(spec.num_kv_heads)
    ]
    return PageLayout(blocks, tuple(segments))


def paged(tensors: Sequence[torch.Tensor], spec: KVCacheSpec, blocks: int) -> PagedMemory:
    """View contiguous (1, heads, tokens, width) tensors, keys and values of each layer in turn, as pages.

    On a GPU they are pages that are free, or final, once the current stream has come this far.
    """
    layout = layout_of(spec, blocks, tensors[0].shape[2])
    if tensors[0].is_cuda:
        after = torch.cuda.current_stream(tensors[0].device).record_event()
        return cuda_pages(layout, tensors, after)
    return PagedMemory(layout, tuple(tensor.reshape(-1).view(torch.uint8).numpy() for tensor in tensors))


def empty_cache(model: Any, spec: KVCacheSpec) -> Any:
    """Return a `DynamicCache` for `model` that holds nothing.

    Raises:
        InvalidInputError: some layer keeps something else than all keys and values (a window, a state).
    """
    cache = DynamicCache(config=model.config)
    kinds = {type(layer) for layer in cache.layers}
    if kinds != {DynamicLayer} or len(cache.layers) != spec.num_layers:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InvalidInputError(
            f"the model's cache has {len(cache.layers)} layers ({found}); only {spec.num_layers} layers of full "
            "attention can be shared"
        )
    return cache


def tensors_of(cache: Any, spec: KVCacheSpec) -> list[torch.Tensor]:
    """Return the keys and values of each layer in turn, contiguous.

    Raises:
        InvalidInputError: the cache is not one of this spec and of one sequence.
    """
    layers = getattr(cache, "layers", ())
    if len(layers) != spec.num_layers or any(type(layer) is not DynamicLayer for layer in layers):
        raise InvalidInputError(f"expected a DynamicCache of {spec.num_layers} layers of full attention, not {cache!r}")
    tensors = [tensor.detach() for layer in layers for tensor in (layer.keys, layer.values)]
    expected = (1, spec.num_kv_heads, tensors[0].shape[2], spec.head_size)
    for tensor in tensors:
        if tuple(tensor.shape) != expected or str(tensor.dtype) != f"torch.{spec.dtype}":
            raise InvalidInputError(
                f"the cache holds {tensor.dtype} of shape {tuple(tensor.shape)}, expected {spec.dtype} of {expected}"
            )
    return [tensor.contiguous() for tensor in tensors]


def fill(cache: Any, tensors: Sequence[torch.Tensor], tokens: int) -> None:
    """Make the first `tokens` tokens of `tensors` the content of an empty cache; nothing is copied."""
    for number, layer in enumerate(cache.layers):
        keys, values = tensors[2 * number], tensors[2 * number + 1]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys[:, :, :tokens], values[:, :, :tokens]
