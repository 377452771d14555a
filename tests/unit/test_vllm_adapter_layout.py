"""Where a block's bytes lie, found from tensors of every layout that vLLM has had."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvmarket.errors import InvalidInputError  # noqa: E402
from kvmarket.region import PagedMemory, SharedMemory  # noqa: E402
from kvmarket.region.cuda import CudaPagedMemory  # noqa: E402
from kvmarket.region.pages import copy_pages  # noqa: E402
from kvmarket.testing.host_cuda import HostCuda  # noqa: E402
from kvmarket_vllm import card  # noqa: E402
from kvmarket_vllm.layout import kv_dtype, paged_memory, storage_layout  # noqa: E402

L, B, H, N, D = 3, 7, 2, 4, 8
PHYSICAL = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


def separate(shape, dtype=torch.float32):
    """One tensor per layer, each with memory of its own."""
    return {f"layer{i}": torch.zeros(shape, dtype=dtype) for i in range(L)}


def views(order, blocks=B, storage=None):
    """Per-layer views (B, H, N, 2 D) of one buffer in a physical order of axes."""
    sizes = {"L": L, "B": blocks, "H": H, "N": N, "C": 2 * D}
    if storage is None:
        storage = torch.zeros(L * blocks * H * N * 2 * D)
    whole = storage.view([sizes[axis] for axis in order]).permute([order.index(axis) for axis in "LBHNC"])
    return {f"layer{i}": whole[i] for i in range(L)}


def axis_of_blocks(tensor, blocks=B):
    return tensor.shape.index(blocks)


def fill(tensors, blocks=B):
    """Write a different number into every element of every block; return what each block holds, in order of axes."""
    count = 1.0
    for tensor in tensors.values():
        values = torch.arange(count, count + tensor.numel()).view(tensor.shape)
        tensor.copy_(values)
        count += tensor.numel()
    return [
        sorted(
            x
            for tensor in tensors.values()
            for x in tensor.select(axis_of_blocks(tensor, blocks), b).flatten().tolist()
        )
        for b in range(blocks)
    ]


def page(memory, number):
    return np.concatenate([view.view(np.float32) for view in memory.views(number)])


LAYOUTS = {
    "K and V outermost, tokens first": lambda: separate((2, B, N, H, D)),
    "K and V outermost, heads first": lambda: separate((2, B, H, N, D)),
    "K and V inside a block": lambda: separate((B, 2, N, H, D)),
    "rows of K and V side by side": lambda: separate((B, H, N, 2 * D)),
    "rows of K, then of V": lambda: separate((B, H, 2 * N, D)),
    "a latent": lambda: separate((B, N, D)),
    "heads apart": lambda: {k: t[:, :, :N] for k, t in separate((B, H, N + 1, 2 * D)).items()},
    "heads strided under tokens": lambda: {k: t.transpose(2, 3) for k, t in separate((2, B, H, N, D)).items()},
    **{order: lambda order=order: views(order) for order in PHYSICAL},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_page_is_the_bytes_of_one_block_in_all_layers(name):
    tensors = LAYOUTS[name]()
    expected = fill(tensors)
    memory, shared, _ = paged_memory(tensors, B, [])
    assert shared == []
    assert memory.layout.num_pages == B
    assert memory.layout.page_bytes == sum(t.numel() for t in tensors.values()) * 4 // B
    memory.layout.check([len(each) for each in memory.memories])
    for number in range(B):
        assert sorted(page(memory, number).tolist()) == expected[number]


@pytest.mark.parametrize("source", PHYSICAL)
@pytest.mark.parametrize("target", PHYSICAL)
def test_bytes_move_between_layouts_of_one_order_and_only_those_have_one_name(source, target):
    """Equal names promise that raw pages mean the same; pools of different sizes are no obstacle."""
    here, there = views(source), views(target, blocks=5)
    fill(here)
    mine, _, order = paged_memory(here, B, [])
    other, _, other_order = paged_memory(there, 5, [])
    copy_pages(mine, np.array([6, 2]), other, np.array([0, 4]))
    same = all(torch.equal(there[k][0], here[k][6]) and torch.equal(there[k][4], here[k][2]) for k in here)
    inner = [order.replace("L", "").replace("B", "") for order in (source, target)]
    assert same is (inner[0] == inner[1])
    if order == other_order:
        assert same


def test_blocks_that_a_kernel_splits():
    tensors = separate((2 * B, H, N // 2, 2 * D))
    for tensor in tensors.values():
        tensor.copy_(torch.arange(2 * B).view(-1, 1, 1, 1).expand(tensor.shape))
    memory, _, order = paged_memory(tensors, B, [])
    for number in range(B):
        assert set(page(memory, number).tolist()) == {2.0 * number, 2.0 * number + 1}
    assert order != paged_memory(separate((B, H, N, 2 * D)), B, [])[2]


def test_split_blocks_behind_k_and_v():
    tensors = separate((2, 3 * B, N, H, D))
    for tensor in tensors.values():
        tensor.copy_(torch.arange(3 * B).view(1, -1, 1, 1, 1).expand(tensor.shape))
    memory, _, _ = paged_memory(tensors, B, [])
    assert set(page(memory, 4).tolist()) == {12.0, 13.0, 14.0}
    assert len(memory.layout.segments) == 2 * L


def test_tensors_in_shared_memory_are_recognised():
    shared = SharedMemory(L * B * H * N * 2 * D * 4, "test")
    other = SharedMemory(4096, "unrelated")
    tensors = views("LBHNC", storage=torch.from_numpy(shared.array).view(torch.float32))
    expected = fill(tensors)
    memory, owners, _ = paged_memory(tensors, B, [other, shared])
    assert owners == [shared]
    assert len(memory.memories) == 1
    assert sorted(page(memory, 3).tolist()) == expected[3]
    # One layer elsewhere, and peers could not read whole pages: then none is offered.
    mixed = {**tensors, "layer3": torch.zeros(B, H, N, 2 * D)}
    assert paged_memory(mixed, B, [shared])[1] == []
    del tensors, mixed, memory, owners
    shared.close()
    other.close()


def test_layers_that_share_one_cache_count_once():
    tensors = separate((B, H, N, 2 * D))
    alone = paged_memory(tensors, B, [])[0].layout
    tensors["twin"] = tensors["layer0"]
    assert paged_memory(tensors, B, [])[0].layout == alone


def test_layers_of_different_shapes_have_an_order_of_their_own():
    tensors = {"a": torch.zeros(B, H, N, 2 * D), "b": torch.zeros(2, B, N, H, D)}
    memory, _, order = paged_memory(tensors, B, [])
    assert memory.layout.page_bytes == 2 * H * N * 2 * D * 4
    assert order != paged_memory({"b": tensors["b"], "a": tensors["a"]}, B, [])[2]


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(B, H, 512, D + 8)[..., :D], "scattered over 1024 runs"),
        (torch.zeros(B, H, N, 512)[..., ::2], "scattered over 2048 runs"),
        (torch.zeros(B, 1, N, D).expand(B, H, N, D), "scattered over"),
        (torch.zeros(5, H, N, D), "no axis of"),
        (torch.zeros(2 * B, H, N + 1, D)[:, :, :N], "are not adjacent"),
        (torch.zeros(2 * B, 2, H, N, D)[:, 0], "are not adjacent"),
    ],
)
def test_what_is_not_runs_of_bytes_is_refused(tensor, said):
    with pytest.raises(InvalidInputError, match=said) as caught:
        paged_memory({"model.layers.0": tensor}, B, [])
    assert "model.layers.0" in str(caught.value)


def test_one_element_type():
    assert kv_dtype({"a": torch.zeros(1, dtype=torch.bfloat16)}) == "bfloat16"
    with pytest.raises(InvalidInputError, match="different dtypes"):
        kv_dtype({"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.float16)})


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_card_is_described_by_its_storages_like_the_host(name):
    """Here with tensors in host memory: where blocks lie does not depend on the device."""
    tensors = LAYOUTS[name]()
    expected = fill(tensors)
    layout, storages, order = storage_layout(tensors, B)
    assert order == paged_memory(tensors, B, [])[2]
    assert all(storage.dtype == torch.uint8 and storage.dim() == 1 for storage in storages)
    memory = PagedMemory(layout, tuple(storage.numpy() for storage in storages))
    layout.check([len(each) for each in memory.memories])
    for number in range(B):
        assert sorted(page(memory, number).tolist()) == expected[number]


def test_pages_of_a_card_are_copied_and_digested_once_before_they_are_needed(monkeypatch):
    """What the kernels are compiled for; with the host's stand-in for a card."""
    api, calls = HostCuda(), []
    monkeypatch.setattr(api, "digests", lambda memory, pages: calls.append(pages.tolist()))
    copy = api.copy
    monkeypatch.setattr(api, "copy", lambda *args: calls.append("copy") or copy(*args))

    def on_card(layout, storages):
        arrays = [api.allocate(storage.numel(), 0) for storage in storages]
        return CudaPagedMemory.of(api, layout, arrays)

    monkeypatch.setattr(card, "cuda_pages", on_card)
    pages, order = card.card_pages(LAYOUTS["K and V inside a block"](), B)
    assert (pages.kind, pages.layout.num_pages, pages.after) == ("cuda", B, None)
    assert order == paged_memory(LAYOUTS["K and V inside a block"](), B, [])[2]
    assert calls == ["copy", [0], [0]]
    del pages
    api.close()
