"""vLLM's KV caches as tensors on a card, without an engine: pages are found in them and copied byte for byte."""

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

from kvmarket_vllm.card import card_pages  # noqa: E402

pytestmark = pytest.mark.vllm

L, B, H, N, D = 4, 12, 8, 16, 64


def separate(shape, order):
    """One tensor per layer, with the axes of `shape` in memory in that order, as 0.24 allocates them."""
    memory = [torch.empty([shape[axis] for axis in order], dtype=torch.bfloat16, device="cuda") for _ in range(L)]
    back = [order.index(axis) for axis in range(len(order))]
    return {f"layer{i}": tensor.permute(back) for i, tensor in enumerate(memory)}


def one_buffer(order, rows):
    """Per-layer views (B, H, N, C) of one buffer in a physical order of axes, as 0.32 allocates them."""
    sizes = {"L": L, "B": B, "H": H, "N": N, "C": rows}
    buffer = torch.empty([sizes[axis] for axis in order], dtype=torch.bfloat16, device="cuda")
    whole = buffer.permute([order.index(axis) for axis in "LBHNC"])
    return {f"layer{i}": whole[i] for i in range(L)}


OLD = {
    "0.24 NHD": lambda: separate((B, 2, N, H, D), (0, 1, 2, 3, 4)),
    "0.24 HND": lambda: separate((B, 2, N, H, D), (0, 1, 3, 2, 4)),
    "K and V outermost": lambda: separate((2, B, N, H, D), (0, 1, 2, 3, 4)),
}
NEW = {
    f"0.32 {order}": lambda order=order: one_buffer(order, 2 * D)
    for order in ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
}
LAYOUTS = {**OLD, **NEW}


def filled(name, seed):
    tensors = LAYOUTS[name]()
    torch.manual_seed(seed)
    for tensor in tensors.values():
        tensor.copy_(torch.randn(tensor.shape, device="cuda"))
    return tensors


def block_axis(tensor):
    return tensor.shape.index(B)


def in_memory_order(tensor, block):
    """One block's elements of one layer, in the order in which they lie in memory."""
    part = tensor.select(block_axis(tensor), block)
    return part.permute(sorted(range(part.ndim), key=lambda axis: -part.stride(axis))).flatten()


def page(tensors, block):
    return torch.cat([in_memory_order(tensor, block) for tensor in tensors.values()]).view(torch.int16).cpu()


@pytest.mark.parametrize("source_name", LAYOUTS)
@pytest.mark.parametrize("target_name", LAYOUTS)
def test_pages_are_copied_between_layouts_of_both_versions(source_name, target_name):
    source, target = filled(source_name, 1), filled(target_name, 2)
    before = [page(target, block) for block in range(B)]
    (mine, my_order), (other, other_order) = card_pages(source, B), card_pages(target, B)
    sources, targets = np.array([3, 11, 0, 7, 8]), np.array([5, 1, 9, 0, 10])
    mine.api.copy(mine, sources, other, targets).wait()
    moved = dict(zip(targets.tolist(), sources.tolist(), strict=True))
    for block in range(B):
        expected = page(source, moved[block]) if block in moved else before[block]
        assert torch.equal(page(target, block), expected)
    if my_order == other_order:  # the promise of a name: raw pages mean the same
        for ours, theirs in zip(source.values(), target.values(), strict=True):
            for to, of in moved.items():
                assert torch.equal(theirs.select(block_axis(theirs), to), ours.select(block_axis(ours), of))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_page_has_the_bytes_of_one_block_and_few_segments(name):
    tensors = filled(name, 3)
    pages, order = card_pages(tensors, B)
    assert pages.kind == "cuda"
    assert pages.layout.num_pages == B
    assert pages.layout.page_bytes == L * 2 * N * H * D * 2
    assert len(pages.layout.segments) <= 2 * L * H
    assert order


def test_versions_do_not_share_a_name_unless_their_bytes_mean_the_same():
    old = {card_pages(LAYOUTS[name](), B)[1] for name in OLD}
    new = {card_pages(LAYOUTS[name](), B)[1] for name in NEW}
    assert old.isdisjoint(new)
