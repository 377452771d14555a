"""The copy plan against the plainest possible copy, over random layouts and page lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmarket.digest import page_digest
from kvmarket.errors import InvalidInputError
from kvmarket.region.pages import PagedMemory, PageLayout, Segment, copy_pages
from kvmarket.testing.region_owner import make_memory, page_bytes_of, random_layout


@st.composite
def copies(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    page_bytes = draw(st.sampled_from([1, 2, 7, 64, 300, 5000, 9000]))
    pages = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    memories = []
    for num_pages in pages:
        packed = draw(st.booleans())
        layout = (
            (PageLayout.packed(num_pages, page_bytes), [num_pages * page_bytes])
            if packed
            else random_layout(rng, num_pages, page_bytes)
        )
        layout[0].check(layout[1])
        memories.append(make_memory(*layout))
    for memory in memories[0].memories:
        memory[:] = rng.integers(0, 256, len(memory), np.uint8)
    targets = draw(st.lists(st.integers(0, pages[1] - 1), unique=True, max_size=pages[1]))
    if draw(st.booleans()):
        targets.sort()
    sources = draw(st.lists(st.integers(0, pages[0] - 1), min_size=len(targets), max_size=len(targets)))
    if draw(st.booleans()):
        sources.sort()
    return memories[0], sources, memories[1], targets


@given(copies())
def test_a_copy_moves_exactly_the_pages_asked_for(copy):
    source, sources, target, targets = copy
    expected = [memory.copy() for memory in target.memories]
    model = PagedMemory(target.layout, tuple(expected))
    for a, b in zip(sources, targets, strict=True):
        data = np.frombuffer(page_bytes_of(source, a), np.uint8)
        at = 0
        for view in model.views(b):
            view[:] = data[at : at + len(view)]
            at += len(view)
    before = [memory.copy() for memory in source.memories]
    copy_pages(source, np.array(sources, np.int64), target, np.array(targets, np.int64))
    assert all((a == b).all() for a, b in zip(target.memories, expected, strict=True))
    assert all((a == b).all() for a, b in zip(source.memories, before, strict=True))


@given(copies())
def test_a_digest_depends_on_the_bytes_and_not_on_where_they_lie(copy):
    source, sources, target, targets = copy
    copy_pages(source, np.array(sources, np.int64), target, np.array(targets, np.int64))
    for a, b in zip(sources, targets, strict=True):
        assert page_digest(source, a) == page_digest(target, b)
        view = target.views(b)[-1]
        view[-1] ^= 1
        assert page_digest(source, a) != page_digest(target, b)


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [([0], [], "1 source pages for 0"), ([2], [0], "outside"), ([0], [2], "outside"), ([-1], [0], "outside")],
)
def test_wrong_page_lists_are_refused(sources, targets, message):
    memory = make_memory(PageLayout.packed(2, 8), [16])
    with pytest.raises(InvalidInputError, match=message):
        copy_pages(memory, np.array(sources, np.int64), memory, np.array(targets, np.int64))


def test_pages_of_different_size_are_refused():
    small, large = make_memory(PageLayout.packed(2, 8), [16]), make_memory(PageLayout.packed(2, 9), [18])
    with pytest.raises(InvalidInputError, match="8 and 9"):
        copy_pages(small, np.array([0]), large, np.array([0]))


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (PageLayout(0, (Segment(0, 0, 8, 8),)), [64]),
        (PageLayout(2, ()), [64]),
        (PageLayout(2, (Segment(1, 0, 8, 8),)), [64]),
        (PageLayout(2, (Segment(-1, 0, 8, 8),)), [64]),
        (PageLayout(2, (Segment(0, -1, 8, 8),)), [64]),
        (PageLayout(2, (Segment(0, 0, 8, 0),)), [64]),
        (PageLayout(2, (Segment(0, 0, -8, 8),)), [64]),
        (PageLayout(2, (Segment(0, 49, 8, 8),)), [64]),
    ],
)
def test_layouts_that_reach_outside_are_refused(layout, sizes):
    with pytest.raises(InvalidInputError):
        layout.check(sizes)
    PageLayout(2, (Segment(0, 48, 8, 8),)).check([64])
