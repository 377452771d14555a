"""One read through a peer: groups of pages, two in flight, reported in the order they arrive.

Runs on the reader's thread and speaks to the driver through `UcxDriver.submit` and one queue. Whatever happens, it
returns only after every group it started has ended, that is, when nothing writes to the local pages any more.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.errors import PeerGoneError, TransferError
from kvmarket.region.pages import PagedMemory, copy_pages
from kvmarket.report import MissReason
from kvmarket.transport.ucx_iov import PIECES_MAX
from kvmarket.transport.ucx_peer import GroupResult, Peer, Transfer

if TYPE_CHECKING:
    from kvmarket.deadline import Deadline
    from kvmarket.transport.base import OnGroup, ReadRequest
    from kvmarket.transport.ucx_budget import ByteBudget
    from kvmarket.transport.ucx_driver import UcxDriver
    from kvmarket.transport.ucx_staging import StagingBuffer

GROUP_BYTES = 8 << 20
"""Over TCP 4 MiB took 1.1 to 1.2 times as long, 16 MiB saved a twentieth more."""
SHORT_BYTES, SHORT_S = 64 << 10, 0.0005
"""A read of no more bytes is driven by the thread that waits for it, for so long: a round trip of a quick network."""
WINDOW = 2
"""Groups of one read in flight."""
DRAIN_S = 0.25
"""How long a read that is over may wait for its last groups before their connection is cut to stop them."""
CUT_S = 5.0
_LOOK_S = 0.02


@dataclass(eq=False)
class Group:
    """Pages that are asked for with one message.

    Attributes:
        indices: (n,) into the request.
        nbytes: what they have of the budget, until it is given back.
        place: what `GroupedRead.prepare` put there.
    """

    indices: np.ndarray
    nbytes: int
    place: Any = None
    transfer: Transfer | None = None
    result: GroupResult | None = None


Start = Callable[[Group, Callable[[GroupResult], None]], Transfer]
"""Start reading the pages of a group; on the driver's thread."""


