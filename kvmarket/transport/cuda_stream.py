"""One read of pages on a card: launches in order, several under way, each checked when it has ended.

The generations stay in host memory. They are checked before a copy is launched and again after its event: the owner
makes a page readable only behind the kernels that filled it, and unreadable before it launches one that overwrites it,
so whatever a copy may have met of an overwriting kernel shows in the second check.

A card that has nothing to do gets at once what is added. While it is busy, what is added waits and goes in one launch:
each launch, and the wait for its end, takes the host some 30 us, and the card is not faster for having it sooner.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from kvmarket.errors import TransferError
from kvmarket.region.generations import memory_fence, readable
from kvmarket.report import MissReason, TransferReport
from kvmarket.transport.base import OnGroup, ReadRequest, Stream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmarket.deadline import Deadline
    from kvmarket.region.cuda import CudaPagedMemory, CudaTransfer

GROUP_BYTES_MAX = 1 << 30
"""What one launch takes at most: a read that is given up is over when two of them are, within milliseconds on a card
and over NVLink, and a fifth of a second over a slow bus."""
IN_FLIGHT = 2
"""Launches under way in one read while more may come: the card goes on while the host checks."""
GROWTH = 2
"""A launch behind another that is under way is at least so many times as large, while more may come."""


class _Part(NamedTuple):
    """Pages of one request that go in one launch.

    Attributes:
        request: what they were asked for by.
        first: index in the whole read of the first page of the request.
        chosen: which pages: indices in the request, or a slice of it where all are known to be fresh.
        pages: how many they are.
    """

    request: ReadRequest
    first: int
    chosen: np.ndarray | slice
    pages: int

    @property
    def plain(self) -> bool:
        """All of its pages are fresh, and to be digested: it can share a launch with others."""
        announced = self.request.announced
        return isinstance(self.chosen, slice) and announced is not None and self.request.digest is announced.every

    @property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The page numbers there and here."""
        return self.request.pages[self.chosen], self.request.local_pages[self.chosen]

    @property
    def digest(self) -> np.ndarray | Literal[True] | None:
        """Which of its pages to digest, as `CudaApi.copy` takes it."""
        if self.plain:
            return True
        return None if self.request.digest is None else self.request.digest[self.chosen]

    @property
    def indices(self) -> np.ndarray:
        """Its pages in the request."""
        return np.arange(self.chosen.start, self.chosen.stop) if isinstance(self.chosen, slice) else self.chosen


class _Launch(NamedTuple):
    """A copy under way, of consecutive parts; None when there are no pages."""

    parts: list[_Part]
    transfer: CudaTransfer | None

    @property
    def pages(self) -> int:
        """How many pages it copies."""
        return _pages(self.parts)

    @property
    def ended(self) -> bool:
        """The copy is over, one way or another."""
        return self.transfer is None or self.transfer.ended


