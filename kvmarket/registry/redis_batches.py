"""How block keys and records travel to and from the server's scripts: as runs of consecutive blocks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.errors import RegistryProtocolError
from kvmarket.registry.records import (
    HEAD_BYTES,
    KEY_HEAD_BYTES,
    OWNER_AT,
    RECORD,
    RECORD_BYTES,
    RUN_BLOCKS,
    BlockRecords,
    decode_records,
    decode_wire,
)
from kvmarket.registry.redis_scripts import STRETCH_HEAD
from kvmarket.registry.redis_search import ASKED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmarket.registry.leases import Stretch

STRETCH_BLOCKS_MAX = 1000
"""Blocks of one stretch: a script cannot pass more than some thousand arguments on."""
BLOCKS_PER_CALL_MAX = 4096
"""Blocks in one look-up, which bounds how long it keeps the server from others: some milliseconds."""
CHANGES_PER_CALL_MAX = 1024
"""The same for blocks that are announced or withdrawn: each may change a stretch of its own."""
_PIECE = np.dtype([("block", ">u4"), ("blocks", ">u2"), ("bytes", ">u2"), ("owner", "V4")])


@dataclass(frozen=True, slots=True)
class Asked:
    """Keys of one look-up.

    Attributes:
        heads: the head of every run.
        table: `ASKED` of every run.
        hashes: of all blocks, in order, each `width` bytes.
    """

    heads: list[bytes]
    table: bytes
    hashes: bytes
    width: int


def batches(keys: Sequence[bytes], limit: int = BLOCKS_PER_CALL_MAX) -> Iterator[tuple[int, int]]:
    """Cut keys into calls, where a run begins if there are several: yields start and end."""
    start = 0
    while start < len(keys):
        end = start + limit
        if end < len(keys):
            end -= _index(keys[end]) % RUN_BLOCKS % limit
            if end <= start:
                end = start + limit
        yield start, min(end, len(keys))
        start = end


def _index(key: bytes) -> int:
    return int.from_bytes(key[HEAD_BYTES:KEY_HEAD_BYTES], "big")


def cuts(keys: Sequence[bytes]) -> tuple[list[int], bytes]:
    """Return where stretches of consecutive blocks of one run begin, the end added, and the keys joined.

    Raises:
        RegistryProtocolError: keys are not equally long, or too short; keys of one namespace never are.
    """
    length = len(keys[0])
    if set(map(len, keys)) != {length} or length <= KEY_HEAD_BYTES:
        raise RegistryProtocolError("block keys of one call must be equally long, and longer than a run's head")
    joined = b"".join(keys)
    parts = np.frombuffer(joined, [("head", "u8"), ("index", ">u4"), ("hash", f"V{length - KEY_HEAD_BYTES}")])
    heads, indices = parts["head"], parts["index"].astype(np.int64)
    follows = (heads[1:] == heads[:-1]) & (indices[1:] == indices[:-1] + 1)
    starts = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(keys)]
    if max(b - a for a, b in pairwise(starts)) > STRETCH_BLOCKS_MAX:
        starts = [cut for a, b in pairwise(starts) for cut in range(a, b, STRETCH_BLOCKS_MAX)] + [len(keys)]
    return starts, joined


def asked(keys: Sequence[bytes]) -> Asked:
    """Prepare a look-up of at least one key."""
    starts, joined = cuts(keys)
    width = len(keys[0]) - KEY_HEAD_BYTES
    hashes = np.frombuffer(joined, np.uint8).reshape(len(keys), -1)[:, KEY_HEAD_BYTES:].tobytes()
    table = b"".join([ASKED.pack(_index(keys[a]), b - a) for a, b in pairwise(starts)])
    return Asked([keys[a][:HEAD_BYTES] for a in starts[:-1]], table, hashes, width)


def encode_stretch(stretch: Stretch, owner: bytes) -> bytes:
    """Return what the server keeps of a stretch, its records naming `owner` (4 bytes)."""
    values = [with_owner(value, owner) for value in stretch.values]
    size = len(values[0])
    if set(map(len, values)) != {size}:
        raise RegistryProtocolError("records of one call must be equally long")
    head = STRETCH_HEAD.pack(len(values), 0, size)
    return b"".join([head, *[key[KEY_HEAD_BYTES:] for key in stretch.keys[1:]], *values])


def with_owner(record: bytes, owner: bytes) -> bytes:
    """Return a wire record that names another owner (4 bytes)."""
    return record if record[OWNER_AT] == owner else record[: OWNER_AT.start] + owner + record[OWNER_AT.stop :]


def decode(blocks: int, heads: bytes, records: bytes) -> BlockRecords:
    """Decode what a look-up found, sorted by block.

    Args:
        blocks: how many blocks in a row these are of.
        heads: what each piece of `records` is of, see `redis_search`.
        records: wire records, one piece after the other.
    """
    pieces = np.frombuffer(heads, _PIECE)
    counts = pieces["blocks"].astype(np.int64)
    total = int(counts.sum())
    numbers = np.arange(total)
    if total != blocks:  # several owners
        numbers += np.repeat(pieces["block"] - (np.cumsum(counts) - counts), counts)
    if (pieces["bytes"] == RECORD_BYTES).all():
        found = decode_wire(numbers, np.frombuffer(records, np.uint8).reshape(-1, RECORD_BYTES))
        if found is not None:
            return found if total == blocks else found[np.argsort(numbers, kind="stable")]
    sizes = np.repeat(pieces["bytes"], counts).tolist()
    ends = np.cumsum(sizes).tolist()
    values = [records[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    found = decode_records(numbers.tolist(), values) if values else np.empty(0, RECORD)
    return found[np.argsort(found["block"], kind="stable")]
