"""A read of pages on a GPU over UCX: groups arrive packed in staging buffers, and the reader's kernels spread them.

Several steps are under way at once: the owner packs a group while UCX carries the one before it and a kernel here
spreads the one before that. A group keeps its buffer, and its share of the budget, until it has been spread.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.errors import TransferError
from kvmarket.transport.ucx_read import Group, GroupedRead

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmarket.region.cuda import CudaApi, CudaPagedMemory, CudaTransfer
    from kvmarket.transport.base import ReadRequest
    from kvmarket.transport.ucx_cuda_staging import CardStaging
    from kvmarket.transport.ucx_peer import GroupResult, Peer, Transfer
    from kvmarket.transport.ucx_read import Start

SPREADING_MAX = 1
"""Groups of one read that are being spread while the next ones are on their way. One: who waits for a group should
hear of it before more are asked for than are needed."""


@dataclass(frozen=True, slots=True)
class _Spreading:
    group: Group
    good: np.ndarray
    transfer: CudaTransfer


def staged_start(peer: Peer, region: int, request: ReadRequest, page_bytes: int, cuda: CudaApi) -> Start:
    """Return what asks for a group of pages of a region, to be put into the buffer that is the group's place."""

    def start(group: Group, finish: Callable[[GroupResult], None]) -> Transfer:
        iov = np.array([[cuda.pointer(group.place), len(group.indices) * page_bytes]], np.uint64)
        return peer.read(region, request.pages[group.indices], request.generations[group.indices], iov, finish)

    return start


@dataclass
class CardRead(GroupedRead):
    """`GroupedRead` into memory of a card.

    Args:
        local: the pages of the request.
        staging: buffers on the card.
    """

    local: CudaPagedMemory = field(kw_only=True)
    staging: CardStaging = field(kw_only=True)
    _under_way: deque[_Spreading] = field(default_factory=deque)

    def take_bytes(self, nbytes: int) -> bool:
        while self._under_way:  # nobody else gives back what they hold
            if self.budget.take_now(nbytes):
                return True
            self._finish_oldest()
        return super().take_bytes(nbytes)

    def prepare(self, group: Group) -> None:
        if group.place is None:
            group.place = self.staging.take(len(group.indices) * self.page_bytes, self.local.device)

    def deliver(self, group: Group, good: np.ndarray) -> None:
        """Launch what spreads a group; it is reported when that has ended."""
        request = self.request
        staged = self.staging.packed(group.place, self.page_bytes)
        whole = len(good) == len(group.indices)
        slots = np.arange(len(good)) if whole else np.flatnonzero(np.isin(group.indices, good))
        digest = None if request.digest is None else request.digest[good]
        try:
            transfer = self.local.api.copy(staged, slots, self.local, request.local_pages[good], digest)
        except TransferError as error:
            self._error = self._error or str(error)
            return
        self._under_way.append(_Spreading(Group(group.indices, group.nbytes, group.place), good, transfer))
        group.nbytes, group.place = 0, None
        while len(self._under_way) > SPREADING_MAX:
            self._finish_oldest()

    def release(self, group: Group) -> None:
        if group.place is not None:
            self.staging.give_back(group.place)
            group.place = None
        self.return_bytes(group)

    def run(self) -> None:
        began = time.perf_counter()
        try:
            super().run()
            while self._under_way:
                self._finish_oldest()
        finally:  # what was launched still writes
            while self._under_way:
                self._settle_oldest()
        self.copy_seconds = time.perf_counter() - began
        self.check()

    def _settle_oldest(self) -> _Spreading | None:
        """Wait until the oldest group has been spread, and return it; None if that failed."""
        spreading = self._under_way.popleft()
        try:
            spreading.transfer.wait()
        except TransferError as error:
            self._error = self._error or str(error)
            self.return_bytes(spreading.group)  # but its buffer is lost: the card may still read it
            return None
        self.release(spreading.group)
        return spreading

    def _finish_oldest(self) -> None:
        """Wait for the oldest group, and report it."""
        spreading, request = self._settle_oldest(), self.request
        if spreading is None:
            return
        good, digests = spreading.good, spreading.transfer.digests
        self.valid += len(good)
        if len(digests) and request.digest is not None and request.on_digests:
            request.on_digests(good[request.digest[good]], digests)
        if self.on_group is not None:
            self.on_group(good)
