"""Walking the tables of the embedded registry: reading a prefix's records, removing an owner's."""

from __future__ import annotations

from itertools import islice, takewhile
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.registry.lmdb_stretches import Stretch, read_stretches, records_of, withdraw_stretches
from kvmarket.registry.records import OWNER_AT, RUN_BLOCKS, blocks_to_run_end, decode_records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.registry.lmdb_reading import Cursor
    from kvmarket.registry.records import BlockRecords


def read_records(cursor: Cursor, stretches: Cursor, prefix: bytes, keys: Sequence[bytes]) -> tuple[BlockRecords, bool]:
    """Read the records of `keys`, which follow each other in one prefix, up to the first that has none.

    Args:
        cursor: of the blocks.
        stretches: cursor of the stretches.
        prefix: the epoch.
        keys: of consecutive blocks.

    Returns:
        The records, sorted by block, and whether every key is known to have exactly one.
    """
    blocks: list[int] = []
    values: list[bytes] = []
    whole: list[Stretch] = []
    start = 0
    while start < len(keys):
        end = min(start + blocks_to_run_end(keys[start]), len(keys))
        run = keys[start:end]
        found = read_stretches(stretches, prefix, run, start) if len(run) == RUN_BLOCKS else []
        whole += found
        if not found and not _read_run(cursor, prefix, run, start=start, blocks=blocks, values=values):
            break
        start = end
    total = len(values) + RUN_BLOCKS * len(whole)
    one_each = start == len(keys) == total
    records = decode_records(np.arange(total) if one_each and not whole else blocks, values)
    if whole:
        records = records_of(whole, records)
    return records, one_each and len(records) == total


def _read_run(
    cursor: Cursor, prefix: bytes, keys: Sequence[bytes], *, start: int, blocks: list[int], values: list[bytes]
) -> bool:
    """Read the records of blocks `start`, `start` + 1, ... of one run; tell whether all have one.

    Blocks of a run are neighbours, so it is read by walking on from its first block. Where that meets anything but the
    blocks asked for (some with more owners than others, a fork of the prefix, the end), the rest is looked up block by
    block.
    """
    if not cursor.set_key(prefix + keys[0]):
        return False
    end = start + len(keys)
    owners = cursor.count()  # of the first block; mostly all blocks of a run have as many
    items: list[bytes] = []
    for item in islice(cursor.iternext(), owners * len(keys)):
        items += item  # so many pairs, kept, would have each look-up set off the garbage collector
    run = keys if owners == 1 else [key for key in keys for _ in range(owners)]
    if b"".join(items[::2]) == prefix + prefix.join(run):
        values += items[1::2]
        blocks += range(start, end) if owners == 1 else np.repeat(np.arange(start, end), owners).tolist()
        while cursor.next_dup():  # more owners of the last one
            values.append(cursor.value())
            blocks.append(end - 1)
        return True
    wanted = [prefix + key for key in keys]
    agreed = _agreed(items[::2], wanted)
    values += items[1 : 2 * agreed : 2]
    blocks += range(start, start + agreed)
    return _collect_one_by_one(cursor, wanted[agreed:], start + agreed, blocks, values)


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


def forget_runs(runs: Cursor, blocks: Cursor, stretches: Cursor, pairs: set[tuple[bytes, bytes]]) -> None:
    """Follow the removal of blocks: (owner, run) of `pairs` are of those whose records were removed.

    Runs that owners have no blocks in any more are taken off their lists.
    """
    for owner_key, run in pairs:
        has_others = run_has_owner(blocks, run, owner_key)
        if not has_others and runs.set_key_dup(owner_key, run):
            runs.delete()
        is_empty = not has_others and not run_is_used(blocks, run)
        withdraw_stretches(stretches, owner_key, run, has_others=has_others, is_empty=is_empty)


def run_is_used(cursor: Cursor, run: bytes) -> bool:
    """Tell whether anybody has any block in a run."""
    return bool(cursor.set_range(run)) and bool(cursor.key().startswith(run))


def count_prefix(cursor: Cursor, prefix: bytes) -> int:
    """Count the records of all keys that begin with `prefix`."""
    if not cursor.set_range(prefix):
        return 0
    return sum(1 for _ in takewhile(lambda key: key.startswith(prefix), cursor.iternext(values=False)))
