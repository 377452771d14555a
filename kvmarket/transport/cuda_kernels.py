"""The kernels of the CUDA transport, and the tables that tell them what to do.

Copies move any number of pages between any two layouts in one launch. `copy_wide` is for pages made of whole slices of
`WIDE_BYTES`, 16-byte aligned on both sides, as engines have them: a block of threads takes one slice of one page.
`copy_any` is for everything else: a warp takes one slice. `copy_wide_sum` is `copy_wide` that adds up the digests
(`kvmarket.digest.sum128`) of what it has just loaded, without a second pass; `copy_few` and `copy_few_sum` are the same
for up to `FEW_PAGES` pages, whose numbers are part of the launch, and `copy_many` and `copy_many_sum` for up to
`MANY_PAGES`, which not every driver takes. `sum_pages` digests pages in place.

Neighbouring blocks take the same slice of different pages, which reads faster than slice after slice of one page.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.digest import GOLDEN, MIX_1, MIX_2, WEIGHT, WORD_BYTES
from kvmarket.region.pages import copy_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.region.pages import PageLayout, Segment

WARP = 32
VECTOR_BYTES = 16
BLOCK_THREADS = 128
WIDE_VECTORS = 4
WIDE_BYTES = BLOCK_THREADS * VECTOR_BYTES * WIDE_VECTORS
"""Each thread of a block has `WIDE_VECTORS` loads of 16 bytes in flight before it stores."""
SLICE_BYTES = 4096
"""What a warp takes at most."""
FEW_PAGES, MANY_PAGES = 256, 2048
"""Arguments of a kernel may have 4 KiB, and from CUDA `MANY_SINCE` on 32,764 bytes."""
MANY_SINCE = 12, 1

_ADDRESSES = ("source", "target", "source_stride", "target_stride")
SLICE = np.dtype(
    [*((name, "u8") for name in _ADDRESSES), ("nbytes", "u4"), ("width", "u4"), ("word", "u4"), ("unused", "u4")]
)
"""A row of the copy table: addresses of the slice in page 0, bytes from page to page, widest access in bytes, and the
number in its page of the first 8-byte word."""


def pages_argument(num_pages: int) -> np.dtype[np.void]:
    """Return the argument of `copy_few` and `copy_few_sum`, or of those for `MANY_PAGES`."""
    head = [(name, "u8") for name in ("slices", "sums", "digests", "page_bytes", "num_pages")]
    return np.dtype([*head, ("source", "u4", num_pages), ("target", "u4", num_pages)])


SUM_BYTES = 24
"""Of one page's sums."""
SPAN = np.dtype([("base", "u8"), ("stride", "u8"), ("word", "u4"), ("words", "u4")])
"""A row of the digest table: where the words of a span are in page 0, and the number of the first one in its page."""

