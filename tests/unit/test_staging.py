import gc
import threading

import numpy as np
import pytest

from kvmarket.staging import BUFFER_BYTES_MIN, StagingPool


def test_two_results_never_share_a_buffer():
    pool = StagingPool()
    first, second = pool.pages(4, 1000), pool.pages(4, 1000)
    first[:], second[:] = 1, 2
    assert not np.shares_memory(first, second)
    assert (first == 1).all()


KEEP = {
    "slice": lambda a: a[1:],
    "flat": lambda a: a.reshape(-1)[7:],
    "buffer": memoryview,
    "transposed": lambda a: a.T,
}


@pytest.mark.parametrize("kind", KEEP)
def test_a_buffer_is_lent_as_long_as_anything_refers_to_it(kind):
    pool = StagingPool()
    pages = pool.pages(4, 1000)
    where, kept = pages.ctypes.data, KEEP[kind](pages)
    del pages
    gc.collect()
    second = pool.pages(4, 1000)
    assert second.ctypes.data != where
    del kept
    assert pool.pages(4, 1000).ctypes.data == where, "it came back"


def test_a_tensor_keeps_its_buffer():
    torch = pytest.importorskip("torch")
    pool = StagingPool()
    tensor = torch.from_numpy(pool.pages(4, 1000))
    tensor.fill_(3)
    other = pool.pages(4, 1000)
    other[:] = 9
    assert (tensor == 3).all()


def test_shapes_and_sizes():
    pool = StagingPool()
    for blocks, page_bytes in [(0, 4096), (1, 1), (3, 1 << 20), (5, 1000)]:
        pages = pool.pages(blocks, page_bytes)
        assert pages.shape == (blocks, page_bytes)
        assert pages.dtype == np.uint8
        assert pages.flags.c_contiguous
        assert pages.flags.writeable
        pages[:] = 1


def test_buffers_beyond_the_limit_are_not_kept():
    pool = StagingPool(kept_bytes_max=BUFFER_BYTES_MIN)
    pages = [pool.pages(1, 1000) for _ in range(3)]
    del pages
    assert len(pool._idle) == 1


def test_many_threads_get_different_buffers():
    pool, wrong = StagingPool(), []

    def work(value):
        for _ in range(200):
            pages = pool.pages(2, 64)
            pages[:] = value
            if not (pages == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
