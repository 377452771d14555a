"""The two kernels against references computed on the host."""

import numpy as np
import pytest

from kvmarket.digest import page_digests, sum128
from kvmarket.region.pages import PagedMemory, PageLayout, Segment
from kvmarket.testing.cuda_owner import Card
from kvmarket.testing.region_owner import page_bytes_of, random_layout
from kvmarket.transport.cuda_kernels import FEW_PAGES, MANY_PAGES, WIDE_BYTES

PAGES = 7


def filled(card, rng, layout, sizes):
    memory = card.memory(layout, sizes)
    for array in memory.memories:
        card.api.upload(rng.bytes(len(array)), array)
    return memory


def on_host(card, memory):
    return PagedMemory(memory.layout, tuple(np.frombuffer(card.api.download(a), np.uint8) for a in memory.memories))


@pytest.fixture
def card():
    return Card(real=True)


@pytest.mark.parametrize("seed", range(40))
def test_copies_are_exact_at_every_alignment(card, seed):
    rng = np.random.default_rng(seed)
    page_bytes = int(rng.choice([1, 3, 16, 250, 1000, 4096, 4100, 8192, 70_001, 131_072]))
    source = filled(card, rng, *random_layout(rng, PAGES, page_bytes))
    target = filled(card, rng, *random_layout(rng, PAGES, page_bytes))
    expected = on_host(card, target)
    expected = PagedMemory(expected.layout, tuple(array.copy() for array in expected.memories))
    sources, targets = rng.integers(0, PAGES, 5), rng.permutation(PAGES)[:5]
    for a, b in zip(sources.tolist(), targets.tolist(), strict=True):
        data = np.frombuffer(page_bytes_of(on_host(card, source), a), np.uint8)
        at = 0
        for view in expected.views(b):
            view[:] = data[at : at + len(view)]
            at += len(view)
    card.api.copy(source, sources, target, targets).wait()
    for found, wanted in zip(on_host(card, target).memories, expected.memories, strict=True):
        assert (found == wanted).all()


def heads_first(num_pages, tokens, heads, width):
    """Pages stored as (page, head, token), with their segments in the order (token, head)."""
    page = tokens * heads * width
    rows = [(h * tokens + t) * width for t in range(tokens) for h in range(heads)]
    return PageLayout(num_pages, tuple(Segment(0, at, page, width) for at in rows)), [num_pages * page]


def test_layouts_are_converted_within_the_copy(card):
    rng = np.random.default_rng(0)
    tokens, heads, width = 16, 8, 256
    page_bytes = tokens * heads * width
    nhd = filled(card, rng, PageLayout.packed(PAGES, page_bytes), [PAGES * page_bytes])
    hnd = card.memory(*heads_first(PAGES, tokens, heads, width))
    order = rng.permutation(PAGES)
    card.api.copy(nhd, order, hnd, np.arange(PAGES)).wait()
    source = on_host(card, nhd).memories[0].reshape(PAGES, tokens, heads, width)
    found = on_host(card, hnd).memories[0].reshape(PAGES, heads, tokens, width)
    assert (found == source[order].transpose(0, 2, 1, 3)).all()
    assert page_digests(hnd, range(PAGES)) == page_digests(nhd, order), "digests do not depend on the layout"


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("page_bytes", [70_001, 131_072, 4096])
def test_a_copy_digests_the_pages_asked_for(card, page_bytes, count):
    rng = np.random.default_rng(count)
    packed = PageLayout.packed(PAGES, page_bytes), [PAGES * page_bytes]
    source, target = filled(card, rng, *packed), card.memory(*packed)
    sources, targets = rng.integers(0, PAGES, 5), rng.permutation(PAGES)[:5]
    for _ in range(3):  # the sums of one launch must not be left over for the next
        transfer = card.api.copy(source, sources, target, targets, np.arange(5) < count)
        transfer.wait()
        expected = [sum128(page_bytes_of(on_host(card, source), page)) for page in sources[:count].tolist()]
        assert transfer.digests.tolist() == expected


def test_a_wide_copy_of_many_scattered_pages_digests_them_all(card):
    rng = np.random.default_rng(1)
    pages, half = 300, 16_384
    layout = PageLayout(pages, tuple(Segment(i, kv * pages * half, half, half) for i in range(3) for kv in range(2)))
    source = filled(card, rng, layout, [2 * pages * half] * 3)
    target = card.memory(layout, [2 * pages * half] * 3)
    for count in (1, 16, 17, 299):  # lists in pinned memory, and on the card
        sources, targets = rng.permutation(pages)[:count], rng.permutation(pages)[:count]
        transfer = card.api.copy(source, sources, target, targets, np.ones(count, bool))
        transfer.wait()
        found, host = on_host(card, target), on_host(card, source)
        expected = [sum128(page_bytes_of(host, page)) for page in sources.tolist()]
        assert transfer.digests.tolist() == expected
        assert [sum128(page_bytes_of(found, page)) for page in targets.tolist()] == expected


@pytest.mark.parametrize("count", [FEW_PAGES, FEW_PAGES + 1, MANY_PAGES, MANY_PAGES + 1])
@pytest.mark.parametrize("digest", [True, None])
def test_page_numbers_come_with_the_launch_or_from_a_list(card, count, digest):
    rng = np.random.default_rng(count)
    packed = PageLayout.packed(MANY_PAGES + 9, WIDE_BYTES), [(MANY_PAGES + 9) * WIDE_BYTES]
    source, target = filled(card, rng, *packed), card.memory(*packed)
    sources, targets = (rng.permutation(MANY_PAGES + 9)[:count] for _ in range(2))
    before = on_host(card, target).memories[0].reshape(-1, WIDE_BYTES)
    for _ in range(2):
        transfer = card.api.copy(source, sources, target, targets, digest)
        transfer.wait()
    host = on_host(card, source).memories[0].reshape(-1, WIDE_BYTES)
    expected = before.copy()
    expected[targets] = host[sources]
    assert (on_host(card, target).memories[0].reshape(-1, WIDE_BYTES) == expected).all()
    assert transfer.digests.tolist() == ([sum128(page) for page in host[sources]] if digest else [])


@pytest.mark.parametrize("seed", range(20))
def test_digests_are_those_of_the_host(card, seed):
    rng = np.random.default_rng(seed)
    page_bytes = int(rng.choice([8, 64, 1000, 4096, 12_288, 70_001, 262_144]))
    aligned = PageLayout.packed(PAGES, page_bytes), [PAGES * page_bytes]
    memory = filled(card, rng, *(aligned if seed % 2 else random_layout(rng, PAGES, page_bytes)))
    pages = rng.integers(0, PAGES, 9)
    expected = [sum128(page_bytes_of(on_host(card, memory), int(page))) for page in pages]
    assert page_digests(memory, pages) == expected


def test_a_page_of_64_layers_is_digested_in_place(card):
    rng = np.random.default_rng(3)
    layout = PageLayout(PAGES, tuple(Segment(i, 0, 4096, 4096) for i in range(64)))
    memory = filled(card, rng, layout, [PAGES * 4096] * 64)
    host = on_host(card, memory)
    assert page_digests(memory, range(PAGES)) == [sum128(page_bytes_of(host, page)) for page in range(PAGES)]
