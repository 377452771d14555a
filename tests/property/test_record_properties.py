"""The wire format of block records: exact both ways, and whatever else arrives is left out, never misread."""

import msgpack
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmarket.errors import RegistryProtocolError
from kvmarket.registry.records import (
    MAJOR,
    RECORD,
    RECORD_BYTES,
    RECORD_BYTES_MAX,
    by_region,
    decode_records,
    encode_records,
    make_records,
    pack,
    unpack,
)

fields = st.tuples(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.binary(min_size=16, max_size=16),
)
records = st.lists(fields, min_size=1, max_size=20)


def encode(rows):
    encoded = []
    for owner, region, page, generation, digest in rows:
        array = make_records(owner, region, np.array([page]), np.array([generation], np.uint64), [digest])
        encoded += encode_records(array)
    return encoded


def decode(values, blocks=None):
    found = decode_records(range(len(values)) if blocks is None else blocks, values)
    names = ("owner", "region", "page", "generation")
    return [(int(row["block"]), *(int(row[name]) for name in names), row["digest"].tobytes()) for row in found]


def plain(row):
    """The same record as anybody would write it: msgpack chooses the widths."""
    return msgpack.packb([MAJOR, *row])


@given(records)
def test_records_come_back_exactly(rows):
    values = encode(rows)
    assert {len(value) for value in values} == {RECORD_BYTES}
    assert [tuple(msgpack.unpackb(value)) for value in values] == [(MAJOR, *row) for row in rows]
    assert decode(values) == [(block, *row) for block, row in enumerate(rows)]


@given(records)
def test_any_msgpack_writer_is_understood(rows):
    assert decode([plain(row) for row in rows]) == [(block, *row) for block, row in enumerate(rows)]


@given(records, st.lists(st.one_of(st.none(), st.integers(), st.text(), st.binary()), min_size=1, max_size=3))
def test_fields_of_a_later_minor_version_are_ignored(rows, more):
    values = [msgpack.packb([MAJOR, *row, *more], default=str) for row in rows]
    kept = [(block, *row) for block, row in enumerate(rows) if len(values[block]) <= RECORD_BYTES_MAX]
    assert decode(values) == kept


@given(records, st.integers(-3, 300).filter(lambda major: major != MAJOR), st.data())
def test_another_major_is_skipped_and_its_neighbours_are_not(rows, major, data):
    values = encode(rows)
    position = data.draw(st.integers(0, len(rows) - 1))
    values[position] = data.draw(
        st.sampled_from([msgpack.packb([major, *rows[position]]), _with_major(values[position], major)])
    )
    kept = [(block, *row) for block, row in enumerate(rows) if block != position]
    assert decode(values) == kept


def _with_major(value, major):
    """The fixed-width form with another major, where that takes one byte."""
    if 0 <= major < 128:
        return value[:1] + bytes([major]) + value[2:]
    return msgpack.packb([major, *msgpack.unpackb(value)[1:]])


@given(st.lists(st.binary(max_size=80), max_size=20))
@example([b"\x96" + bytes(40)])
@example([bytes(RECORD_BYTES)] * 3)
@example([b""])
@example([b"\xc1"])
@example([msgpack.packb([True, 1, 1, 1, 1, bytes(16)])])
@example([msgpack.packb([1, True, 1, 1, 1, bytes(16)])])
@example([msgpack.packb([1.0, 1, 1, 1, 1, bytes(16)])])
@example([msgpack.packb([1, 1, 1, 1, 1, "a" * 16])])
@example([msgpack.packb([1, 1, 1, 1, -1, bytes(16)])])
@example([msgpack.packb([1, 2**32, 1, 1, 1, bytes(16)])])
@example([msgpack.packb({1: 2})])
@example([b"\x91" * 500])
@example([msgpack.packb([1, 1, 1, 1, 1, bytes(16), bytes(RECORD_BYTES_MAX)])])
def test_random_bytes_never_raise(values):
    for block, *row in decode(values):
        understood = msgpack.unpackb(values[block])
        assert understood[: 1 + len(row)] == [MAJOR, *row]


@given(records, st.data())
def test_damage_is_left_out_or_changes_only_what_it_touches(rows, data):
    values = encode(rows)
    position = data.draw(st.integers(0, len(rows) - 1))
    value = bytearray(values[position])
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "append"]))
    at = data.draw(st.integers(0, len(value) - 1))
    if kind == "flip":
        value[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del value[at:]
    elif kind == "insert":
        value.insert(at, data.draw(st.integers(0, 255)))
    else:
        value += data.draw(st.binary(min_size=1, max_size=50))
    values[position] = bytes(value)
    found = decode(values)
    others = [(block, *row) for block, row in enumerate(rows) if block != position]
    assert [row for row in found if row[0] != position] == others
    for _, *row in [row for row in found if row[0] == position]:
        assert msgpack.unpackb(values[position])[1 : 1 + len(row)] == row, "decoded what msgpack does not say"


@given(records, st.integers(1, RECORD_BYTES - 1))
def test_bytes_shifted_between_records_are_not_taken_for_records(rows, shift):
    values = encode(rows + rows)
    first, second = values[0], values[1]
    values[:2] = [first[:-shift], first[-shift:] + second]
    assert [block for block, *_ in decode(values)] == list(range(2, len(values)))


simple = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=6).filter(lambda key: key not in {"v", "kind"}), simple, max_size=5))
def test_control_records_come_back_exactly(body):
    found = unpack("owner", pack("owner", body))
    expected = {"v": MAJOR, "kind": "owner", **body}
    assert repr(found) == repr(expected)


@given(st.binary(max_size=60) | simple.map(msgpack.packb))
@example(msgpack.packb({"v": 2, "kind": "owner"}))
@example(msgpack.packb({"v": 1, "kind": "region"}))
@example(msgpack.packb({"v": 1}))
@example(pack("owner", {})[:-1])
@example(pack("owner", {}) + b"x")
@example(b"\x91" * 5000)
@example(b"\xd6\xff\x00\x00\x00\x00")
def test_other_control_records_are_refused_as_such(data):
    with pytest.raises(RegistryProtocolError, match="owner record"):
        unpack("owner", data)


def test_control_records_have_a_limit():
    with pytest.raises(RegistryProtocolError, match="longer than 100"):
        unpack("owner", pack("owner", {"host": "h" * 100}), bytes_max=100)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), max_size=12))
@example([(1, 0)] * 4)
@example([(1, 0)] * 4 + [(2, 0)])
@example([(1, 0), (1, 1)])
def test_every_record_is_told_once_with_its_owner_and_region(sources):
    """Also where all are of one region, which is told at a glance."""
    found = np.zeros(len(sources), RECORD)
    found["block"] = np.arange(len(sources))
    for row, (owner, region) in zip(found, sources, strict=True):
        row["owner"], row["region"] = owner, region
    for owner in range(4):
        told = {region: found["block"][rows].tolist() for region, rows in by_region(found, owner)}
        expected = {region for of, region in sources if of == owner}
        assert told == {
            region: [i for i, source in enumerate(sources) if source == (owner, region)] for region in expected
        }