SOURCE = f"""
struct Slice {{
    unsigned long long source, target, source_stride, target_stride;
    unsigned int nbytes, width, word, unused;
}};

__device__ __forceinline__ unsigned long long mix(unsigned long long x) {{
    x = (x ^ x >> 33) * {MIX_1}ull;
    x = (x ^ x >> 33) * {MIX_2}ull;
    return x ^ x >> 33;
}}

// See kvmarket.digest.sum128: adds one word of a page to its sums.
__device__ __forceinline__ void add_word(
        unsigned long long word, unsigned long long index, unsigned long long& a, unsigned long long& b) {{
    const unsigned long long mixed = mix(word ^ (index + 1ull) * {GOLDEN}ull);
    a += mixed;
    b += mixed * (index * {WEIGHT}ull | 1ull);
}}

// Lane 0 gets the sums of its warp.
__device__ __forceinline__ void add_up_warp(unsigned long long& a, unsigned long long& b) {{
    #pragma unroll
    for (int step = {WARP} / 2; step; step >>= 1) {{
        a += __shfl_down_sync(~0u, a, step);
        b += __shfl_down_sync(~0u, b, step);
    }}
}}

template <typename T>
__device__ __forceinline__ void copy_all(const char* from, char* to, unsigned int nbytes, unsigned int lane) {{
    const unsigned int count = nbytes / sizeof(T);
    #pragma unroll 8
    for (unsigned int i = lane; i < count; i += {WARP}u)
        reinterpret_cast<T*>(to)[i] = __ldcg(reinterpret_cast<const T*>(from) + i);
}}

// The sums of one page, and how many of its rows have been added. All zero before a launch, and again after it.
struct Sum {{
    unsigned long long a, b;
    unsigned int rows, unused;
}};

// Adds what one row of a page comes to. Whoever adds the last row makes the digest, in memory of the host, and the sums
// zero for the next launch: each row is fenced before it is counted, so the last one sees all others.
__device__ __forceinline__ void add_row(
        Sum* sum, unsigned int rows, unsigned long long a, unsigned long long b, unsigned long long page_bytes,
        ulonglong2* digest) {{
    atomicAdd(&sum->a, a);
    atomicAdd(&sum->b, b);
    __threadfence();
    if (atomicAdd(&sum->rows, 1u) + 1u != rows) return;
    __threadfence();
    a = atomicExch(&sum->a, 0ull);
    b = atomicExch(&sum->b, 0ull);
    sum->rows = 0;
    const unsigned long long first = mix(a ^ page_bytes);
    *digest = make_ulonglong2(first, mix(b + first));
}}

// Loads go past the first-level cache (ldcg): the owner may be writing, and only the second level is shared with it.
// Thread 0 gets the sums of the slice.
template <bool with_sums>
__device__ __forceinline__ void copy_slice(
        const Slice& slice, unsigned long long from, unsigned long long to, unsigned long long& a,
        unsigned long long& b) {{
    const uint4* source = reinterpret_cast<const uint4*>(slice.source + from * slice.source_stride) + threadIdx.x;
    uint4* target = reinterpret_cast<uint4*>(slice.target + to * slice.target_stride) + threadIdx.x;
    uint4 held[{WIDE_VECTORS}];
    #pragma unroll
    for (int i = 0; i < {WIDE_VECTORS}; ++i) held[i] = __ldcg(source + i * {BLOCK_THREADS});
    #pragma unroll
    for (int i = 0; i < {WIDE_VECTORS}; ++i) target[i * {BLOCK_THREADS}] = held[i];
    if (!with_sums) return;
    a = b = 0;
    #pragma unroll
    for (int i = 0; i < {WIDE_VECTORS}; ++i) {{
        const unsigned long long index = slice.word + 2u * (threadIdx.x + i * {BLOCK_THREADS}u);
        add_word(held[i].x | static_cast<unsigned long long>(held[i].y) << 32, index, a, b);
        add_word(held[i].z | static_cast<unsigned long long>(held[i].w) << 32, index + 1u, a, b);
    }}
    add_up_warp(a, b);
    __shared__ unsigned long long of_warps[2][{BLOCK_THREADS} / {WARP}];
    if (threadIdx.x % {WARP}u == 0) {{
        of_warps[0][threadIdx.x / {WARP}u] = a;
        of_warps[1][threadIdx.x / {WARP}u] = b;
    }}
    __syncthreads();
    if (threadIdx.x == 0) {{
        #pragma unroll
        for (int i = 1; i < {BLOCK_THREADS} / {WARP}; ++i) {{
            a += of_warps[0][i];
            b += of_warps[1][i];
        }}
    }}
}}

template <bool with_sums>
__device__ __forceinline__ void copy_listed(
        const Slice* __restrict__ slices, unsigned int num_pages, const ulonglong2* __restrict__ pages,
        Sum* sums, unsigned long long page_bytes, ulonglong2* digests) {{
    const unsigned int row = blockIdx.x / num_pages, number = blockIdx.x - row * num_pages;
    const ulonglong2 page = pages[number];
    unsigned long long a, b;
    copy_slice<with_sums>(slices[row], page.x, page.y, a, b);
    if (with_sums && threadIdx.x == 0)
        add_row(sums + number, gridDim.x / num_pages, a, b, page_bytes, digests + number);
}}

extern "C" __global__ void __launch_bounds__({BLOCK_THREADS}) copy_wide(
        const Slice* __restrict__ slices, unsigned int num_pages, const ulonglong2* __restrict__ pages,
        unsigned int num_groups) {{
    copy_listed<false>(slices, num_pages, pages, nullptr, 0, nullptr);
}}

extern "C" __global__ void __launch_bounds__({BLOCK_THREADS}) copy_wide_sum(
        const Slice* __restrict__ slices, unsigned int num_pages, const ulonglong2* __restrict__ pages,
        unsigned int num_groups, Sum* sums, unsigned long long page_bytes, ulonglong2* digests) {{
    copy_listed<true>(slices, num_pages, pages, sums, page_bytes, digests);
}}

// A launch of few pages brings their numbers along as its argument: nothing has to be fetched from the host first.
template <unsigned int pages_max>
struct Pages {{
    const Slice* slices;
    Sum* sums;
    ulonglong2* digests;
    unsigned long long page_bytes, num_pages;
    unsigned int source[pages_max], target[pages_max];
}};

template <bool with_sums, unsigned int pages_max>
__device__ __forceinline__ void copy_these(const Pages<pages_max>& these) {{
    const unsigned int num_pages = these.num_pages, row = blockIdx.x / num_pages, number = blockIdx.x - row * num_pages;
    unsigned long long a, b;
    copy_slice<with_sums>(these.slices[row], these.source[number], these.target[number], a, b);
    if (with_sums && threadIdx.x == 0)
        add_row(these.sums + number, gridDim.x / num_pages, a, b, these.page_bytes, these.digests + number);
}}

extern "C" __global__ void __launch_bounds__({BLOCK_THREADS}) copy_few(
        const __grid_constant__ Pages<{FEW_PAGES}> these) {{
    copy_these<false>(these);
}}

extern "C" __global__ void __launch_bounds__({BLOCK_THREADS}) copy_few_sum(
        const __grid_constant__ Pages<{FEW_PAGES}> these) {{
    copy_these<true>(these);
}}

#if MANY
extern "C" __global__ void __launch_bounds__({BLOCK_THREADS}) copy_many(
        const __grid_constant__ Pages<{MANY_PAGES}> these) {{
    copy_these<false>(these);
}}

extern "C" __global__ void __launch_bounds__({BLOCK_THREADS}) copy_many_sum(
        const __grid_constant__ Pages<{MANY_PAGES}> these) {{
    copy_these<true>(these);
}}
#endif

extern "C" __global__ void __launch_bounds__({BLOCK_THREADS}) copy_any(
        const Slice* __restrict__ slices, unsigned int num_pages, const ulonglong2* __restrict__ pages,
        unsigned int num_groups) {{
    const unsigned int warp = (blockIdx.x * {BLOCK_THREADS}u + threadIdx.x) / {WARP}u, lane = threadIdx.x % {WARP}u;
    if (warp >= num_groups) return;
    const unsigned int row = warp / num_pages;
    const Slice slice = slices[row];
    const ulonglong2 page = pages[warp - row * num_pages];
    const char* from = reinterpret_cast<const char*>(slice.source + page.x * slice.source_stride);
    char* to = reinterpret_cast<char*>(slice.target + page.y * slice.target_stride);
    if (slice.width == 16u) copy_all<uint4>(from, to, slice.nbytes, lane);
    else if (slice.width == 4u) copy_all<unsigned int>(from, to, slice.nbytes, lane);
    else copy_all<char>(from, to, slice.nbytes, lane);
}}

struct Span {{
    unsigned long long base, stride;
    unsigned int word, words;
}};

extern "C" __global__ void __launch_bounds__({BLOCK_THREADS}) sum_pages(
        const Span* __restrict__ spans, unsigned int num_pages, const unsigned long long* __restrict__ pages,
        unsigned int num_groups, Sum* sums, unsigned long long page_bytes, ulonglong2* digests) {{
    const unsigned int warp = (blockIdx.x * {BLOCK_THREADS}u + threadIdx.x) / {WARP}u, lane = threadIdx.x % {WARP}u;
    if (warp >= num_groups) return;
    const unsigned int row = warp / num_pages, number = warp - row * num_pages;
    const Span span = spans[row];
    const unsigned long long* words =
        reinterpret_cast<const unsigned long long*>(span.base + pages[number] * span.stride);
    unsigned long long a = 0, b = 0;
    #pragma unroll 8
    for (unsigned int i = lane; i < span.words; i += {WARP}u) {{
        add_word(__ldcg(words + i), span.word + i, a, b);
    }}
    add_up_warp(a, b);
    if (lane == 0) add_row(sums + number, num_groups / num_pages, a, b, page_bytes, digests + number);
}}
"""


