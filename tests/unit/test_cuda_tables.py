"""The tables that the CUDA kernels work off, worked off here on host memory, and the digests that they add up."""

import ctypes

import numpy as np
import pytest

from kvmarket.digest import page_digests, sum128, sum128_final
from kvmarket.errors import InvalidInputError
from kvmarket.region.pages import PagedMemory, PageLayout, Segment, copy_pages
from kvmarket.testing.region_owner import make_memory, page_bytes_of, random_layout
from kvmarket.transport.cuda_kernels import (
    BLOCK_THREADS,
    SLICE,
    SLICE_BYTES,
    SPAN,
    WIDE_BYTES,
    copy_table,
    digest_table,
)

PAGES = 6


def bases(memory):
    return [array.ctypes.data for array in memory.memories]


def work_off(table, source_pages, target_pages):
    """Do what the copy kernels do, and check what they take for granted."""
    for row in table:
        width = int(row["width"])
        assert row["nbytes"] % width == 0
        for a, b in zip(source_pages.tolist(), target_pages.tolist(), strict=True):
            start = int(row["source"]) + a * int(row["source_stride"])
            end = int(row["target"]) + b * int(row["target_stride"])
            assert start % width == 0
            assert end % width == 0
            ctypes.memmove(end, start, int(row["nbytes"]))


@pytest.mark.parametrize("seed", range(30))
def test_working_off_a_copy_table_copies_pages(seed):
    rng = np.random.default_rng(seed)
    page_bytes = int(rng.choice([1, 7, 16, 250, 1000, 4100, 70_001, 131_072]))
    source, target = (make_memory(*random_layout(rng, PAGES, page_bytes)) for _ in range(2))
    for array in source.memories:
        array[:] = rng.integers(0, 256, len(array), np.uint8)
    expected = PagedMemory(target.layout, tuple(array.copy() for array in target.memories))
    pages, places = rng.integers(0, PAGES, 4), rng.permutation(PAGES)[:4]
    copy_pages(source, pages, expected, places)
    table, _ = copy_table(source.layout, bases(source), target.layout, bases(target))
    assert int(table["nbytes"].max()) <= max(SLICE_BYTES, WIDE_BYTES)
    work_off(table, pages, places)
    for found, wanted in zip(target.memories, expected.memories, strict=True):
        assert (found == wanted).all()


def aligned_bases(count, by=4096):
    return [(i + 1) << 30 for i in range(count)] if by else [((i + 1) << 30) + 1 for i in range(count)]


@pytest.mark.parametrize(
    ("nbytes", "stride", "by", "wide", "width"),
    [
        (32 << 10, 32 << 10, 4096, True, 16),
        (32 << 10, (32 << 10) + 8, 4096, False, 4),
        (32 << 10, 32 << 10, 0, False, 1),
        ((32 << 10) + 16, 64 << 10, 4096, False, 16),
        (256, 256, 4096, False, 16),
    ],
)
def test_only_whole_aligned_slices_are_for_the_wide_kernel(nbytes, stride, by, wide, width):
    layout = PageLayout(PAGES, tuple(Segment(i, 0, stride, nbytes) for i in range(3)))
    table, is_wide = copy_table(layout, aligned_bases(3, by), layout, aligned_bases(3))
    assert is_wide is wide
    assert set(table["width"].tolist()) == {width}
    if wide:
        assert len(table) == 3 * nbytes // WIDE_BYTES
        assert WIDE_BYTES % (16 * BLOCK_THREADS) == 0


