"""Tensors of a cache, seen as pages."""

import numpy as np
import pytest

from kvmarket import KVCacheSpec
from kvmarket.region.pages import PagedMemory, copy_pages

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
pages = pytest.importorskip("kvmarket_hf.pages")


def random_tensors(spec, tokens, seed):
    shape = (1, spec.num_kv_heads, tokens, spec.head_size)
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(2 * spec.num_layers)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layers", "heads", "width", "block"), [(1, 1, 8, 4), (3, 2, 16, 16), (2, 5, 6, 3)])
def test_a_page_is_layer_keys_and_values_head_token(dtype, layers, heads, width, block):
    spec = KVCacheSpec(layers, heads, width, dtype, block, layout="LKHNC")
    tensors = random_tensors(spec, 5 * block + 2, 0)
    memory = pages.paged(tensors, spec, 5)
    packed = np.zeros((5, spec.page_bytes), np.uint8)
    copy_pages(memory, np.arange(5), PagedMemory.packed(packed), np.arange(5))
    for number in range(5):
        rows = [tensor[0, :, number * block : (number + 1) * block] for tensor in tensors]
        expected = torch.stack(rows).contiguous().view(torch.uint8).numpy().tobytes()
        assert packed[number].tobytes() == expected


def test_pages_survive_a_way_through_tensors_of_another_length():
    spec = KVCacheSpec(2, 3, 4, "float16", 8, layout="LKHNC")
    source, target = random_tensors(spec, 40, 1), random_tensors(spec, 24, 2)
    order = np.array([4, 0, 2])
    copy_pages(pages.paged(source, spec, 5), order, pages.paged(target, spec, 3), np.arange(3))
    for a, b in zip(source, target, strict=True):
        assert torch.equal(b, torch.cat([a[:, :, 8 * n : 8 * n + 8] for n in order.tolist()], dim=2))