def alignment(bases: Sequence[int]) -> int:
    """Return the widest access, 16, 8, 4 or 1 bytes, that suits every address."""
    return next(width for width in (16, 8, 4, 1) if not any(base % width for base in bases))


def copy_table(
    source: PageLayout, source_bases: Sequence[int], target: PageLayout, target_bases: Sequence[int]
) -> tuple[np.ndarray, bool]:
    """Cut the copy of one page into slices.

    Args:
        source: layout of the pages to read.
        source_bases: address of each of its memories.
        target: layout of the pages to write; page size as `source`.
        target_bases: address of each of its memories.

    Returns:
        (slices,) of `SLICE`, and whether they are for `copy_wide`.
    """
    relative, source_memory, target_memory = _slices(source, target, alignment((*source_bases, *target_bases)))
    table = relative.copy()
    table["source"] += np.array(source_bases, np.uint64)[source_memory]
    table["target"] += np.array(target_bases, np.uint64)[target_memory]
    return table, bool((table["nbytes"] == WIDE_BYTES).all())


@lru_cache(maxsize=64)
def _slices(source: PageLayout, target: PageLayout, aligned: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the table for memories at address 0, and the memory numbers of each slice, source and target."""
    pieces = copy_plan(source, target)
    widths = [_width(a, b, aligned) for a, b in pieces]
    wide = all(w == VECTOR_BYTES and a.nbytes % WIDE_BYTES == 0 for (a, _), w in zip(pieces, widths, strict=True))
    rows: list[tuple[int, int, int, int, int, int, int, int]] = []
    memories: list[tuple[int, int]] = []
    position = 0
    for (a, b), width in zip(pieces, widths, strict=True):
        for at, nbytes in _cuts(a.nbytes, width, WIDE_BYTES if wide else SLICE_BYTES):
            # what is left of a piece after whole vectors is narrower than a vector
            narrowed = width if nbytes % width == 0 else 1
            word = (position + at) // WORD_BYTES
            rows.append((a.offset + at, b.offset + at, a.stride, b.stride, nbytes, narrowed, word, 0))
            memories.append((a.memory, b.memory))
        position += a.nbytes
    source_memory, target_memory = np.array(memories).T
    return np.array(rows, SLICE), source_memory, target_memory


def _width(source: Segment, target: Segment, aligned: int) -> int:
    steps = (aligned, source.offset, target.offset, source.stride, target.stride)
    return next(width for width in (VECTOR_BYTES, 4, 1) if not any(step % width for step in steps))


def _cuts(nbytes: int, width: int, most: int) -> list[tuple[int, int]]:
    """Cut a piece into (offset, length) of at most `most` bytes, multiples of `width` but for a short last one."""
    whole = nbytes - nbytes % width
    cuts = [(at, min(most, whole - at)) for at in range(0, whole, most)]
    return cuts if whole == nbytes else [*cuts, (whole, nbytes - whole)]


def digest_table(layout: PageLayout, bases: Sequence[int]) -> np.ndarray | None:
    """Cut the digest of one page into spans of at most `SLICE_BYTES`.

    Returns:
        (spans,) of `SPAN`, or None when some word of a page is not an aligned 8-byte word of one segment: such pages
        are copied to a packed place first.
    """
    if alignment(bases) < WORD_BYTES:
        return None
    found = _spans(layout)
    if found is None:
        return None
    relative, memory = found
    table = relative.copy()
    table["base"] += np.array(bases, np.uint64)[memory]
    return table


@lru_cache(maxsize=64)
def _spans(layout: PageLayout) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the table for memories at address 0, and the memory number of each span."""
    rows: list[tuple[int, int, int, int]] = []
    memories: list[int] = []
    position = 0
    for segment in layout.segments:
        if any(x % WORD_BYTES for x in (segment.offset, segment.stride, segment.nbytes)):
            return None
        for at in range(0, segment.nbytes, SLICE_BYTES):
            words = min(SLICE_BYTES, segment.nbytes - at) // WORD_BYTES
            rows.append((segment.offset + at, segment.stride, (position + at) // WORD_BYTES, words))
            memories.append(segment.memory)
        position += segment.nbytes
    return np.array(rows, SPAN), np.array(memories)