def _pages(several: Iterable[_Part | _Launch]) -> int:
    return sum(each.pages for each in several)


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
        self._waiting: list[_Part] = []
        self._asked = self._valid = 0
        self._group = max(1, min(group_bytes, GROUP_BYTES_MAX) // self._page_bytes)
        self._refused: dict[int, MissReason] = {}
        self._deadline: Deadline | None = None
        self._late = False
        self._began = time.perf_counter()
        self._since = self._copy_seconds = 0.0

    def add(self, request: ReadRequest, deadline: Deadline) -> bool:
        total, first = len(request.pages), self._asked
        self._asked, self._deadline = first + total, deadline
        fresh = None
        if request.announced is None or not request.announced.current(self._generations):
            fresh = readable(self._generations, request.pages, request.generations)
            if fresh.all():
                fresh = None
        memory_fence()  # the bytes are read after the generations
        start = 0
        while start < total and not self._over():
            end = min(start + self._group, total)
            if fresh is None:
                part = _Part(request, first, slice(start, end), end - start)
            else:
                indices = self._drop_stale(first, start, fresh[start:end])
                part = _Part(request, first, indices, len(indices))
            self._take(part)
            start = end
        if start < total:
            self._refuse_rest(range(first + start, first + total))
        return not self._over()

    def _over(self) -> bool:
        """Tell whether nothing more is to be read."""
        self._late = self._late or (self._deadline is not None and self._deadline.expired)
        return self._late or bool(self._refused)

    def _drop_stale(self, first: int, start: int, fresh: np.ndarray) -> np.ndarray:
        stale = first + start + np.flatnonzero(~fresh)
        self._refused.update(dict.fromkeys(stale.tolist(), MissReason.STALE_GENERATION))
        return start + np.flatnonzero(fresh)

    def _refuse_rest(self, indices: Iterable[int]) -> None:
        """Refuse pages because of what ended the read."""
        ended = self._refused[min(self._refused)] if self._refused else MissReason.DEADLINE
        self._refused |= dict.fromkeys(indices, ended)

    def _take(self, part: _Part) -> None:
        """Launch a part, or have it wait while the card is busy with others."""
        together = part.plain and _pages(self._waiting) + part.pages <= self._group
        if self._waiting and not (together and self._waiting[0].plain):
            self._launch(IN_FLIGHT)
        self._waiting.append(part)
        while self._under_way and self._under_way[0].ended:
            self._check_oldest()
        behind = self._under_way[-1].pages if self._under_way else 0
        if len(self._under_way) < IN_FLIGHT and _pages(self._waiting) >= min(GROWTH * behind, self._group):
            self._launch(IN_FLIGHT)

    def flush(self) -> None:
        if self._waiting:
            self._launch(IN_FLIGHT + 1)

    def _launch(self, at_most: int) -> None:
        """Launch what waits, as soon as fewer than `at_most` others are, and not too much is, under way."""
        parts, self._waiting = self._waiting, []
        pages = _pages(parts)
        while len(self._under_way) >= at_most or _pages(self._under_way) + pages > IN_FLIGHT * self._group:
            self._check_oldest()
        if self._over() and (self._late or self._refused_before(parts[0])):
            for part in parts:
                self._refuse_rest((part.first + part.indices).tolist())
            return
        if not self._under_way:
            self._since = time.perf_counter()
        transfer = None
        if pages:
            source, target = parts[0].places
            if len(parts) > 1:
                source, target = map(np.concatenate, zip(*(part.places for part in parts), strict=True))
            transfer = self._local.api.copy(self._source, source, self._local, target, parts[0].digest)
        self._under_way.append(_Launch(parts, transfer))

    def _refused_before(self, part: _Part) -> bool:
        """Tell whether a page before all of `part` was refused: then nobody wants these."""
        first = part.chosen.start if isinstance(part.chosen, slice) else min(part.chosen, default=0)
        return bool(self._refused) and min(self._refused) < part.first + int(first)

    def _check_oldest(self) -> None:
        """Wait for the oldest launch, and look at the generations of its pages again."""
        launch = self._under_way[0]
        if launch.transfer is not None:
            launch.transfer.wait()
        self._under_way.popleft()
        now = time.perf_counter()
        self._copy_seconds, self._since = self._copy_seconds + now - self._since, now
        if launch.transfer is None:
            return
        memory_fence()  # and the generations again after the bytes
        digests, at = launch.transfer.digests, 0
        for part in launch.parts:
            mine = digests
            if len(launch.parts) > 1:  # all plain: a digest for each page
                mine, at = digests[at : at + part.pages], at + part.pages
            if not self._all_as_announced(part, mine):
                self._check_each(part, mine)

    def _all_as_announced(self, part: _Part, digests: np.ndarray) -> bool:
        """Check pages that are all as before, without looking at each; False: nothing was done."""
        request, chosen, announced = part.request, part.chosen, part.request.announced
        if announced is None or self._on_group is not None or not isinstance(chosen, slice):
            return False
        if request.digest is not None and request.digest is not announced.every:
            return False
        if not announced.current(self._generations, chosen):
            return False
        if len(digests) and request.on_digests:
            request.on_digests(chosen, digests)
        self._valid += part.pages
        return True

    def _check_each(self, part: _Part, digests: np.ndarray) -> None:
        request, indices = part.request, part.indices
        whole = self._generations[request.pages[indices]] == request.generations[indices]
        all_whole = bool(whole.all())
        arrived = indices if all_whole else indices[whole]
        if not all_whole:
            torn = part.first + indices[~whole]
            self._refused.update(dict.fromkeys(torn.tolist(), MissReason.TORN))
        if len(digests) and request.digest is not None and request.on_digests:
            digested = request.digest[indices]
            found = indices[digested]
            if not all_whole:
                found, digests = found[whole[digested]], digests[whole[digested]]
            request.on_digests(found, digests)
        self._valid += len(arrived)
        if self._on_group is not None and len(arrived):
            self._on_group(part.first + arrived)

    @property
    def ended(self) -> bool:
        return not self._waiting and all(launch.ended for launch in self._under_way)

    def abandon(self) -> None:
        self._waiting = []
        failure: TransferError | None = None
        while self._under_way:
            launch = self._under_way.popleft()
            try:
                if launch.transfer is not None:
                    launch.transfer.wait()
            except TransferError as error:  # the others may still write
                failure = failure or error
        if failure is not None:
            raise failure

    def finish(self) -> TransferReport:
        try:
            self.flush()
            while self._under_way:
                self._check_oldest()
        finally:  # a launch that failed leaves others, which still write
            self.abandon()
        nbytes, seconds = self._valid * self._page_bytes, time.perf_counter() - self._began
        return TransferReport(
            "cuda_ipc", self._path, self._valid, nbytes, seconds, self._copy_seconds, self._refused, self._tier
        )