@dataclass
class GroupedRead:
    """The state of one read. Call `run` once.

    Attributes:
        refused: page index -> reason, for pages that did not arrive.
        valid: pages that did.
        copy_seconds: from the first group's start to the last one's end.
    """

    driver: UcxDriver
    peer: Peer
    budget: ByteBudget
    request: ReadRequest
    page_bytes: int
    remote_pages: int
    segments: int
    start: Start
    deadline: Deadline
    on_group: OnGroup | None
    give_back: Callable[[StagingBuffer], None]
    group_bytes: int = GROUP_BYTES
    window: int = WINDOW
    refused: dict[int, MissReason] = field(default_factory=dict)
    valid: int = 0
    copy_seconds: float = 0.0
    _pending: set[Group] = field(default_factory=set)
    _ended: queue.SimpleQueue[Group] = field(default_factory=queue.SimpleQueue)
    _order: deque[Group] = field(default_factory=deque)
    _draining: bool = False
    _error: str = ""

    def run(self) -> None:
        """Read.

        Raises:
            PeerGoneError: the peer died or fell silent.
            TransferError: the read failed otherwise.
        """
        total = len(self.request.pages)
        if not total:
            return
        size = max(1, min(self.group_bytes // self.page_bytes, PIECES_MAX // self.segments))
        began = time.perf_counter()
        following = 0
        try:
            while (following < total and not self._over) or self._pending:
                while following < total and not self._over and len(self._order) < self.window:
                    stop = min(following + size, total)
                    if not self._launch(self._known(np.arange(following, stop))):
                        break
                    following = stop
                if self.deadline.expired:
                    break
                if self._pending:
                    self._collect()
        finally:
            self._drain()
        self.copy_seconds = time.perf_counter() - began
        self.check()
        if following < total:
            ended = self.refused[min(self.refused)] if self.refused else MissReason.DEADLINE
            self.refused.update(dict.fromkeys(range(following, total), ended))

    def check(self) -> None:
        """Raise the error that ended the read, if one did."""
        if self._error:
            gone = bool(self.peer.dead)
            raise (PeerGoneError if gone else TransferError)(self._error, scheme="ucx", peer=self.peer.address)

    @property
    def _over(self) -> bool:
        return bool(self.refused) or bool(self._error) or self.deadline.expired

    def _known(self, indices: np.ndarray) -> np.ndarray:
        """Refuse the pages that the region does not have; return the others."""
        pages = self.request.pages[indices]
        inside = (pages >= 0) & (pages < self.remote_pages)
        if inside.all():
            return indices
        self.refused.update(dict.fromkeys(indices[~inside].tolist(), MissReason.STALE_GENERATION))
        known: np.ndarray = indices[inside]
        return known

    def _launch(self, indices: np.ndarray) -> bool:
        """Start reading pages, if there is room for their bytes.

        Waits for room only while this read has nothing in flight; else what has arrived must be collected first, for
        nobody else would give its bytes back. False, too, when the deadline came.
        """
        if not len(indices):
            return True
        nbytes = len(indices) * self.page_bytes
        if not self.take_bytes(nbytes):
            return False
        group = Group(indices, nbytes)
        try:
            self.prepare(group)
        except BaseException:
            self.return_bytes(group)
            raise
        self._begin(group)
        return True

    def take_bytes(self, nbytes: int) -> bool:
        """Take bytes of the budget; False when there is no room now, or not before the deadline."""
        return self.budget.take_now(nbytes) if self._pending else self.budget.take(nbytes, self.deadline)

    def prepare(self, group: Group) -> None:
        """Called before a group is started."""

    def _begin(self, group: Group, *, next_in_order: bool = False) -> None:
        self._pending.add(group)
        if next_in_order:
            self._order.appendleft(group)
        else:
            self._order.append(group)

        def finish(result: GroupResult) -> None:
            group.result = result
            if group.transfer is not None:
                end()

        def command() -> None:
            group.transfer = self.start(group, finish)
            if group.result is not None:  # it ended before it had begun
                end()

        def end() -> None:
            if group.transfer is not None:
                self.peer.forget(group.transfer)
            self._ended.put(group)

        if len(self.request.pages) * self.page_bytes <= SHORT_BYTES:
            self.driver.submit_and_help(command, lambda: group.result is not None, SHORT_S)
        else:
            self.driver.submit(command)

    def _collect(self, timeout_s: float = _LOOK_S) -> None:
        """Take one group that has ended, or return after `timeout_s`."""
        try:
            group = self._ended.get(timeout=min(timeout_s, max(0.001, self.deadline.remaining_s)))
        except queue.Empty:
            if not self.driver.alive:
                self._error = self._error or "the UCX driver has stopped"
                self._pending.clear()
            return
        self._take(group)

    def _take(self, group: Group) -> None:
        """Report, in order, the groups whose turn has come now that this one has ended."""
        self._pending.discard(group)
        while self._order and self._order[0] not in self._pending:
            self._report(self._order.popleft())

    def _report(self, group: Group) -> None:
        try:
            self._account(group)
        finally:
            self.release(group)

    def release(self, group: Group) -> None:
        """Give back what a group that has ended still has."""
        if group.transfer is not None and group.transfer.staged is not None:
            self.give_back(group.transfer.staged)
        self.return_bytes(group)

    def return_bytes(self, group: Group) -> None:
        """Give back what a group has of the budget."""
        self.budget.give_back(group.nbytes)
        group.nbytes = 0

    def _account(self, group: Group) -> None:
        result = group.result or GroupResult(error="abandoned")
        if result.error == "abandoned":
            self.refused.update(dict.fromkeys(group.indices.tolist(), MissReason.DEADLINE))
            return
        if result.error:
            self._error = self._error or result.error
            return
        bad = dict.fromkeys(result.stale, MissReason.STALE_GENERATION) | dict.fromkeys(result.torn, MissReason.TORN)
        bad = {index: reason for index, reason in bad.items() if index < len(group.indices)}
        self.refused.update({int(group.indices[index]): reason for index, reason in bad.items()})
        good = np.delete(group.indices, list(bad)) if bad else group.indices
        if result.stale and len(good):  # stale pages end a group before any byte moved: ask for the others alone
            if self._draining or self.deadline.expired:
                self.refused.update(dict.fromkeys(good.tolist(), MissReason.DEADLINE))
            else:
                again = Group(good, group.nbytes, group.place)  # within the bytes and the place that it had
                group.nbytes, group.place = 0, None
                self._begin(again, next_in_order=True)
            return
        if len(good):
            self.deliver(group, good)

    def deliver(self, group: Group, good: np.ndarray) -> None:
        """Put those of a group's pages that are good where they belong, and report them.

        Args:
            group: has arrived.
            good: (n,) indices into the request, n > 0.
        """
        if group.transfer is not None and group.transfer.staged is not None:
            self._unpack(group.transfer.staged, group, np.isin(group.indices, good))
        self.return_bytes(group)
        self.valid += len(good)
        if self.on_group is not None:
            self.on_group(good)

    def _unpack(self, staged: StagingBuffer, group: Group, good: np.ndarray) -> None:
        """Copy the good ones of a group's pages, a bool array, from the buffer to where they belong."""
        nbytes = len(good) * self.page_bytes
        packed = PagedMemory.packed(staged.array[:nbytes].reshape(-1, self.page_bytes))
        targets = self.request.local_pages[group.indices[good]]
        copy_pages(packed, np.flatnonzero(good), self.request.local, targets)

    def _drain(self) -> None:
        """Wait for the groups under way; those that UCX still writes after `DRAIN_S` lose their connection."""
        self._draining = True
        if not self._pending:
            return
        self.driver.submit(self._abandon)
        limit = time.monotonic() + DRAIN_S
        while self._pending and time.monotonic() < limit:
            self._collect_ended(limit - time.monotonic())
        if not self._pending:
            return
        self.driver.submit(lambda: self.peer.close("cut to stop a transfer that was given up"))
        limit = time.monotonic() + CUT_S
        while self._pending and time.monotonic() < limit and self.driver.alive:
            self._collect_ended(0.1)
        if self._pending:  # the driver is stuck inside UCX: only its end makes the local pages safe
            self.driver.close()
            raise TransferError("UCX did not give local memory back", scheme="ucx", peer=self.peer.address)

    def _collect_ended(self, timeout_s: float) -> None:
        try:
            group = self._ended.get(timeout=max(0.001, timeout_s))
        except queue.Empty:
            return
        self._take(group)

    def _abandon(self) -> None:
        for group in list(self._pending):
            if group.transfer is not None and group.result is None:
                self.peer.abandon(group.transfer)
