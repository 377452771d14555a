"""Stretches: entries of the embedded registry that hold an owner's records of a whole run, so that it is read at once.

A stretch says again what `blocks` says record by record: reading those takes a hundred times as many steps. It stands
for a run only where nothing else is known of it, so that a look-up finds the same either way. A run that is announced
in pieces, or partly withdrawn, is marked as mixed, and read record by record from then on. All stretches of a run must
be of the blocks that are asked for: others are forks of the prefix, which may share blocks with it.

Keys are ``epoch (4) | head (8) | owner (4) | hash of the last block``, and the mark is behind all owners. Values are
msgpack: version, region, a digest of the run's keys, and `ROW` for each block; a later minor version may append fields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import numpy as np
import xxhash

from kvmarket.registry.records import (
    HEAD_BYTES,
    KEY_HEAD_BYTES,
    MAJOR,
    RECORD,
    RUN_BLOCKS,
    block_index,
    blocks_to_run_end,
    concatenate,
    rearranged,
    run_indices,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmarket.registry.lmdb_reading import Cursor
    from kvmarket.registry.records import BlockRecords

ROW = np.dtype([("page", "<u4"), ("generation", "<u8"), ("digest", "V16")])
_MIXED = b"\xff\xff\xff\xff"
"""No owner's number."""
_FIELDS, _REGION_MAX, _ROWS_BYTES = 4, 0xFFFF, RUN_BLOCKS * ROW.itemsize


class Stretch(NamedTuple):
    """What an owner announced of a run, the first block of which is `start` here."""

    start: int
    owner: int
    region: int
    rows: bytes


def read_stretches(cursor: Cursor, prefix: bytes, keys: Sequence[bytes], start: int) -> list[Stretch]:
    """Return what every owner announced of a run, by owner; nothing where it must be read record by record.

    Args:
        cursor: of the stretches.
        prefix: the epoch.
        keys: of all blocks of the run.
        start: the number of its first block, for the answer.
    """
    run = prefix + keys[0][:HEAD_BYTES]
    found = cursor.set_range(run)
    if not found:
        return []
    last, digest = keys[-1][KEY_HEAD_BYTES:], _digest(keys)
    owner_at, hash_at, stretches = len(run), len(run) + len(_MIXED), list[Stretch]()
    while found:
        key = cursor.key()
        if not key.startswith(run):
            break
        fields = _unpacked(cursor.value()) if key[hash_at:] == last else None
        if fields is None or fields[2] != digest:
            return []
        owner = int.from_bytes(key[owner_at:hash_at], "big")
        stretches.append(Stretch(start, owner, fields[1], fields[3]))
        found = cursor.next()
    return stretches


def _unpacked(value: bytes) -> list[Any] | None:
    """Return the fields of a value, or None where it is none that this version can use."""
    try:
        fields = msgpack.unpackb(value)
    except (ValueError, msgpack.exceptions.UnpackException):
        return None
    if not isinstance(fields, list) or len(fields) < _FIELDS or fields[0] != MAJOR:
        return None
    good = type(fields[1]) is int and 0 <= fields[1] <= _REGION_MAX
    return fields if good and isinstance(fields[3], bytes) and len(fields[3]) == _ROWS_BYTES else None


def records_of(stretches: Sequence[Stretch], others: BlockRecords) -> BlockRecords:
    """Return the records of `stretches`, of which there is one or more, and all `others`, sorted by block and owner."""
    starts = np.fromiter((stretch.start for stretch in stretches), np.int64, len(stretches))
    rows = np.frombuffer(b"".join([stretch.rows for stretch in stretches]), ROW)
    records = np.empty(len(rows), RECORD)
    records["block"] = (starts[:, None] + np.arange(RUN_BLOCKS)).reshape(-1)
    for name in ("owner", "region"):
        values = np.fromiter((getattr(stretch, name) for stretch in stretches), np.int64, len(stretches))
        records[name] = np.repeat(values, RUN_BLOCKS)
    for name in ("page", "generation", "digest"):
        records[name] = rows[name]
    if len(others):
        records = concatenate([records, others])
    blocks = records["block"]
    if (blocks[1:] <= blocks[:-1]).any():  # each stretch is by owner, and so are those of one run
        records = rearranged(records, np.argsort(blocks, kind="stable"))
    return records


def announce_stretches(
    cursor: Cursor,
    prefix: bytes,
    keys: Sequence[bytes],
    records: BlockRecords,
    replaced: set[tuple[bytes, bytes]],
) -> None:
    """Enter whole runs among announced records; mark the runs of all others as mixed.

    Args:
        cursor: of the stretches.
        prefix: the epoch.
        keys: of the blocks.
        records: theirs.
        replaced: (owner, run) of blocks that their owner had announced before.
    """
    rows = np.empty(len(records), ROW)
    for name in ("page", "generation", "digest"):
        rows[name] = records[name]
    data, places = rows.tobytes(), [key[:KEY_HEAD_BYTES] for key in keys]
    owners, regions = records["owner"].tolist(), records["region"].tolist()
    mixed: set[bytes] = set()
    start = 0
    while start < len(keys):
        run, end, owner = prefix + places[start][:HEAD_BYTES], start + RUN_BLOCKS, owners[start].to_bytes(4, "big")
        if places[start:end] == _places(keys[start]) and len({*owners[start:end]}) == len({*regions[start:end]}) == 1:
            key = run + owner + keys[end - 1][KEY_HEAD_BYTES:]
            if (owner, run) in replaced and _drop(cursor, run + owner, keep=key):
                mixed.add(run)  # what it had there of another fork is in no stretch any more
            rows_of = data[start * ROW.itemsize : end * ROW.itemsize]
            cursor.put(key, msgpack.packb([MAJOR, regions[start], _digest(keys[start:end]), rows_of]))
            start = end
        else:
            mixed.add(run)
            if (owner, run) in replaced:
                _drop(cursor, run + owner)
            start += 1
    _mark(cursor, mixed)


def withdraw_stretches(cursor: Cursor, owner: bytes, run: bytes, *, has_others: bool, is_empty: bool) -> None:
    """Follow the removal of some of an owner's blocks in a run.

    Args:
        cursor: of the stretches.
        owner: its number, as in keys.
        run: epoch and head.
        has_others: it has more blocks there.
        is_empty: nobody has any.
    """
    if _drop(cursor, run + owner) and has_others:
        _mark(cursor, [run])
    if is_empty and cursor.set_key(run + _MIXED):
        cursor.delete()


def _digest(keys: Sequence[bytes]) -> bytes:
    return xxhash.xxh3_128_digest(b"".join(keys))


def _places(first: bytes) -> list[bytes]:
    """Return how the keys of a run begin whose first one this is; nothing if it is not the first of a run."""
    if blocks_to_run_end(first) != RUN_BLOCKS:
        return []
    return [first[:HEAD_BYTES] + index for index in run_indices(block_index(first))]


def _drop(cursor: Cursor, prefix: bytes, keep: bytes = b"") -> bool:
    """Remove all stretches whose keys begin with `prefix`, but for `keep`; tell whether there were any."""
    dropped = False
    found = cursor.set_range(prefix)
    while found and cursor.key().startswith(prefix):
        if cursor.key() == keep:
            found = cursor.next()
        else:
            found = cursor.delete()
            dropped = True
    return dropped


def _mark(cursor: Cursor, runs: Iterable[bytes]) -> None:
    for run in runs:
        cursor.put(run + _MIXED, b"")
