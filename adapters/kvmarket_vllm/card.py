"""A KV cache in the memory of a card: its pages, and their order with the work that the engine launches there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvmarket.cuda import cuda_pages, event_behind
from kvmarket.region import PageLayout
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket_vllm.layout import storage_layout

if TYPE_CHECKING:
    from collections.abc import Mapping


def card_pages(tensors: Mapping[str, torch.Tensor], num_blocks: int) -> tuple[CudaPagedMemory, str]:
    """Describe a KV cache on a card as pages, without copying, and make ready what reads and digests them.

    Returns:
        The pages, and the name of the order of bytes inside a page, see `kvmarket_vllm.layout.paged_memory`.

    Raises:
        InvalidInputError: the tensors' blocks cannot be described as runs of bytes, or lie on several cards.
        MissingExtraError: cupy is not installed.
        TransportError: the card cannot be used.
    """
    layout, storages, order = storage_layout(tensors, num_blocks)
    pages = cuda_pages(layout, storages)
    _warm_up(pages)
    return pages, order


def _warm_up(pages: CudaPagedMemory) -> None:
    """Copy and digest one page, to nowhere: the kernels are compiled now, not within the deadline of a fetch."""
    api, page = pages.api, np.zeros(1, np.int64)
    nowhere = PageLayout.packed(1, pages.layout.page_bytes)
    target = CudaPagedMemory.of(api, nowhere, [api.allocate(pages.layout.page_bytes, pages.device)])
    api.copy(pages, page, target, page, np.ones(1, bool)).wait()
    api.digests(pages, page)


def launched_work() -> Any:
    """Return an event behind everything that this thread has launched so far, as vLLM does: on its current stream."""
    return torch.cuda.current_stream().record_event()


def behind_launched_work(pages: CudaPagedMemory) -> CudaPagedMemory:
    """Return `pages` to be written to behind everything that this thread has launched so far.

    Mostly nothing of it is left when a load begins in a step without a forward: then nothing is recorded or waited for.
    """
    after = event_behind(torch.cuda.current_stream())
    return pages if after is None else replace(pages, after=after)
