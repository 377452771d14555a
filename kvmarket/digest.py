"""Page digests: xxh3_128 over the bytes of a page, segment by segment in page order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from kvmarket.region.pages import PagedMemory


def page_digests(memory: PagedMemory, pages: np.ndarray) -> list[bytes]:
    """Return the 16-byte digest of each page. The order of a page's segments counts, where they lie does not.

    Args:
        memory: where the pages are.
        pages: (n,) page numbers.
    """
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


def page_digest(memory: PagedMemory, page: int) -> bytes:
    """Return the digest of one page."""
    return page_digests(memory, np.array([page]))[0]
