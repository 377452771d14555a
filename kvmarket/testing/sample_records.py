"""Block records for tests of registries: chains of keys, announcing them, and what was found as plain tuples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.registry import block_keys
from kvmarket.registry.records import make_records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.registry import LookupResult, Registry


def chain(seed: int, blocks: int, *, common: int = 0) -> list[bytes]:
    """Return the keys of a prefix; two seeds share their first `common` blocks."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(10**6)
    hashes = [(shared if i < common else rng).bytes(32) for i in range(blocks)]
    return block_keys(hashes)


def announce(registry: Registry, digest: bytes, owner: int, keys: Sequence[bytes], **options: Any) -> bool:
    """Announce `keys` on pages 0, 1, ... (or from `first_page`) in `region`, all of one `generation`."""
    first, generation = options.get("first_page", 0), options.get("generation", 2)
    pages = np.arange(first, first + len(keys))
    generations = np.full(len(keys), generation, np.uint64)
    records = make_records(owner, options.get("region", 0), pages, generations, options.get("digests"))
    epoch = options.get("epoch") or registry.epoch(digest)
    return registry.announce(digest, epoch, keys, records)


def rows(found: LookupResult) -> list[tuple[int, int, int, int]]:
    """Return (block, owner, page, generation) of every record found, sorted."""
    columns = (found.records[field].tolist() for field in ("block", "owner", "page", "generation"))
    return sorted(zip(*columns, strict=True))
