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
import platform
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
SHORT_BYTES = 64 << 10
"""So few bytes are read together with both looks at their generations."""
IN_ORDER = platform.machine() in {"x86_64", "AMD64"}
"""One call may read pages and then their generations: the kernel takes the entries of a list in their order, as
process_vm_readv(2) says, and this processor keeps loads in order."""
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
        look = _Look(remote, np.zeros(1, np.int64))
        self._copy(look.remote, look.local)
        look.generations()

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
        if total and total * self._remote.layout.page_bytes <= SHORT_BYTES and not deadline.expired:
            began = time.perf_counter()
            found = self._read_short(request)
            if found is not None:
                copy_s = time.perf_counter() - began
                good = np.delete(np.arange(total), list(found))
                if on_group is not None and len(good):
                    on_group(good)
                return len(good), found, copy_s
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
        fresh = self._announced(request)
        if fresh.any():
            look = _Look(self._remote, request.pages[fresh])
            self._copy(look.remote, look.local)
            fresh[fresh] = look.generations() == request.generations[fresh]
        memory_fence()  # the bytes are read after the generations
        return fresh

    def _announced(self, request: ReadRequest) -> np.ndarray:
        """(n,) bool: which pages exist and were announced with a generation that a readable page can have."""
        known = (request.pages >= 0) & (request.pages < self._remote.layout.num_pages)
        known &= ((request.generations & np.uint64(1)) == 0) & (request.generations != 0)
        return known

    def _read_short(self, request: ReadRequest) -> dict[int, MissReason] | None:
        """Read everything by one call, both looks included; return the refused pages, or None if it was not done."""
        if not (IN_ORDER and self._announced(request).all()):
            return None
        before, after = _Look(self._remote, request.pages), _Look(self._remote, request.pages)
        there, here = _Copy(self._remote, request).lists(np.arange(len(request.pages)))
        remote = np.concatenate((before.remote[:-1], there, after.remote))
        if len(remote) > ENTRIES_MAX:
            return None
        self._copy(remote, np.concatenate((before.local[:-1], here, after.local)))
        whole = after.generations() == request.generations
        fresh = before.counters() == request.generations
        if fresh.all() and whole.all():
            return {}
        torn = dict.fromkeys(np.flatnonzero(~whole).tolist(), MissReason.TORN)
        return torn | dict.fromkeys(np.flatnonzero(~fresh).tolist(), MissReason.STALE_GENERATION)

    def _read_group(self, request: ReadRequest, copy: _Copy, indices: np.ndarray) -> np.ndarray:
        """Copy pages; return a bool array of which are whole."""
        if not len(indices):
            return np.ones(0, bool)
        look = _Look(self._remote, request.pages[indices])
        there, here = copy.lists(indices)
        if IN_ORDER:
            self._copy(np.concatenate((there, look.remote)), np.concatenate((here, look.local)))
        else:
            self._copy(there, here)
            memory_fence()  # and the generations again after the bytes
            self._copy(look.remote, look.local)
        whole: np.ndarray = look.generations() == request.generations[indices]
        return whole

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


class _Look:
    """Where the counters of some pages are, then the table's header, and where they are read to.

    Attributes:
        remote: (n, 2) uint64 addresses and lengths over there; the header is the last.
        local: the same here.
    """

    def __init__(self, remote: RemoteRegion, pages: np.ndarray) -> None:
        self._expected = remote.header
        self._header = bytearray(len(remote.header))
        header = (c.addressof(c.c_char.from_buffer(self._header)), len(self._header))
        low, high = int(pages.min()), int(pages.max()) + 1
        counters = remote.table + VALUES_OFFSET
        self._windows = CounterWindows(pages) if high - low > SPAN_MAX else None
        if self._windows is not None:
            there, here = self._windows.remote_iov(counters).tolist(), self._windows.local_iov().tolist()
        else:
            self._span, self._places = np.empty(high - low, np.uint64), pages - low
            there, here = [(counters + 8 * low, self._span.nbytes)], [(self._span.ctypes.data, self._span.nbytes)]
        self.remote = np.array([*there, (remote.table, len(self._header))], np.uint64)
        self.local = np.array([*here, header], np.uint64)

    def counters(self) -> np.ndarray:
        """(n,) uint64: the generations that were read of the pages."""
        found: np.ndarray = self._windows.current() if self._windows is not None else self._span[self._places]
        return found

    def generations(self) -> np.ndarray:
        """Return the same, with the header read after them.

        Raises:
            PeerGoneError: that is another header.
        """
        if self._header != self._expected:
            raise PeerGoneError("the owner's generation table is gone", scheme="ucx")
        return self.counters()


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
