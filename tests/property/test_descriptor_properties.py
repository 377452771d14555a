import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmarket.errors import RegistryProtocolError
from kvmarket.region.descriptor import MEMORIES_MAX, SEGMENTS_MAX, WORD_MAX, RegionDescriptor
from kvmarket.region.memory import MemoryAddress
from kvmarket.region.pages import PageLayout, Segment

GOOD = RegionDescriptor(
    region_id=3,
    fingerprint=bytes(range(16)),
    layout=PageLayout(4, (Segment(0, 0, 64, 32), Segment(1, 128, 16, 16))),
    memories=(MemoryAddress(1, 5, 77, 4096), MemoryAddress(1, 6, 78, 8192)),
    generations=MemoryAddress(1, 7, 79, 4096 + 32),
    probe=bytes(64),
    verify="sampled",
)
WIRE = GOOD.to_wire()

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=70),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def paths(value, prefix=()):
    """Every place in a nested structure."""
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*prefix, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def through_msgpack(wire):
    return msgpack.unpackb(msgpack.packb(wire))


def refused_or_sound(wire):
    """Reading never raises anything but a protocol error, and what is read keeps every promise."""
    try:
        descriptor = RegionDescriptor.from_wire(wire)
    except RegistryProtocolError:
        return None
    assert len(descriptor.fingerprint) == 16
    assert len(descriptor.probe) == 64
    assert descriptor.generations.nbytes > 0
    assert len(descriptor.verify) <= WORD_MAX
    if descriptor.memories:
        descriptor.layout.check([memory.nbytes for memory in descriptor.memories])
    assert RegionDescriptor.from_wire(through_msgpack(descriptor.to_wire())) == descriptor
    return descriptor


def test_descriptors_come_back_exactly():
    assert RegionDescriptor.from_wire(through_msgpack(WIRE)) == GOOD
    assert RegionDescriptor.from_wire({**WIRE, "later": [1, 2]}) == GOOD, "unknown fields are ignored"


@given(st.sampled_from([path for path in paths(WIRE) if path]), junk)
def test_no_field_takes_junk(path, value):
    refused_or_sound(replaced(WIRE, path, value))


@given(junk | st.dictionaries(st.sampled_from(list(WIRE)), junk))
@example([])
@example(None)
@example("layout")
def test_junk_is_refused(wire):
    assert refused_or_sound(wire) is None


@pytest.mark.parametrize("name", list(WIRE))
def test_a_missing_field_is_named(name):
    with pytest.raises(RegistryProtocolError, match=name):
        RegionDescriptor.from_wire({key: value for key, value in WIRE.items() if key != name})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("layout", 0), 0),
        (("layout", 0), 10**9),
        (("layout", 0), True),
        (("layout", 1), []),
        (("layout", 1, 0, 0), 2),
        (("layout", 1, 0, 1), 4096),
        (("layout", 1, 0, 3), 0),
        (("layout", 1, 0, 1), -1),
        (("layout", 1), [[0, 0, 0, 1]] * (SEGMENTS_MAX + 1)),
        (("memories",), [[1, 2, 3, 4096]] * (MEMORIES_MAX + 1)),
        (("memories", 0, 3), 100),
        (("memories", 0, 3), 0),
        (("generations", 3), 0),
        (("generations",), [1, 2, 3]),
        (("region",), 1 << 63),
        (("spec",), bytes(15)),
        (("spec",), "a" * 16),
        (("probe",), bytes(63)),
    ],
)
def test_values_out_of_bounds_are_refused(path, value):
    with pytest.raises(RegistryProtocolError):
        RegionDescriptor.from_wire(replaced(WIRE, path, value))
