"""Reads of another process of this host by the system call behind UCX's CMA lanes, ``process_vm_readv``.

Where UCX found that its connection may use CMA, a read needs no thread but the caller's: the kernel copies a whole
scatter/gather list at once, which per block costs a fraction of one UCX operation. The checks are those of other
one-sided reads: generations before, generations and the table's header after. The header holds random bytes of that
very table, so neither a process id nor an address that something else has taken over is mistaken for the owner.
"""

from __future__ import annotations

import ctypes as c
import errno
import os
import time
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.errors import PeerGoneError, TransferError
from kvmarket.region.generations import VALUES_OFFSET, memory_fence
from kvmarket.report import MissReason
from kvmarket.transport.ucx_iov import cut, local_bases, local_iov, page_lists
from kvmarket.transport.ucx_rma import CounterWindows

if TYPE_CHECKING:
    from kvmarket.deadline import Deadline
    from kvmarket.transport.base import OnGroup, ReadRequest
    from kvmarket.transport.ucx_rma import RemoteRegion

GROUP_BYTES = 4 << 20
ENTRIES_MAX = 1024
"""Entries of a list that the kernel takes at once (IOV_MAX)."""
SPAN_MAX = 8192
"""Counters read along with the wanted ones rather than in several windows."""
_GONE = frozenset({errno.ESRCH, errno.EFAULT})


@lru_cache(maxsize=1)
def _readv() -> c._NamedFuncPointer:
    function = c.CDLL(None, use_errno=True).process_vm_readv
    pointer, count = c.c_void_p, c.c_ulong
    function.argtypes, function.restype = (c.c_int, pointer, count, pointer, count, count), c.c_ssize_t
    return function


class CmaRegion:
    """A peer's region, read by its process id. Thread-safe.

    Raises:
        PeerGoneError: another process, or other memory, is where the owner's should be.
        TransferError: the kernel does not allow it.
    """

    def __init__(self, pid: int, remote: RemoteRegion) -> None:
        self._pid, self._remote = pid, remote
        self._look(np.zeros(1, np.int64))

    def read(
        self, request: ReadRequest, deadline: Deadline, on_group: OnGroup | None
    ) -> tuple[int, dict[int, MissReason], float]:
        """Read pages in order, ending after the group with the first page that is refused.

        Returns:
            Valid pages, refused pages with their reason, seconds spent copying.

        Raises:
            PeerGoneError, TransferError: see `CmaRegion`.
        """
        total = len(request.pages)
        size = max(1, GROUP_BYTES // self._remote.layout.page_bytes)
        refused: dict[int, MissReason] = {}
        fresh = self._fresh(request)
        copy = _Copy(self._remote, request)
        valid, copy_s = 0, 0.0
        for start in range(0, total, size):
            if refused or deadline.expired:
                ended = refused[min(refused)] if refused else MissReason.DEADLINE
                refused |= dict.fromkeys(range(start, total), ended)
                break
            indices = np.arange(start, min(start + size, total))
            if not (good := fresh[indices]).all():
                refused.update(dict.fromkeys(indices[~good].tolist(), MissReason.STALE_GENERATION))
                indices = indices[good]
            began = time.perf_counter()
            whole = self._read_group(request, copy, indices)
            copy_s += time.perf_counter() - began
            if not whole.all():
                refused.update(dict.fromkeys(indices[~whole].tolist(), MissReason.TORN))
                indices = indices[whole]
            valid += len(indices)
            if on_group is not None and len(indices):
                on_group(indices)
        return valid, refused, copy_s

    def _fresh(self, request: ReadRequest) -> np.ndarray:
        """(n,) bool: which pages exist and have the generation that was announced."""
        fresh = (request.pages >= 0) & (request.pages < self._remote.layout.num_pages)
        fresh &= ((request.generations & np.uint64(1)) == 0) & (request.generations != 0)
        if fresh.any():
            fresh[fresh] = self._look(request.pages[fresh]) == request.generations[fresh]
        memory_fence()  # the bytes are read after the generations
        return fresh

    def _read_group(self, request: ReadRequest, copy: _Copy, indices: np.ndarray) -> np.ndarray:
        """Copy pages; return a bool array of which are whole."""
        if not len(indices):
            return np.ones(0, bool)
        self._copy(*copy.lists(indices))
        memory_fence()  # and the generations again after the bytes
        whole: np.ndarray = self._look(request.pages[indices]) == request.generations[indices]
        return whole

    def _look(self, pages: np.ndarray) -> np.ndarray:
        """Return (n,) uint64: the generations of `pages` now, all of which exist; the header is read after them."""
        low, high = int(pages.min()), int(pages.max()) + 1
        counters = self._remote.table + VALUES_OFFSET
        if high - low > SPAN_MAX:
            windows = CounterWindows(pages)
            self._copy(windows.remote_iov(counters), windows.local_iov())
            self._check_header(np.empty(0, np.uint64), 0)
            return windows.current()
        found = np.empty(high - low, np.uint64)
        self._check_header(found, counters + 8 * low)
        current: np.ndarray = found[pages - low]
        return current

    def _check_header(self, before: np.ndarray, address: int) -> None:
        """Read what lies at `address` into `before`, and then the table's header, which must be the one announced."""
        expected = self._remote.header
        header = np.empty(len(expected), np.uint8)
        there = np.array([[address, before.nbytes], [self._remote.table, len(expected)]], np.uint64)
        here = np.array([[before.ctypes.data, before.nbytes], [header.ctypes.data, len(expected)]], np.uint64)
        self._copy(there, here)
        if header.tobytes() != expected:
            raise PeerGoneError("the owner's generation table is gone", scheme="ucx")

    def _copy(self, remote: np.ndarray, local: np.ndarray) -> None:
        """Copy (n, 2) lists of addresses and lengths with the same lengths, in order."""
        readv = _readv()
        for start in range(0, len(remote), ENTRIES_MAX):
            there, here = remote[start : start + ENTRIES_MAX], local[start : start + ENTRIES_MAX]
            wanted = int(here[:, 1].sum())
            got = readv(self._pid, here.ctypes.data, len(here), there.ctypes.data, len(there), 0)
            if got == wanted:
                continue
            code = errno.EFAULT if got >= 0 else c.get_errno()
            why = f"reading process {self._pid}: {os.strerror(code)}"
            raise (PeerGoneError if code in _GONE else TransferError)(why, scheme="ucx")


class _Copy:
    """The scatter/gather lists of one request: made at once where both sides cut their pages alike, else by group."""

    def __init__(self, remote: RemoteRegion, request: ReadRequest) -> None:
        self._remote, self._request = remote, request
        self._there = self._here = None
        local = request.local
        if [s.nbytes for s in remote.layout.segments] == [s.nbytes for s in local.layout.segments]:
            self._there = page_lists(remote.layout, remote.bases, request.pages)
            self._here = page_lists(local.layout, local_bases(local), request.local_pages)

    def lists(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return two (n, 2) lists of equal lengths for the pages at `indices`: remote and local."""
        if self._there is not None and self._here is not None:
            return self._there[indices].reshape(-1, 2), self._here[indices].reshape(-1, 2)
        local = local_iov(self._request.local, self._request.local_pages[indices])
        pieces, _ = cut(self._remote.runs(self._request.pages[indices]), local)
        return np.ascontiguousarray(pieces[:, [2, 1]]), np.ascontiguousarray(pieces[:, [0, 1]])
