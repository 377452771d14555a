"""Page digests: one over the bytes of a page, segment by segment in page order, wherever they lie.

`xxh3_128` is for pages in host memory. `sum128` is for pages on a GPU: a sum over 8-byte words, each mixed with its
position, which thousands of threads compute in any order. Neither is made against an adversary: they find bytes that
were torn, misplaced or damaged. What an owner used is in its region's descriptor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xxhash

from kvmarket.announced import DIGEST_BYTES
from kvmarket.errors import InvalidInputError
from kvmarket.region.cuda import CudaPagedMemory

if TYPE_CHECKING:
    from kvmarket.region.pages import PagedMemory

WORD_BYTES = 8
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
WEIGHT = 0xD6E8FEB86659FD93


def page_digests(memory: PagedMemory, pages: np.ndarray, algorithm: str = "") -> list[bytes]:
    """Return the 16-byte digest of each page. The order of a page's segments counts, where they lie does not.

    Args:
        memory: where the pages are.
        pages: (n,) page numbers.
        algorithm: ``xxh3_128`` or ``sum128``; default: the one for this kind of memory.

    Raises:
        InvalidInputError: this memory cannot be digested that way; ask `can_digest` first.
    """
    algorithm = algorithm or default_digest(memory.kind)
    if not can_digest(memory.kind, algorithm):
        raise InvalidInputError(f"{algorithm} of {memory.kind} memory is not supported")
    if isinstance(memory, CudaPagedMemory):
        found: list[bytes] = memory.api.digests(memory, np.asarray(pages, np.int64)).tolist()
        return found
    if algorithm == "sum128":
        return [sum128(np.concatenate(memory.views(page))) for page in np.asarray(pages, np.int64).tolist()]
    return _xxh3_128(memory, pages)


def page_digest(memory: PagedMemory, page: int) -> bytes:
    """Return the digest of one page."""
    return page_digests(memory, np.array([page]))[0]


def _xxh3_128(memory: PagedMemory, pages: np.ndarray) -> list[bytes]:
    places = [
        (memory.memories[s.memory].data, s.nbytes, (s.offset + np.asarray(pages, np.int64) * s.stride).tolist())
        for s in memory.layout.segments
    ]
    if len(places) == 1:  # a packed page: one call, and nothing of Python around it
        digest, (data, nbytes, offsets) = xxhash.xxh3_128_digest, places[0]
        return [digest(data[offset : offset + nbytes]) for offset in offsets]
    states = [xxhash.xxh3_128() for _ in pages]
    for number, state in enumerate(states):
        for data, nbytes, offsets in places:
            offset = offsets[number]
            state.update(data[offset : offset + nbytes])
    return [state.digest() for state in states]


def default_digest(kind: str) -> str:
    """Return the name of the digest that owners compute of pages in this kind of memory."""
    return "sum128" if kind == "cuda" else "xxh3_128"


def can_digest(kind: str, algorithm: str) -> bool:
    """Tell whether this version computes that digest of pages in that kind of memory."""
    return algorithm == "sum128" or (kind == "host" and algorithm == "xxh3_128")


def sum128(data: bytes | np.ndarray) -> bytes:
    """Return the sum128 of the bytes of one page, on the host.

    Words w[i] are little-endian 64-bit, the last one filled up with zeros. With m(x) the finaliser of MurmurHash3
    (x ^= x >> 33; x *= MIX_1; x ^= x >> 33; x *= MIX_2; x ^= x >> 33) and all sums modulo 2^64::

        t[i] = m(w[i] ^ (i + 1) * GOLDEN)
        a, b = sum(t[i]), sum(t[i] * (i * WEIGHT | 1))

    `sum128_final` makes the digest of a, b and the length.
    """
    raw = np.frombuffer(data, np.uint8)
    padded = np.zeros(-(-len(raw) // WORD_BYTES) * WORD_BYTES, np.uint8)
    padded[: len(raw)] = raw
    words, index = padded.view("<u8"), np.arange(len(padded) // WORD_BYTES, dtype=np.uint64)
    mixed = _mix(words ^ (index + np.uint64(1)) * np.uint64(GOLDEN))
    a = mixed.sum(dtype=np.uint64)
    b = (mixed * (index * np.uint64(WEIGHT) | np.uint64(1))).sum(dtype=np.uint64)
    return sum128_final(np.array([[a, b]], np.uint64), len(raw)).tobytes()


def sum128_final(sums: np.ndarray, nbytes: int) -> np.ndarray:
    """Turn (n, 2) uint64 sums a, b of pages of `nbytes` into (n,) V16 digests: c = m(a ^ nbytes), m(b + c).

    Both are little-endian.
    """
    words = np.empty((len(sums), 2), "<u8")
    words[:, 0] = first = _mix(sums[:, 0] ^ np.uint64(nbytes))
    words[:, 1] = _mix(sums[:, 1] + first)
    return words.view(f"V{DIGEST_BYTES}").reshape(-1)


def _mix(words: np.ndarray) -> np.ndarray:
    words = words ^ (words >> np.uint64(33))
    words = words * np.uint64(MIX_1)
    words = words ^ (words >> np.uint64(33))
    words = words * np.uint64(MIX_2)
    mixed: np.ndarray = words ^ (words >> np.uint64(33))
    return mixed
