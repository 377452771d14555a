"""Page digests: xxh3_128 over the bytes of a page, segment by segment in page order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmarket.region.pages import PagedMemory


def page_digest(memory: PagedMemory, page: int) -> bytes:
    """Return the 16-byte digest of one page. The order of its segments counts, where they lie does not."""
    views = memory.views(page)
    if len(views) == 1:
        return xxhash.xxh3_128_digest(views[0].data)
    state = xxhash.xxh3_128()
    for view in views:
        state.update(view.data)
    return state.digest()


def page_digests(memory: PagedMemory, pages: Iterable[int]) -> list[bytes]:
    """Return `page_digest` of each page."""
    return [page_digest(memory, int(page)) for page in pages]
