import numpy as np
import pytest

from kvmarket.errors import InvalidInputError
from kvmarket.tensors import as_pages
from kvmarket.testing.samples import SPEC, sample_spec

SHAPE = (3, 2, 2, 2, 16, 16)  # blocks, layers, K/V, heads, tokens, elements


def test_arrays_are_viewed_and_not_copied():
    kv = np.arange(np.prod(SHAPE), dtype=np.float16).reshape(SHAPE)
    pages = as_pages(kv, SPEC)
    assert pages.shape == (3, SPEC.page_bytes)
    assert pages.dtype == np.uint8
    assert np.shares_memory(pages, kv)
    assert pages.tobytes() == kv.tobytes()
    assert np.shares_memory(as_pages(pages, SPEC), kv), "raw bytes are fine, too"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8", "float8_e4m3fn"])
def test_tensors_are_viewed_and_not_copied(dtype):
    torch = pytest.importorskip("torch")
    spec = sample_spec(dtype=dtype)
    kv = torch.zeros(SHAPE).to(getattr(torch, dtype))
    pages = as_pages(kv, spec, writable=True)
    assert pages.shape == (3, spec.page_bytes)
    pages[1] = 255
    raw = kv.view(torch.uint8).reshape(3, -1)
    assert (raw[1] == 255).all()
    assert not raw[0].any()


def test_a_tensor_that_requires_a_gradient_can_be_published():
    torch = pytest.importorskip("torch")
    assert as_pages(torch.zeros(SHAPE, dtype=torch.float16).requires_grad_(), SPEC).shape == (3, SPEC.page_bytes)


def test_no_blocks_are_fine():
    assert as_pages(np.empty((0, *SHAPE[1:]), np.float16), SPEC).shape == (0, SPEC.page_bytes)
    assert as_pages(np.empty((0, SPEC.page_bytes), np.uint8), SPEC).shape == (0, SPEC.page_bytes)


GOOD = np.zeros(SHAPE, np.float16)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (GOOD.astype(np.float32), "dtype float32, expected float16"),
        (GOOD.view(np.int16), "dtype int16"),
        (GOOD.astype(object), "dtype object"),
        (GOOD.astype(">f2"), "byte order"),
        (GOOD[:, :1], "contiguous"),
        (GOOD[:, ::-1], "contiguous"),
        (np.asfortranarray(GOOD), "contiguous"),
        (GOOD[..., :8].copy(), "expected .* 4096 bytes per block"),
        (GOOD.reshape(-1), "expected"),
        (np.zeros((), np.float16), "expected"),
        (GOOD.tolist(), "list"),
        (None, "NoneType"),
        (b"bytes", "bytes"),
    ],
)
def test_other_things_are_refused(kv, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        as_pages(kv, SPEC, what="that argument")
    assert "that argument" in str(caught.value)


def test_other_tensors_are_refused():
    torch = pytest.importorskip("torch")
    good = torch.zeros(SHAPE, dtype=torch.float16)
    for tensor, message in [
        (good.float(), "dtype float32"),
        (good.bfloat16(), "dtype bfloat16"),
        (good.transpose(1, 2), "contiguous"),
        (good[:, :1], "contiguous"),
        (good.to("meta"), "on meta"),
        (good[0, 0, 0, 0, 0, 0], "expected"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            as_pages(tensor, SPEC)


def test_read_only_memory_can_be_published_and_not_fetched_into():
    frozen = GOOD.copy()
    frozen.flags.writeable = False
    assert as_pages(frozen, SPEC).shape == (3, SPEC.page_bytes)
    with pytest.raises(InvalidInputError, match="out is read-only"):
        as_pages(frozen, SPEC, writable=True, what="out")
