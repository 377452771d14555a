"""Stretches: entries of the embedded registry that hold an owner's records of a whole run, so that it is read at once.

A stretch says again what `blocks` says record by record: reading those takes a hundred times as many steps. It stands
for a run only where nothing else is known of it, so that a look-up finds the same either way. A run that is announced
in pieces, or partly withdrawn, is marked as mixed, and read record by record from then on. All stretches of a run must
be of the blocks that are asked for: others are forks of the prefix, which may share blocks with it.

Keys are ``epoch (4) | head (8) | owner (4) | hash of the last block``, and the mark is behind all owners. Values are a
digest of the run's keys and its records one behind the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from kvmarket.registry.records import (
    HEAD_BYTES,
    KEY_HEAD_BYTES,
    OWNER_AT,
    RECORD_BYTES,
    RUN_BLOCKS,
    block_index,
    blocks_to_run_end,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Cursor = Any
"""An `lmdb.Cursor`, untyped for the reason given at `Transaction`."""
_MIXED = b"\xff\xff\xff\xff"
"""No owner's number."""
_DIGEST_BYTES = 16
_VALUE_BYTES = _DIGEST_BYTES + RUN_BLOCKS * RECORD_BYTES


def read_stretches(cursor: Cursor, prefix: bytes, keys: Sequence[bytes]) -> list[bytes]:
    """Return every owner's records of a run, owner by owner; nothing where it must be read record by record.

    Args:
        cursor: of the stretches.
        prefix: the epoch.
        keys: of all blocks of the run.
    """
    run = prefix + keys[0][:HEAD_BYTES]
    found = cursor.set_range(run)
    if not found:
        return []
    last, digest = keys[-1][KEY_HEAD_BYTES:], _digest(keys)
    at, records = len(run) + len(_MIXED), list[bytes]()
    while found:
        key = cursor.key()
        if not key.startswith(run):
            break
        value = cursor.value() if key[at:] == last else b""
        if not value.startswith(digest) or len(value) != _VALUE_BYTES:
            return []
        records.append(value[_DIGEST_BYTES:])
        found = cursor.next()
    return records


def interleaved(found: list[bytes]) -> bytes:
    """Return what `read_stretches` found block by block, the records of one block by owner."""
    if len(found) == 1:
        return found[0]
    records = np.frombuffer(b"".join(found), np.uint8).reshape(len(found), RUN_BLOCKS, RECORD_BYTES)
    return records.transpose(1, 0, 2).tobytes()


def announce_stretches(
    cursor: Cursor,
    prefix: bytes,
    keys: Sequence[bytes],
    values: Sequence[bytes],
    replaced: set[tuple[bytes, bytes]],
) -> None:
    """Enter whole runs among announced records; mark the runs of all others as mixed.

    Args:
        cursor: of the stretches.
        prefix: the epoch.
        keys: of the blocks.
        values: their records.
        replaced: (owner, run) of blocks that their owner had announced before.
    """
    mixed: set[bytes] = set()
    start = 0
    while start < len(keys):
        run, end = prefix + keys[start][:HEAD_BYTES], start + RUN_BLOCKS
        owner = values[start][OWNER_AT]
        if _is_whole(keys[start:end], values[start:end]):
            key = run + owner + keys[end - 1][KEY_HEAD_BYTES:]
            if (owner, run) in replaced and _drop(cursor, run + owner, keep=key):
                mixed.add(run)  # what it had there of another fork is in no stretch any more
            cursor.put(key, _digest(keys[start:end]) + b"".join(values[start:end]))
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


def _is_whole(keys: Sequence[bytes], values: Sequence[bytes]) -> bool:
    """Tell whether these are all blocks of one run, in order, of one owner."""
    if len(keys) < RUN_BLOCKS or blocks_to_run_end(keys[0]) != RUN_BLOCKS:
        return False
    head, first, owner = keys[0][:HEAD_BYTES], block_index(keys[0]), values[0][OWNER_AT]
    places = [head + number.to_bytes(KEY_HEAD_BYTES - HEAD_BYTES, "big") for number in range(first, first + RUN_BLOCKS)]
    of_owner = all(value[OWNER_AT] == owner and len(value) == RECORD_BYTES for value in values)
    return of_owner and [key[:KEY_HEAD_BYTES] for key in keys] == places


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
