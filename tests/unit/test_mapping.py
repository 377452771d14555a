"""Shared mappings: aligned for huge pages, read-only where asked, and gone with their last array."""

import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from kvmarket.region.mapping import HUGE_PAGE, map_shared, populate

SIZES = [1, mmap.PAGESIZE, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 5]


@pytest.fixture
def file():
    fd = os.memfd_create("mapping test")
    os.ftruncate(fd, 4 * HUGE_PAGE)
    yield fd
    os.close(fd)


def mappings():
    return Path("/proc/self/maps").read_text().splitlines()


def mapped():
    return sum("mapping test" in line for line in mappings())


@pytest.mark.parametrize("nbytes", SIZES)
def test_mappings_are_aligned_and_share_their_bytes(file, nbytes):
    here, there = map_shared(file, nbytes, writable=True), map_shared(file, nbytes, writable=False)
    assert len(here) == len(there) == nbytes
    assert here.ctypes.data % HUGE_PAGE == there.ctypes.data % HUGE_PAGE == 0
    here[:] = np.arange(nbytes, dtype=np.uint64).astype(np.uint8)
    assert (there == here).all()
    assert not there.flags.writeable
    with pytest.raises(ValueError, match="WRITEABLE"):
        there.flags.writeable = True


def test_a_mapping_lives_as_long_as_anything_refers_to_it(file):
    array = map_shared(file, HUGE_PAGE, writable=True)
    part = array[100:200].reshape(10, 10)
    del array
    gc.collect()
    part[:] = 7
    assert mapped() == 1
    del part
    gc.collect()
    assert mapped() == 0


def test_a_refused_mapping_leaves_nothing_behind():
    before = len(mappings())
    for _ in range(50):
        with pytest.raises(OSError, match="Bad file descriptor"):
            map_shared(-1, HUGE_PAGE, writable=True)
    assert len(mappings()) < before + 25


@pytest.mark.parametrize("nbytes", SIZES)
def test_populating_provides_memory_and_changes_nothing(file, nbytes):
    os.pwrite(file, b"abc", 0)
    array = map_shared(file, nbytes, writable=True)
    populate(array, write=True)
    assert bytes(array[:3]) == b"abc"[:nbytes]
    assert not array[3:].any()
    assert os.fstat(file).st_blocks * 512 >= nbytes
    populate(map_shared(file, nbytes, writable=False), write=False)
