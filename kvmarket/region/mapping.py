"""Mapping shared files where huge pages can hold them: the system calls that Python's `mmap` has not got.

A mapping can only be made of huge pages when its address is a multiple of their size, and the kernel chooses such an
address by itself only where shared huge pages are switched on for everybody. `collapse` makes huge pages of memory that
is already there, also where they are not: reading pages of 4 KiB costs up to a third of the speed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache

import numpy as np

HUGE_PAGE = 2 << 20
STEP_BYTES = 32 << 20
"""Bytes of one call that may take long."""
_MAP_NORESERVE, _MAP_FIXED = 0x4000, 0x10
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 22, 23, 25  # Linux 5.14, 5.14, 6.1
_FAILED = ctypes.c_void_p(-1).value


@cache
def _libc() -> ctypes.CDLL:
    """The C library; unlike `mmap`'s methods, calls into it release the GIL."""
    libc = ctypes.CDLL(None, use_errno=True)
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, number]
    return libc


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    mapped: int | None = _libc().mmap(address, nbytes, protection, flags, fd, 0)
    if mapped is None or mapped == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return mapped


def map_shared(fd: int, nbytes: int, *, writable: bool) -> np.ndarray:
    """Map the first `nbytes` of a file, shared, as (nbytes,) uint8 that starts at a multiple of `HUGE_PAGE`.

    It is unmapped when the last array that refers to it is gone.

    Raises:
        OSError: the kernel refused.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    length = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    reserved = _mmap(None, length + HUGE_PAGE, 0, private, -1)  # room of our own, to choose an address in
    start = -(-reserved // HUGE_PAGE) * HUGE_PAGE
    end = start + length
    try:
        _mmap(start, length, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _libc().munmap(reserved, length + HUGE_PAGE)
        raise
    if start > reserved:
        _libc().munmap(reserved, start - reserved)
    if end < reserved + length + HUGE_PAGE:
        _libc().munmap(end, reserved + length + HUGE_PAGE - end)
    memory = (ctypes.c_uint8 * nbytes).from_address(start)
    # Not at exit: threads may still read then, and the process's memory goes anyway.
    weakref.finalize(memory, _libc().munmap, start, length).atexit = False
    view = memoryview(memory).cast("B")
    return np.frombuffer(view if writable else view.toreadonly(), np.uint8)


def allow_huge_pages(array: np.ndarray) -> None:
    """Ask for huge pages as memory is touched; a kernel without them just says no."""
    _madvise(array, 0, len(array), mmap.MADV_HUGEPAGE)


def populate(array: np.ndarray, *, write: bool) -> None:
    """Have the kernel provide a mapping's pages now, huge ones where it can (`write`), and enter them here.

    Takes up to a second per GiB and releases the GIL. Older kernels do less of it, or nothing.
    """
    for start in range(0, len(array), STEP_BYTES):
        nbytes = min(STEP_BYTES, len(array) - start)
        if write:
            _make_huge(array, start, nbytes)
        if not _madvise(array, start, nbytes, _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ):
            return


def _make_huge(array: np.ndarray, start: int, nbytes: int) -> None:
    whole = nbytes - nbytes % HUGE_PAGE
    if not whole:
        return
    for touch in range(start, start + whole, HUGE_PAGE):  # a huge page is made of a small one, never of nothing
        if not _madvise(array, touch, mmap.PAGESIZE, _MADV_POPULATE_WRITE):
            return
    _madvise(array, start, whole, _MADV_COLLAPSE)


def _madvise(array: np.ndarray, start: int, nbytes: int, advice: int) -> bool:
    return int(_libc().madvise(array.ctypes.data + start, nbytes, advice)) == 0
