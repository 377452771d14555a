"""The registry's wire format: versioned msgpack, and the keys that keep a chain's blocks side by side.

A block record is a msgpack array ``[major, owner, region, page, generation, digest]``. Its integers are written at
fixed width, which msgpack allows, so that all records of this version are `RECORD_BYTES` long and a whole prefix
decodes with one numpy view. A record of another length is decoded field by field: extra fields of a later minor version
are ignored, another major is skipped.

A block key is ``head (8) | index (4) | hash``: the head is the start of the hash of the first block of a run of
`RUN_BLOCKS`, so the blocks of one prefix are neighbours in an ordered store.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import numpy as np

from kvmarket.announced import DIGEST_BYTES, NO_DIGEST, Announced, named
from kvmarket.errors import RegistryProtocolError
from kvmarket.identity import OwnerInfo
from kvmarket.secret import Sealer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MAJOR = 1
FIELDS = 6
"""Fields of a block record in this version; a later minor version may append some."""
RUN_BLOCKS = 32
HEAD_BYTES = 8
KEY_HEAD_BYTES = HEAD_BYTES + 4
"""Bytes of a block key before the block's hash: its run's head and its index."""
MANY_KEYS = 64
"""So many keys are made from whole columns."""
RECORD_BYTES_MAX = 511
"""The longest value the ordered store takes when several owners hold one block."""
NOT_SEALED = Sealer()

_WIRE = np.dtype(
    [
        ("array", "u1"),
        ("major", "u1"),
        ("t1", "u1"),
        ("owner", ">u4"),
        ("t2", "u1"),
        ("region", ">u2"),
        ("t3", "u1"),
        ("page", ">u4"),
        ("t4", "u1"),
        ("generation", ">u8"),
        ("t5", "u1"),
        ("digest_len", "u1"),
        ("digest", "V16"),
    ]
)
RECORD_BYTES = _WIRE.itemsize
_TAGS = {"array": 0x96, "major": MAJOR, "t1": 0xCE, "t2": 0xCD, "t3": 0xCE, "t4": 0xCF, "t5": 0xC4, "digest_len": 16}
_WIRE_FIELDS: Mapping[str, Any] = _WIRE.fields or {}
_TAG_MASK, _TAG_VALUES = np.zeros(RECORD_BYTES, np.uint8), np.zeros(RECORD_BYTES, np.uint8)
for _name, _value in _TAGS.items():
    _TAG_MASK[_WIRE_FIELDS[_name][1]], _TAG_VALUES[_WIRE_FIELDS[_name][1]] = 0xFF, _value

RECORD = np.dtype(
    [("block", "i8"), ("owner", "i8"), ("region", "i8"), ("page", "i8"), ("generation", "u8"), ("digest", "V16")]
)
"""A decoded record: `block` is the index of the block in the prefix that was looked up."""

_OPAQUE = np.dtype(f"V{RECORD.itemsize}")

BlockRecords = np.ndarray
"""(n,) structured array of `RECORD`."""

OWNER_AT = slice(3, 7)
"""Where a wire record of this version holds its owner."""


class RecordFields(NamedTuple):
    """One block record, for callers that handle few."""

    owner: int
    region: int
    page: int
    generation: int
    digest: bytes = NO_DIGEST


def make_records(
    owner: int, region: int, pages: np.ndarray, generations: np.ndarray, digests: Sequence[bytes] | None = None
) -> BlockRecords:
    """Build the records of blocks 0..n of one region: (n,) pages, (n,) generations, n digests of 16 bytes or None."""
    records = np.zeros(len(pages), RECORD)
    records["block"] = np.arange(len(pages))
    records["owner"], records["region"] = owner, region
    records["page"], records["generation"] = pages, generations
    if digests is not None:
        records["digest"] = np.frombuffer(b"".join(digests), "V16")
    return records


def block_keys(hashes: Sequence[bytes], start: int = 0, seal: Sealer = NOT_SEALED) -> list[bytes]:
    """Return the registry key of every block from `start` on, given the hashes of the whole prefix from block 0.

    Args:
        hashes: of the blocks.
        start: the first block that is asked about.
        seal: of a namespace with a secret, see `kvmarket.identity.Namespace.sealer`.
    """
    if seal:
        first = start - start % RUN_BLOCKS
        hashes = [*hashes[:first], *map(seal, hashes[first:])]
    if len(hashes) - start >= MANY_KEYS and len(set(map(len, hashes))) == 1:
        return _many_keys(hashes, start)
    keys: list[bytes] = []
    for first in range(start - start % RUN_BLOCKS, len(hashes), RUN_BLOCKS):
        skip = max(start - first, 0)
        heads = map(hashes[first][:HEAD_BYTES].__add__, run_indices(first)[skip:])
        keys += map(add, heads, hashes[first + skip : first + RUN_BLOCKS])
    return keys


def _many_keys(hashes: Sequence[bytes], start: int) -> list[bytes]:
    """`block_keys` of hashes of one length: its columns are put together at once, for a third of the time."""
    first, width = start - start % RUN_BLOCKS, len(hashes[0])
    columns = np.frombuffer(b"".join(hashes[first:]), np.uint8).reshape(-1, width)
    keys = np.empty((len(columns), KEY_HEAD_BYTES + width), np.uint8)
    keys[:, :HEAD_BYTES] = np.repeat(columns[::RUN_BLOCKS, :HEAD_BYTES], RUN_BLOCKS, axis=0)[: len(keys)]
    keys[:, HEAD_BYTES:KEY_HEAD_BYTES] = np.arange(first, len(hashes), dtype=">u4").view(np.uint8).reshape(-1, 4)
    keys[:, KEY_HEAD_BYTES:] = columns
    found: list[bytes] = keys[start - first :].view(f"V{keys.shape[1]}")[:, 0].tolist()
    return found


@lru_cache(maxsize=1024)
def run_indices(first: int) -> tuple[bytes, ...]:
    """Return the indices of the blocks of a run as they stand in keys: most prompts have the same ones."""
    return tuple(index.to_bytes(4, "big") for index in range(first, first + RUN_BLOCKS))


def block_key(hashes: Sequence[bytes], index: int, seal: Sealer = NOT_SEALED) -> bytes:
    """Return the registry key of one block, given the hashes of its prefix from block 0; `seal` as for `block_keys`."""
    return seal(hashes[index - index % RUN_BLOCKS])[:HEAD_BYTES] + index.to_bytes(4, "big") + seal(hashes[index])


def block_index(key: bytes) -> int:
    """Return the index in its prefix of the block that a registry key names."""
    return int.from_bytes(key[HEAD_BYTES : HEAD_BYTES + 4], "big")


def blocks_to_run_end(key: bytes) -> int:
    """Return how many blocks, that of `key` included, its run of `RUN_BLOCKS` still has."""
    return RUN_BLOCKS - block_index(key) % RUN_BLOCKS


def have_digest(records: BlockRecords) -> np.ndarray:
    """Return (n,) bool: which records name the digest of their block."""
    return named(records["digest"])


def run_length(blocks: np.ndarray) -> int:
    """Return how many of blocks 0, 1, 2, ... are present in the sorted `blocks`."""
    if len(blocks) and int(blocks[-1]) + 1 == len(blocks) and bool((blocks[1:] > blocks[:-1]).all()):
        return len(blocks)  # one record each
    present = np.unique(blocks)
    gaps = np.flatnonzero(present != np.arange(len(present)))
    return int(gaps[0]) if len(gaps) else len(present)


def cut_to_living(
    records: BlockRecords, complete: int, asked: int, dead: Sequence[int]
) -> tuple[BlockRecords, int, str]:
    """Cut what a registry holds of a prefix to the longest run that living owners hold.

    Args:
        records: sorted by block.
        complete: the `run_length` of their blocks.
        asked: blocks that were asked for.
        dead: owners among them that are not alive.

    Returns:
        The records, the length of the run, and what ended it, as in `LookupResult`.
    """
    run = complete
    if dead:
        records = records[~np.isin(records["owner"], dead)]
        run = run_length(records["block"])
    if len(records) and int(records["block"][-1]) >= run:
        records = records[records["block"] < run]
    return records, run, "" if run == asked else "owner_gone" if run < complete else "not_published"


class Part:
    """What a part of a look-up found: a run of blocks that living owners hold. Its arrays must not be written to.

    Attributes:
        records: of those blocks, the first being block 0 here.
        blocks: how many blocks.
    """

    def __init__(self, records: BlockRecords, blocks: int) -> None:
        records.flags.writeable = False
        self.records, self.blocks = records, blocks

    @cached_property
    def announced(self) -> Announced | None:
        """What was announced of all blocks, if one region of one owner has them and nobody else has any."""
        alone = len(self.records) == self.blocks and _of_one_region(self.records)
        return Announced.of(self.records) if alone else None

    @cached_property
    def source(self) -> tuple[int, int]:
        """The owner and region of the first record."""
        return int(self.records["owner"][0]), int(self.records["region"][0])


def concatenate(parts: Sequence[BlockRecords]) -> BlockRecords:
    """Put records one behind the other, as opaque items: numpy compares the fields of each part otherwise."""
    records: BlockRecords = np.concatenate([part.view(_OPAQUE) for part in parts]).view(RECORD)
    return records


def rearranged(records: BlockRecords, rows: np.ndarray) -> BlockRecords:
    """Return records in another order, as opaque items like `concatenate`."""
    taken: BlockRecords = records.view(_OPAQUE)[rows].view(RECORD)
    return taken


def next_run(records: BlockRecords, first: int, excluded: set[int]) -> BlockRecords | None:
    """Return the records of the longest run from block `first` on that one region of one owner serves."""
    if not first and not excluded and _of_one_region(records):
        return records
    best: BlockRecords | None = None
    here = records[records["block"] == first]
    for candidate in here:
        owner, region = int(candidate["owner"]), int(candidate["region"])
        if owner in excluded:
            continue
        same = records[(records["owner"] == owner) & (records["region"] == region) & (records["block"] >= first)]
        gaps = np.flatnonzero(same["block"] != np.arange(first, first + len(same)))
        run = same[: int(gaps[0])] if len(gaps) else same
        if best is None or len(run) > len(best):
            best = run
    return best


def by_region(records: BlockRecords, owner: int) -> Iterator[tuple[int, slice | np.ndarray]]:
    """Yield every region of `owner` that has any of `records`, and which rows those are."""
    if _of_one_region(records) and records["owner"][0] == owner:
        yield int(records["region"][0]), slice(None)
        return
    of_owner = records["owner"] == owner
    for region in np.unique(records["region"][of_owner]).tolist():
        yield region, np.flatnonzero(of_owner & (records["region"] == region))


def _of_one_region(records: BlockRecords) -> bool:
    """Tell whether these are blocks 0, 1, 2, ... of one region: the common case, without a copy."""
    if not len(records) or int(records["block"][-1]) != len(records) - 1:
        return False
    same = (records["owner"] == records["owner"][0]) & (records["region"] == records["region"][0])
    return bool((same & (records["block"] == np.arange(len(records)))).all())


def encode_records(records: BlockRecords) -> list[bytes]:
    """Return one msgpack record of `RECORD_BYTES` per block."""
    wire = np.zeros(len(records), _WIRE)
    for name, tag in _TAGS.items():
        wire[name] = tag
    for name in ("owner", "region", "page", "generation", "digest"):
        wire[name] = records[name]
    data = wire.tobytes()
    return [data[i : i + RECORD_BYTES] for i in range(0, len(data), RECORD_BYTES)]


def decode_records(blocks: Sequence[int] | np.ndarray, values: Sequence[bytes]) -> BlockRecords:
    """Decode msgpack records; those that this version cannot use are left out, never an error.

    Args:
        blocks: the block index that each value belongs to.
        values: msgpack, as `encode_records` or a later version wrote it.
    """
    if set(map(len, values)) == {RECORD_BYTES}:
        data = np.frombuffer(b"".join(values), np.uint8).reshape(-1, RECORD_BYTES)
        records = decode_wire(blocks, data)
        if records is not None:
            return records
    decoded = [(block, fields) for block, value in zip(blocks, values, strict=True) if (fields := _decode_one(value))]
    records = np.zeros(len(decoded), RECORD)
    for row, (block, fields) in zip(records, decoded, strict=True):
        row["block"], row["owner"], row["region"] = block, fields.owner, fields.region
        row["page"], row["generation"], row["digest"] = fields.page, fields.generation, np.void(fields.digest)
    return records


def decode_wire(blocks: Sequence[int] | np.ndarray, data: np.ndarray) -> BlockRecords | None:
    """Decode (n, `RECORD_BYTES`) uint8, rows contiguous: records of this very version. None if any is not one."""
    if not bool(((data & _TAG_MASK) == _TAG_VALUES).all()):
        return None
    wire = data.view(_WIRE)[:, 0]
    records = np.empty(len(wire), RECORD)
    records["block"] = blocks
    for name in ("owner", "region", "page", "generation", "digest"):
        records[name] = wire[name]
    return records


def _decode_one(value: bytes) -> RecordFields | None:
    if len(value) > RECORD_BYTES_MAX:
        return None
    try:
        fields = msgpack.unpackb(value)
    except (ValueError, msgpack.exceptions.UnpackException):
        return None
    if not isinstance(fields, list) or len(fields) < FIELDS or type(fields[0]) is not int or fields[0] != MAJOR:
        return None
    owner, region, page, generation, digest = fields[1:FIELDS]
    limits = ((owner, 1 << 32), (region, 1 << 16), (page, 1 << 32), (generation, 1 << 64))
    if any(type(number) is not int or not 0 <= number < limit for number, limit in limits):
        return None
    if not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES:
        return None
    return RecordFields(owner, region, page, generation, digest)


def pack(kind: str, body: dict[str, Any]) -> bytes:
    """Encode a control-plane record (an owner, a region, a namespace) with its version."""
    packed: bytes = msgpack.packb({"v": MAJOR, "kind": kind, **body}, use_bin_type=True)
    return packed


def unpack(kind: str, data: bytes, *, bytes_max: int = 16 << 20) -> dict[str, Any]:
    """Decode `pack`'s form; unknown fields are kept and ignored.

    Raises:
        RegistryProtocolError: not msgpack, too large, of another kind, or of another major version.
    """
    if len(data) > bytes_max:
        raise RegistryProtocolError(f"a {kind} record of {len(data)} bytes is longer than {bytes_max}")
    try:
        body = msgpack.unpackb(data)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise RegistryProtocolError(f"a {kind} record is not msgpack: {error}") from error
    if not isinstance(body, dict) or body.get("kind") != kind:
        raise RegistryProtocolError(f"expected a {kind} record")
    if body.get("v") != MAJOR:
        raise RegistryProtocolError(f"a {kind} record has version {body.get('v')!r}; this kvmarket understands {MAJOR}")
    return body


def pack_owner(info: OwnerInfo) -> bytes:
    """Encode who an owner is; its number is not part of it."""
    body = {"incarnation": info.incarnation, "pid": info.pid, "pidns": info.pid_namespace}
    return pack("owner", body | {"boot": info.boot_id, "host": info.host})


def unpack_owner(number: int, data: bytes) -> OwnerInfo:
    """Decode `pack_owner`'s form. Raises `RegistryProtocolError`."""
    body = unpack("owner", data)
    try:
        return OwnerInfo(number, body["incarnation"], body["pid"], body["pidns"], body["boot"], body["host"])
    except KeyError as error:
        raise RegistryProtocolError(f"the record of owner {number} lacks {error}") from error
