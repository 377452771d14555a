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
    block_index,
    blocks_to_run_end,
    decode_records,
    decode_wire,
)
from kvmarket.registry.redis_scripts import SEGMENT, STRETCH_HEAD
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
STRETCH_AT = SEGMENT.size + STRETCH_HEAD.size


@dataclass(frozen=True, slots=True)
class Asked:
    """Keys of one look-up.

    Attributes:
        heads: the head of every run.
        runs: index of the first block of every run, and number of blocks.
        hashes: of all blocks, in order, each `width` bytes.
    """

    heads: list[bytes]
    runs: list[tuple[int, int]]
    hashes: bytes
    width: int

    @property
    def table(self) -> bytes:
        """`ASKED` of every run."""
        return b"".join([ASKED.pack(*run) for run in self.runs])


def batches(keys: Sequence[bytes], limit: int = BLOCKS_PER_CALL_MAX) -> Iterator[tuple[int, int]]:
    """Cut keys into calls, where a run begins if there are several: yields start and end."""
    start = 0
    while start < len(keys):
        end = start + limit
        if end < len(keys):
            end -= block_index(keys[end]) % RUN_BLOCKS % limit
            if end <= start:
                end = start + limit
        yield start, min(end, len(keys))
        start = end


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
    length = len(keys[0])
    hashes = b"".join([key[KEY_HEAD_BYTES:] for key in keys])
    if len(hashes) != len(keys) * (length - KEY_HEAD_BYTES):
        raise RegistryProtocolError("block keys of one call must be equally long, and longer than a run's head")
    starts = _aligned(keys) or cuts(keys)[0]
    runs = [(block_index(keys[a]), b - a) for a, b in pairwise(starts)]
    return Asked([keys[a][:HEAD_BYTES] for a in starts[:-1]], runs, hashes, length - KEY_HEAD_BYTES)


def _aligned(keys: Sequence[bytes]) -> list[int] | None:
    """What `cuts` finds for the keys of one prefix, as far as the first and last key of each run tell; or None."""
    starts = [0]
    while (start := starts[-1]) < len(keys):
        end = min(start + blocks_to_run_end(keys[start]), len(keys))
        last = keys[end - 1]
        if (
            last[:HEAD_BYTES] != keys[start][:HEAD_BYTES]
            or block_index(last) != block_index(keys[start]) + end - 1 - start
        ):
            return None
        starts.append(end)
    return starts


def select(part: Asked, found: Sequence[Sequence[bytes]], now: int) -> tuple[list[int], list[bytes], set[bytes]]:
    """Choose what may hold blocks asked for from all there is of their runs, as `LOOKUP` does on the server.

    Args:
        part: what was asked for.
        found: field and segments by turns, of every run.
        now: the server's clock, in seconds.

    Returns:
        Where each segment starts, counted in blocks asked for; the segments; the numbers of their owners (4 bytes).
    """
    places: list[int] = []
    segments: list[bytes] = []
    owners: set[bytes] = set()
    before, width = 0, part.width
    for (first, count), fields in zip(part.runs, found, strict=True):
        for field, value in zip(fields[::2], fields[1::2], strict=True):
            place = int.from_bytes(field[:4], "big") - first
            here = (before + place) * width
            if place >= count or (place >= 0 and field[4:] != part.hashes[here : here + width]):
                continue
            at = 0
            while at < len(value):
                length, owner, expires = SEGMENT.unpack_from(value, at)
                if expires > now:
                    places.append(before + place)
                    segments.append(value[at : at + length])
                    owners.add(owner)
                at += length
        before += count
    return places, segments, owners


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


def decode(part: Asked, places: Sequence[int], segments: Sequence[bytes]) -> BlockRecords:
    """Decode what a look-up found, sorted by block. Only blocks whose hash is the one asked for are taken.

    Args:
        part: what was asked for.
        places: where each stretch starts, counted in blocks asked for.
        segments: one stretch of one owner each.
    """
    spans: list[tuple[int, int]] = []
    values: list[bytes] = []
    sizes: list[int] = []
    for place, segment in zip(places, segments, strict=True):
        count, skipped, size = STRETCH_HEAD.unpack_from(segment, SEGMENT.size)
        begin = max(skipped, -place)
        end = _equal(part, place, segment, count)
        if end > begin:
            at = STRETCH_AT + (count - 1) * part.width - skipped * size
            spans.append((place + begin, place + end))
            values.append(segment[at + begin * size : at + end * size])
            sizes.append(size)
    if not spans:
        return np.empty(0, RECORD)
    if follow := all(a[1] == b[0] for a, b in pairwise(spans)):
        blocks = np.arange(spans[0][0], spans[-1][1])
    else:
        blocks = np.concatenate([np.arange(*span) for span in spans])
    found = None
    if set(sizes) == {RECORD_BYTES}:
        found = decode_wire(blocks, np.frombuffer(b"".join(values), np.uint8).reshape(-1, RECORD_BYTES))
    if found is None:
        each = [
            data[at : at + size] for data, size in zip(values, sizes, strict=True) for at in range(0, len(data), size)
        ]
        found = decode_records(blocks.tolist(), each)
    return found if follow else found[np.argsort(found["block"], kind="stable")]


def _equal(part: Asked, place: int, segment: bytes, count: int) -> int:
    """Return the block of a stretch up to which, from the first one asked for on, its hashes are those asked for.

    The server has found the stretch by the hash of its first block.
    """
    width = part.width
    low, high = max(1, -place), min(count, len(part.hashes) // width - place)
    there, here = STRETCH_AT + (low - 1) * width, (place + low) * width
    size = (high - low) * width
    if segment[there : there + size] == part.hashes[here : here + size]:
        return high
    for at in range(0, size, width):
        if segment[there + at : there + at + width] != part.hashes[here + at : here + at + width]:
            return low + at // width
    return high
