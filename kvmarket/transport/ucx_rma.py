"""One-sided reads: the generation table before, the pages, the table and its header after, all without the owner.

The header is read last: it holds random bytes of this very table, so a table whose memory was given back and used again
between the two looks is never mistaken for the live one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.errors import InvalidInputError, TransportUnavailableError
from kvmarket.region.generations import VALUES_OFFSET, table_header
from kvmarket.transport import ucx_api as api
from kvmarket.transport.ucx_iov import Runs, cut, page_runs
from kvmarket.transport.ucx_peer import GroupResult, Peer, Transfer

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmarket.region.descriptor import RegionDescriptor
    from kvmarket.transport.ucx_operations import Endpoint, Piece
    from kvmarket.transport.ucx_wire import Region

WINDOW_GAP = 512
"""Counters between two wanted ones that are read along rather than asked for separately."""


class RemoteRegion:
    """A peer's region as one-sided reads see it. Made on the driver's thread; ends with the peer's endpoint.

    Raises:
        TransportUnavailableError: what the owner says of its memory does not fit the region's descriptor.
    """

    def __init__(self, peer: Peer, incarnation: bytes, descriptor: RegionDescriptor, answer: Region) -> None:
        self.layout = descriptor.layout
        self.header = table_header(incarnation, descriptor.layout.num_pages, descriptor.probe)
        try:
            self.layout.check([nbytes for _, nbytes, _ in answer.memories])
        except InvalidInputError as error:
            raise TransportUnavailableError(f"the owner's memory does not fit: {error}", scheme="ucx") from error
        if len(answer.table) != 1 or answer.table[0][1] < VALUES_OFFSET + 8 * self.layout.num_pages:
            raise TransportUnavailableError("the owner's generation table does not fit", scheme="ucx")
        self.bases = np.array([address for address, _, _ in answer.memories], np.uint64)
        self.keys = [self._unpack(peer, key) for _, _, key in answer.memories]
        self.table, self.table_key = answer.table[0][0], self._unpack(peer, answer.table[0][2])

    @staticmethod
    def _unpack(peer: Peer, packed: bytes) -> int:
        if peer.endpoint is None or peer.endpoint.closed:
            raise TransportUnavailableError("the connection is gone", scheme="ucx")
        try:
            key = api.unpack_rkey(peer.endpoint.handle, packed)
        except api.UcxError as error:
            raise TransportUnavailableError(f"the owner's key cannot be used: {error}", scheme="ucx") from error
        peer.rkeys.append(key)
        return key

    def runs(self, pages: np.ndarray) -> Runs:
        """Where pages lie in the owner's memory."""
        return page_runs(self.layout, self.bases, pages)


@dataclass(frozen=True, slots=True)
class RemoteGroup:
    """Pages of a region, the generations announced for them, and the (n, 2) scatter/gather list of where they go."""

    region: RemoteRegion
    pages: np.ndarray
    generations: np.ndarray
    iov: np.ndarray


class CounterWindows:
    """Where the generation counters of some pages are fetched to: a few runs of counters, near ones read along.

    Args:
        pages: (n,) int64 page numbers, in any order.
    """

    def __init__(self, pages: np.ndarray) -> None:
        wanted = np.unique(pages)
        first = np.concatenate(([0], np.flatnonzero(np.diff(wanted) > WINDOW_GAP) + 1))
        last = np.concatenate((first[1:], [len(wanted)])) - 1
        self._pages, self._starts = pages, wanted[first]
        self._lengths = wanted[last] + 1 - self._starts
        self._offsets = np.cumsum(self._lengths) - self._lengths
        self._counters = np.empty(int(self._lengths.sum()), np.uint64)

    def local_iov(self) -> np.ndarray:
        """(n, 2) uint64: addresses and lengths to read to."""
        return self._iov(self._counters.ctypes.data, self._offsets)

    def remote_iov(self, base: int) -> np.ndarray:
        """(n, 2) uint64: addresses and lengths to read from, with the table's counters at `base`."""
        return self._iov(base, self._starts)

    def _iov(self, base: int, counters: np.ndarray) -> np.ndarray:
        iov = np.empty((len(counters), 2), np.uint64)
        iov[:, 0] = np.uint64(base) + np.uint64(8) * counters.astype(np.uint64)
        iov[:, 1] = 8 * self._lengths
        return iov

    def current(self) -> np.ndarray:
        """(n,) uint64: the generations just read of the pages."""
        window = np.searchsorted(self._starts, self._pages, side="right") - 1
        current: np.ndarray = self._counters[self._offsets[window] + (self._pages - self._starts[window])]
        return current


class OneSidedRead(Transfer):
    """The read of one group: three rounds of gets, each waiting for the one before."""

    def __init__(
        self,
        number: int,
        peer: Peer,
        endpoint: Endpoint,
        group: RemoteGroup,
        finish: Callable[[GroupResult], None],
    ) -> None:
        super().__init__(number, finish)
        self._driver, self._endpoint, self._peer, self._region = peer.driver, endpoint, peer, group.region
        self._pages, self._generations, self._iov = group.pages, group.generations, group.iov
        self._windows = CounterWindows(group.pages)
        self._header = np.empty(len(group.region.header), np.uint8)
        self._status = api.UCS_OK
        self._next: Callable[[], None] = self._got_before

    def start(self) -> None:
        """Begin; on the driver's thread."""
        self._read_table(self._got_before)

    def _done(self, status: int) -> None:
        self._peer.heard()
        self.writing -= 1
        if status != api.UCS_OK and self._status == api.UCS_OK:
            self._status = status
        if self.writing:
            return
        if self._status != api.UCS_OK:
            self.end(GroupResult(error=api.status_text(self._status)))
        elif self.result is not None:
            self.settle()
        else:
            self._next()

    def _round(self, gets: list[Piece], following: Callable[[], None]) -> None:
        """Post gets, then go on with `following`; one extra is counted so that none ends the round early."""
        self._next = following
        self.writing += 1
        for piece in gets:
            self.writing += 1
            self._driver.get(self._endpoint, piece, self._done)
        self._done(api.UCS_OK)

    def _read_table(self, following: Callable[[], None]) -> None:
        remote, local = self._windows.remote_iov(self._region.table + VALUES_OFFSET), self._windows.local_iov()
        gets = [
            (here, nbytes, there, self._region.table_key)
            for (here, nbytes), (there, _) in zip(local.tolist(), remote.tolist(), strict=True)
        ]
        self._round(gets, following)

    def _got_before(self) -> None:
        odd = (self._generations & np.uint64(1)) != 0
        stale = (self._windows.current() != self._generations) | odd | (self._generations == 0)
        if stale.any():
            self.end(GroupResult(stale=np.flatnonzero(stale).tolist()))
            return
        pieces, memories = cut(self._region.runs(self._pages), self._iov)
        keys = self._region.keys
        gets = [
            (local, nbytes, remote, keys[memory])
            for (local, nbytes, remote), memory in zip(pieces.tolist(), memories.tolist(), strict=True)
        ]
        self._round(gets, lambda: self._read_table(self._got_after))

    def _got_after(self) -> None:
        header = (self._header.ctypes.data, len(self._header), self._region.table, self._region.table_key)
        self._round([header], self._got_header)

    def _got_header(self) -> None:
        if self._header.tobytes() != self._region.header:
            self.end(GroupResult(error="the owner's generation table is gone"))
            return
        self.end(GroupResult(torn=np.flatnonzero(self._windows.current() != self._generations).tolist()))
