"""Walking the tables of the embedded registry: reading a prefix's records, removing an owner's."""

from __future__ import annotations

from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.registry.records import OWNER_AT, blocks_to_run_end, decode_records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.registry.records import BlockRecords

Cursor = Any
"""An `lmdb.Cursor`, untyped for the reason given at `Transaction`."""


def read_records(cursor: Cursor, prefix: bytes, keys: Sequence[bytes]) -> tuple[BlockRecords, bool]:
    """Read the records of `keys`, which follow each other in one prefix, up to the first that has none.

    Blocks of a run are neighbours, so a run is read by walking on from its first block. Where that meets anything but
    the blocks asked for (some with more owners than others, a fork of the prefix, the end), the rest of it is looked up
    block by block.

    Returns:
        The records, sorted by block, and whether every key is known to have exactly one.
    """
    blocks: list[int] = []
    values: list[bytes] = []
    start = 0
    while start < len(keys):
        end = min(start + blocks_to_run_end(keys[start]), len(keys))
        if not cursor.set_key(prefix + keys[start]):
            break
        owners = cursor.count()  # of the first block; mostly all blocks of a run have as many
        items: list[bytes] = []
        for item in islice(cursor.iternext(), owners * (end - start)):
            items += item  # so many pairs, kept, would have each look-up set off the garbage collector
        run = keys[start:end] if owners == 1 else [key for key in keys[start:end] for _ in range(owners)]
        if b"".join(items[::2]) == prefix + prefix.join(run):
            values += items[1::2]
            blocks += range(start, end) if owners == 1 else np.repeat(np.arange(start, end), owners).tolist()
            while cursor.next_dup():  # more owners of the last one
                values.append(cursor.value())
                blocks.append(end - 1)
        else:
            wanted = [prefix + key for key in keys[start:end]]
            agreed = _agreed(items[::2], wanted)
            values += items[1 : 2 * agreed : 2]
            blocks += range(start, start + agreed)
            if not _collect_one_by_one(cursor, wanted[agreed:], start + agreed, blocks, values):
                break
        start = end
    one_each = bool(blocks) and blocks[-1] + 1 == len(keys) == len(values)
    records = decode_records(np.arange(len(keys)) if one_each else blocks, values)
    return records, one_each and len(records) == len(keys)


def _agreed(found: list[bytes], wanted: list[bytes]) -> int:
    """Return how many leading keys of a walk are those of blocks with one record each, as far as it shows."""
    agreeing = list(takewhile(lambda pair: pair[0] == pair[1], zip(found, wanted, strict=False)))
    return max(0, len(agreeing) - 1)  # the last that agrees may have more owners


def _collect_one_by_one(
    cursor: Cursor, wanted: list[bytes], start: int, blocks: list[int], values: list[bytes]
) -> bool:
    """Look up blocks `start`, `start` + 1, ... up to the first that has no record; tell whether all have one."""
    by_key: dict[bytes, list[bytes]] = {}
    for key, value in cursor.getmulti(wanted, dupdata=True):
        by_key.setdefault(key, []).append(value)
    for block, key in enumerate(wanted, start):
        if key not in by_key:
            return False
        blocks.extend([block] * len(by_key[key]))
        values.extend(by_key[key])
    return True


def delete_record(cursor: Cursor, key: bytes, owner_key: bytes) -> bool:
    """Delete the record of one owner at `key`; tell whether there was one."""
    if not cursor.set_key(key):
        return False
    for value in cursor.iternext_dup(keys=False, values=True):
        if value[OWNER_AT] == owner_key:
            cursor.delete()
            return True
    return False


def keys_of_run(cursor: Cursor, run: bytes) -> list[bytes]:
    """Return the keys of all blocks in a run, whoever has them; the cursor's table is the blocks'."""
    keys: list[bytes] = []
    found = cursor.set_range(run)
    while found and cursor.key().startswith(run):
        keys.append(cursor.key())
        found = cursor.next_nodup()
    return keys


def run_has_owner(cursor: Cursor, run: bytes, owner_key: bytes) -> bool:
    """Tell whether an owner has any block in a run."""
    found = cursor.set_range(run)
    while found and cursor.key().startswith(run):
        if cursor.value()[OWNER_AT] == owner_key:
            return True
        found = cursor.next()
    return False


def delete_prefix(cursor: Cursor, prefix: bytes, limit: int) -> int:
    """Delete up to `limit` keys that start with `prefix`; return how many those were."""
    removed = 0
    found = cursor.set_range(prefix)
    while found and removed < limit and cursor.key().startswith(prefix):
        found = cursor.delete(dupdata=True)
        removed += 1
    return removed


def forget_runs(runs: Cursor, blocks: Cursor, pairs: set[tuple[bytes, bytes]]) -> None:
    """Take runs that owners have no blocks in any more off their lists; `pairs` are of owner and run."""
    for owner_key, run in pairs:
        if not run_has_owner(blocks, run, owner_key) and runs.set_key_dup(owner_key, run):
            runs.delete()


def count_prefix(cursor: Cursor, prefix: bytes) -> int:
    """Count the records of all keys that begin with `prefix`."""
    if not cursor.set_range(prefix):
        return 0
    return sum(1 for _ in takewhile(lambda key: key.startswith(prefix), cursor.iternext(values=False)))
