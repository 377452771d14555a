"""One read of pages on a card: launches in order, several under way, each checked when it has ended.

The generations stay in host memory. They are checked before a copy is launched and again after its event: the owner
makes a page readable only behind the kernels that filled it, and unreadable before it launches one that overwrites it,
so whatever a copy may have met of an overwriting kernel shows in the second check.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from kvmarket.region.generations import memory_fence, readable
from kvmarket.report import MissReason, TransferReport
from kvmarket.transport.base import OnGroup, ReadRequest, Stream

if TYPE_CHECKING:
    from kvmarket.deadline import Deadline
    from kvmarket.region.cuda import CudaPagedMemory, CudaTransfer

GROUP_BYTES_MAX = 256 << 20
IN_FLIGHT = 2
"""Launches of full size under way in one read: the card goes on while the host checks, and a read that is given up is
soon over."""


class _Launch(NamedTuple):
    """A copy under way.

    Attributes:
        request: the pages it was asked for.
        first: index of the first of them in the whole read.
        chosen: those that are copied: indices in the request, or a slice of it where all are known to be fresh.
        pages: how many they are.
        transfer: the copy; None when there are none.
    """

    request: ReadRequest
    first: int
    chosen: np.ndarray | slice
    pages: int
    transfer: CudaTransfer | None


class CudaStream(Stream):
    """Reads pages of one region.

    Args:
        path: how the bytes travel, for the report.
        local: where they go.
        source: where they come from, as the card of `local` sees it.
        generations: the owner's table.
        on_group: see `Connection.read`.
        group_bytes: what one launch takes at most.
        tier: what holds the pages, for the report.
    """

    def __init__(  # noqa: PLR0917 - made in one place
        self,
        path: str,
        local: CudaPagedMemory,
        source: CudaPagedMemory,
        generations: np.ndarray,
        on_group: OnGroup | None = None,
        group_bytes: int = GROUP_BYTES_MAX,
        tier: str = "engine",
    ) -> None:
        self._tier, self._path, self._local, self._source = tier, path, local, source
        self._generations, self._on_group = generations, on_group
        self._page_bytes = local.layout.page_bytes
        self._under_way: deque[_Launch] = deque()
        self._group = max(1, min(group_bytes, GROUP_BYTES_MAX) // self._page_bytes)
        self._bytes = self._asked = self._valid = 0
        self._bytes_max = IN_FLIGHT * self._group * self._page_bytes
        self._refused: dict[int, MissReason] = {}
        self._late = False
        self._began = time.perf_counter()
        self._since = self._copy_seconds = 0.0

    def add(self, request: ReadRequest, deadline: Deadline) -> bool:
        total, first = len(request.pages), self._asked
        self._asked += total
        fresh = None
        if request.announced is None or not request.announced.current(self._generations):
            fresh = readable(self._generations, request.pages, request.generations)
            if fresh.all():
                fresh = None
        memory_fence()  # the bytes are read after the generations
        start = 0
        while start < total and not self._over(deadline):
            end = min(start + self._group, total)
            if fresh is None:
                self._launch(request, first, slice(start, end), end - start)
            else:
                indices = self._drop_stale(first, start, fresh[start:end])
                self._launch(request, first, indices, len(indices))
            start = end
        if start < total:
            ended = self._refused[min(self._refused)] if self._refused else MissReason.DEADLINE
            self._refused |= dict.fromkeys(range(first + start, first + total), ended)
        return not self._over(deadline)

    def _over(self, deadline: Deadline) -> bool:
        while self._bytes >= self._bytes_max and not self._refused:
            self._check_oldest()
        self._late = self._late or deadline.expired
        return self._late or bool(self._refused)

    def _drop_stale(self, first: int, start: int, fresh: np.ndarray) -> np.ndarray:
        stale = first + start + np.flatnonzero(~fresh)
        self._refused.update(dict.fromkeys(stale.tolist(), MissReason.STALE_GENERATION))
        return start + np.flatnonzero(fresh)

    def _launch(self, request: ReadRequest, first: int, chosen: np.ndarray | slice, count: int) -> None:
        if not self._under_way:
            self._since = time.perf_counter()
        transfer = None
        if count:
            digest: np.ndarray | Literal[True] | None = True
            if request.announced is None or request.digest is not request.announced.every:
                digest = None if request.digest is None else request.digest[chosen]
            transfer = self._local.api.copy(
                self._source, request.pages[chosen], self._local, request.local_pages[chosen], digest
            )
        self._bytes += count * self._page_bytes
        self._under_way.append(_Launch(request, first, chosen, count, transfer))

    def _check_oldest(self) -> None:
        """Wait for the oldest launch, and look at the generations of its pages again."""
        launch = self._under_way[0]
        if launch.transfer is not None:
            launch.transfer.wait()
        self._under_way.popleft()
        self._bytes -= launch.pages * self._page_bytes
        now = time.perf_counter()
        self._copy_seconds, self._since = self._copy_seconds + now - self._since, now
        if launch.transfer is None:
            return
        memory_fence()  # and the generations again after the bytes
        if not self._all_as_announced(launch, launch.transfer.digests):
            self._check_each(launch, launch.transfer.digests)

    def _all_as_announced(self, launch: _Launch, digests: np.ndarray) -> bool:
        """Check a launch whose pages are all as before, without looking at each; False: nothing was done."""
        request, part, announced = launch.request, launch.chosen, launch.request.announced
        if announced is None or self._on_group is not None or not isinstance(part, slice):
            return False
        if request.digest is not None and request.digest is not announced.every:
            return False
        if not announced.current(self._generations, part):
            return False
        if len(digests) and request.on_digests:
            request.on_digests(part, digests)
        self._valid += launch.pages
        return True

    def _check_each(self, launch: _Launch, digests: np.ndarray) -> None:
        request, chosen = launch.request, launch.chosen
        indices = np.arange(chosen.start, chosen.stop) if isinstance(chosen, slice) else chosen
        whole = self._generations[request.pages[indices]] == request.generations[indices]
        all_whole = bool(whole.all())
        arrived = indices if all_whole else indices[whole]
        if not all_whole:
            torn = launch.first + indices[~whole]
            self._refused.update(dict.fromkeys(torn.tolist(), MissReason.TORN))
        if len(digests) and request.digest is not None and request.on_digests:
            digested = request.digest[indices]
            found = indices[digested]
            if not all_whole:
                found, digests = found[whole[digested]], digests[whole[digested]]
            request.on_digests(found, digests)
        self._valid += len(arrived)
        if self._on_group is not None and len(arrived):
            self._on_group(launch.first + arrived)

    @property
    def ended(self) -> bool:
        return all(launch.transfer is None or launch.transfer.ended for launch in self._under_way)

    def finish(self) -> TransferReport:
        try:
            while self._under_way:
                self._check_oldest()
        finally:  # a launch that failed leaves others, which still write
            while self._under_way:
                launch = self._under_way.popleft()
                if launch.transfer is not None:
                    launch.transfer.wait()
        nbytes, seconds = self._valid * self._page_bytes, time.perf_counter() - self._began
        return TransferReport(
            "cuda_ipc", self._path, self._valid, nbytes, seconds, self._copy_seconds, self._refused, self._tier
        )
