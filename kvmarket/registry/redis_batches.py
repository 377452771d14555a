"""How batches of block keys and records travel to and from the server's scripts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.errors import RegistryProtocolError
from kvmarket.registry.records import (
    HEAD_BYTES,
    OWNER_AT,
    RECORD,
    RECORD_BYTES,
    BlockRecords,
    decode_records,
    decode_wire,
)
from kvmarket.registry.redis_scripts import SEGMENT_HEAD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FIELDS_PER_RUN_MAX = 1000
"""Fields of one run in one call: a script cannot pass more than some thousand arguments on."""
BLOCKS_PER_CALL_MAX = 4096
"""Blocks in one call, which bounds how long it keeps the server from others: some milliseconds."""
_SEGMENT = np.dtype([("length", "u1"), ("expires", ">u4"), ("record", f"V{RECORD_BYTES}")])


@dataclass(frozen=True, slots=True)
class Batch:
    """Keys of one call, grouped by run.

    Attributes:
        heads: the head of every run.
        counts: the number of keys of each run, two bytes each.
        keys: all block keys, in order, each `width` bytes.
    """

    heads: list[bytes]
    counts: bytes
    keys: bytes
    width: int


def batches(keys: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Cut keys into calls: yields start and end."""
    for start in range(0, len(keys), BLOCKS_PER_CALL_MAX):
        yield start, min(start + BLOCKS_PER_CALL_MAX, len(keys))


def batch(keys: Sequence[bytes]) -> Batch:
    """Group neighbouring keys of a run. Keys of one namespace are equally long, and there is at least one.

    Raises:
        RegistryProtocolError: they are not.
    """
    length = len(keys[0])
    if set(map(len, keys)) != {length} or length <= HEAD_BYTES:
        raise RegistryProtocolError("block keys of one call must be equally long, and longer than a run's head")
    joined = b"".join(keys)
    heads = np.frombuffer(joined, [("head", "u8"), ("rest", f"V{length - HEAD_BYTES}")])["head"]
    starts = [0, *(np.flatnonzero(heads[1:] != heads[:-1]) + 1).tolist(), len(keys)]
    cuts = [cut for a, b in pairwise(starts) for cut in range(a, b, FIELDS_PER_RUN_MAX)]
    counts = b"".join((b - a).to_bytes(2, "big") for a, b in pairwise([*cuts, len(keys)]))
    return Batch([keys[cut][:HEAD_BYTES] for cut in cuts], counts, joined, length)


def with_owner(record: bytes, owner: bytes) -> bytes:
    """Return a wire record that names another owner (4 bytes)."""
    return record if record[OWNER_AT] == owner else record[: OWNER_AT.start] + owner + record[OWNER_AT.stop :]


def decode(blocks: int, now: int, segments: bytes, lengths: bytes) -> BlockRecords:
    """Decode what a look-up found.

    Args:
        blocks: how many blocks `segments` is of.
        now: the server's clock, in seconds: entries that expired by then are left out.
        segments: every block's segments, one block after the other.
        lengths: the bytes of each block, comma-separated; empty when each has one plain segment.
    """
    if not lengths:
        table = np.frombuffer(segments, np.uint8).reshape(blocks, SEGMENT_HEAD + RECORD_BYTES)
        records = decode_wire(np.arange(blocks), table[:, SEGMENT_HEAD:])
        if records is not None:
            fresh = np.frombuffer(segments, _SEGMENT)["expires"] > now
            return records if fresh.all() else records[fresh]
        lengths = b",".join([b"%d" % (SEGMENT_HEAD + RECORD_BYTES)] * blocks)
    numbers, values = _split(now, segments, [int(length) for length in lengths.split(b",")])
    return decode_records(numbers, values) if values else np.empty(0, RECORD)


def _split(now: int, segments: bytes, lengths: Sequence[int]) -> tuple[list[int], list[bytes]]:
    blocks: list[int] = []
    values: list[bytes] = []
    at = 0
    for block, length in enumerate(lengths):
        end = at + length
        while at < end:
            expires = int.from_bytes(segments[at + 1 : at + SEGMENT_HEAD], "big")
            stop = at + SEGMENT_HEAD + segments[at]
            if expires > now:
                blocks.append(block)
                values.append(segments[at + SEGMENT_HEAD : stop])
            at = stop
    return blocks, values