def test_slices_know_their_place_in_the_page():
    halves = [(0, 0, 8192), (1, 8192, 8192), (0, 65_536, 16_384)]
    source = PageLayout(PAGES, tuple(Segment(m, at, 1 << 17, n) for m, at, n in halves))
    target = PageLayout.packed(PAGES, 32_768)
    table, wide = copy_table(source, aligned_bases(2), target, aligned_bases(1))
    assert wide
    assert table["word"].tolist() == ((table["target"] - (1 << 30)) // 8).tolist() == [0, 1024, 2048, 3072]


def test_rows_have_the_layout_of_the_structs_of_the_kernels():
    assert (SLICE.itemsize, SLICE.fields["nbytes"][1], SLICE.fields["width"][1]) == (48, 32, 36)
    assert SLICE.fields["word"][1] == 40
    assert (SPAN.itemsize, SPAN.fields["word"][1], SPAN.fields["words"][1]) == (24, 16, 20)


def mix(word):
    mask = (1 << 64) - 1
    word = (word ^ word >> 33) * 0xFF51AFD7ED558CCD & mask
    word = (word ^ word >> 33) * 0xC4CEB9FE1A85EC53 & mask
    return word ^ word >> 33


def sum128_by_the_book(data):
    """The formula of the docstring, in plain integers."""
    mask, a, b = (1 << 64) - 1, 0, 0
    padded = data + bytes(-len(data) % 8)
    for i in range(len(padded) // 8):
        t = mix(int.from_bytes(padded[8 * i : 8 * i + 8], "little") ^ (i + 1) * 0x9E3779B97F4A7C15 & mask)
        a, b = (a + t) & mask, (b + t * (i * 0xD6E8FEB86659FD93 & mask | 1)) & mask
    first = mix(a ^ len(data))
    return first.to_bytes(8, "little") + mix((b + first) & mask).to_bytes(8, "little")


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 1000])
def test_sum128_is_its_formula(length):
    data = np.random.default_rng(length).bytes(length)
    assert sum128(data) == sum128_by_the_book(data)


@pytest.mark.parametrize("seed", range(10))
def test_working_off_a_digest_table_gives_sum128_whatever_the_layout(seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 2000, 5)
    nbytes = int(words.sum()) * 8
    layout = PageLayout(PAGES, tuple(Segment(i, 8 * i, int(n) * 8 + 16, int(n) * 8) for i, n in enumerate(words)))
    memory = make_memory(layout, [8 * 5 + PAGES * (int(n) * 8 + 16) for n in words])
    for array in memory.memories:
        array[:] = rng.integers(0, 256, len(array), np.uint8)
    table = digest_table(layout, bases(memory))
    for page in range(PAGES):
        a = b = np.uint64(0)
        for row in table[rng.permutation(len(table))]:
            at = int(row["base"]) + page * int(row["stride"])
            found = np.ctypeslib.as_array((ctypes.c_uint64 * int(row["words"])).from_address(at))
            t = np.array(
                [mix(int(w) ^ (int(row["word"]) + i + 1) * 0x9E3779B97F4A7C15 % 2**64) for i, w in enumerate(found)],
                np.uint64,
            )
            index = np.arange(int(row["word"]), int(row["word"]) + len(t), dtype=np.uint64)
            a = (np.array([a]) + t.sum(dtype=np.uint64))[0]
            b = (np.array([b]) + (t * (index * np.uint64(0xD6E8FEB86659FD93) | np.uint64(1))).sum(dtype=np.uint64))[0]
        assert sum128_final(np.array([[a, b]], np.uint64), nbytes).tolist() == [sum128(page_bytes_of(memory, page))]


@pytest.mark.parametrize(("offset", "stride", "nbytes"), [(4, 64, 64), (0, 60, 48), (0, 64, 60)])
def test_pages_that_are_not_aligned_words_have_no_digest_table(offset, stride, nbytes):
    assert digest_table(PageLayout(PAGES, (Segment(0, offset, stride, nbytes),)), [1 << 30]) is None
    assert digest_table(PageLayout(PAGES, (Segment(0, 0, 64, 64),)), [(1 << 30) + 4]) is None


def test_digests_see_every_bit_and_every_position():
    data = bytearray(np.random.default_rng(0).bytes(4096))
    seen = {sum128(bytes(data))}
    for at in range(0, 4096, 37):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        seen.add(sum128(bytes(changed)))
    swapped = data[8:16] + data[:8] + data[16:]
    assert sum128(bytes(swapped)) not in seen
    assert sum128(bytes(data) + b"\0") not in seen
    assert len(seen) == 1 + len(range(0, 4096, 37))


def test_host_pages_are_digested_by_the_name_asked_for():
    memory = make_memory(*random_layout(np.random.default_rng(1), PAGES, 1000))
    assert page_digests(memory, [2], "sum128") == [sum128(page_bytes_of(memory, 2))]
    assert page_digests(memory, [2]) != page_digests(memory, [2], "sum128")
    with pytest.raises(InvalidInputError, match="sha1"):
        page_digests(memory, [2], "sha1")
