from dataclasses import fields, replace

import pytest

from kvmarket.errors import IncompatibleSpecError, InvalidInputError
from kvmarket.spec import DTYPE_BYTES, SIZE_MAX, KVCacheSpec

BASE = KVCacheSpec(num_layers=4, num_kv_heads=2, head_size=8, dtype="float16", block_size=16, tp_size=4, pp_size=3)
OTHER = {
    "num_layers": 5,
    "num_kv_heads": 3,
    "head_size": 16,
    "dtype": "bfloat16",
    "block_size": 32,
    "layout": "LKHNC",
    "kv_split": False,
    "quantization": "fp8",
    "packing": "amx",
    "tp_rank": 1,
    "tp_size": 8,
    "pp_rank": 2,
    "pp_size": 4,
}


def test_every_field_is_tried_below():
    assert set(OTHER) == {field.name for field in fields(KVCacheSpec)}


@pytest.mark.parametrize("name", OTHER)
def test_each_field_changes_the_fingerprint_and_is_named(name):
    other = replace(BASE, **{name: OTHER[name]})
    assert other.fingerprint != BASE.fingerprint
    assert len(other.fingerprint) == 16
    with pytest.raises(IncompatibleSpecError, match=name) as caught:
        BASE.require_equal(other)
    assert (caught.value.field, caught.value.expected, caught.value.found) == (name, getattr(BASE, name), OTHER[name])


def test_equal_specs_have_equal_fingerprints():
    again = KVCacheSpec(**BASE.as_dict())
    assert again.fingerprint == BASE.fingerprint
    BASE.require_equal(again)


def test_the_fingerprint_is_pinned():
    """Fails when the encoding changes: processes of two versions would then stop finding each other's blocks."""
    assert BASE.fingerprint.hex() == "ea099cc86b818871def62a1973c6cd81"


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_page_bytes_is_arithmetic(dtype):
    spec = replace(BASE, dtype=dtype)
    assert spec.page_bytes == 4 * 2 * 2 * 8 * 16 * DTYPE_BYTES[dtype]
    assert replace(spec, kv_split=False).page_bytes * 2 == spec.page_bytes


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_size", "block_size", "tp_size", "pp_size"])
@pytest.mark.parametrize("bad", [0, -1, True, 1.0, "2", None, SIZE_MAX + 1])
def test_sizes_must_be_positive_integers(name, bad):
    with pytest.raises(InvalidInputError, match=rf"KVCacheSpec\.{name} .*{bad!r}"):
        replace(BASE, **{name: bad})


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("tp_rank", 4),
        ("tp_rank", -1),
        ("tp_rank", True),
        ("pp_rank", 3),
        ("pp_rank", "0"),
        ("layout", 7),
        ("quantization", None),
        ("packing", b"amx"),
        ("dtype", "float12"),
        ("dtype", ["float16"]),
        ("kv_split", 1),
        ("kv_split", "no"),
    ],
)
def test_other_bad_values_are_named(name, bad):
    with pytest.raises(InvalidInputError, match=rf"KVCacheSpec\.{name} "):
        replace(BASE, **{name: bad})


def test_a_known_dtype_is_suggested():
    with pytest.raises(InvalidInputError, match="bfloat16"):
        replace(BASE, dtype="half")
