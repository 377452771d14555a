"""Reading memory that is mapped into this process: the seqlock loop that `inproc` and `shm` share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.region.generations import memory_fence, readable
from kvmarket.region.pages import RELEASED_BYTES_MIN, PagedMemory, copy_pages
from kvmarket.report import MissReason, TransferReport
from kvmarket.transport.base import Connection, OnGroup, ReadRequest

if TYPE_CHECKING:
    from kvmarket.deadline import Deadline
    from kvmarket.region.leases import PageLeases

GROUP_BYTES = 4 << 20
"""Bytes copied before their generations are looked at again, with the deadline, and verified while cached."""


class MappedConnection(Connection):
    """Pages and generations of one region, both readable by plain loads; `leases` where the owner is this process."""

    immediate = True

    def __init__(
        self,
        scheme: str,
        path: str,
        pages: PagedMemory,
        generations: np.ndarray,
        leases: PageLeases | None = None,
    ) -> None:
        self.scheme, self.path = scheme, path
        self._pages, self._generations, self._leases = pages, generations, leases

    def readers(self, local: PagedMemory) -> int:
        """Two, unless pages are cut so small that the threads would wait for each other's turn in Python."""
        pieces = (*self._pages.layout.segments, *local.layout.segments)
        return 2 if min(piece.nbytes for piece in pieces) >= RELEASED_BYTES_MIN else 1

    def fresh(self, pages: np.ndarray, generations: np.ndarray) -> np.ndarray:
        """Look at the generation table."""
        return readable(self._generations, pages, generations)

    def read(self, request: ReadRequest, *, deadline: Deadline, on_group: OnGroup | None = None) -> TransferReport:
        if self._leases is None:
            return self._read(request, deadline, on_group)
        lease = self._leases.hold(request.pages.tolist())
        try:
            return self._read(request, deadline, on_group)
        finally:
            self._leases.release(lease)

    def _read(self, request: ReadRequest, deadline: Deadline, on_group: OnGroup | None) -> TransferReport:
        began = time.perf_counter()
        total, page_bytes = len(request.pages), self._pages.layout.page_bytes
        group = max(1, GROUP_BYTES // page_bytes)
        refused: dict[int, MissReason] = {}
        valid, copy_seconds = 0, 0.0
        fresh = readable(self._generations, request.pages, request.generations)
        memory_fence()  # the bytes are read after the generations
        for start in range(0, total, group):
            if refused or deadline.expired:
                ended = refused[min(refused)] if refused else MissReason.DEADLINE
                refused |= dict.fromkeys(range(start, total), ended)
                break
            arrived, seconds = self._read_group(request, slice(start, min(start + group, total)), fresh, refused)
            copy_seconds += seconds
            valid += len(arrived)
            if on_group is not None and len(arrived):
                on_group(arrived)
        seconds = time.perf_counter() - began
        return TransferReport(self.scheme, self.path, valid, valid * page_bytes, seconds, copy_seconds, refused)

    def _read_group(
        self, request: ReadRequest, group: slice, fresh: np.ndarray, refused: dict[int, MissReason]
    ) -> tuple[np.ndarray, float]:
        """Copy one group; return the indices that are valid, and the seconds the copy took."""
        indices = np.arange(group.start, group.stop)
        pages, generations, targets = request.pages[group], request.generations[group], request.local_pages[group]
        if not fresh[group].all():
            stale = ~fresh[group]
            refused.update(dict.fromkeys(indices[stale].tolist(), MissReason.STALE_GENERATION))
            indices, pages, generations, targets = (x[~stale] for x in (indices, pages, generations, targets))
        began = time.perf_counter()
        copy_pages(self._pages, pages, request.local, targets)
        seconds = time.perf_counter() - began
        memory_fence()  # and the generations again after the bytes
        whole = self._generations[pages] == generations
        if not whole.all():
            refused.update(dict.fromkeys(indices[~whole].tolist(), MissReason.TORN))
            indices = indices[whole]
        return indices, seconds

    def close(self) -> None:
        """The mappings go with the last array that refers to them."""
