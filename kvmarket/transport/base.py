"""The transport interface: connect to a peer's region, read pages of it into pages of mine.

Reads are synchronous and run off the event loop: a thread that releases the GIL, a GPU stream or a progress thread does
the work. The reader drives; a page counts only if its generation was the announced one before *and* after its bytes
moved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.errors import TransportUnavailableError

if TYPE_CHECKING:
    from kvmarket.announced import Announced
    from kvmarket.deadline import Deadline
    from kvmarket.identity import OwnerInfo
    from kvmarket.region.descriptor import RegionDescriptor
    from kvmarket.region.pages import PagedMemory
    from kvmarket.region.region import LentRegion
    from kvmarket.report import TransferReport

OnGroup = Callable[[np.ndarray], None]
"""Called from the reading thread with the indices (into the request) of pages that arrived and passed their checks."""
OnDigests = Callable[[np.ndarray | slice, np.ndarray], None]
"""Called with indices and digests; the indices are a slice without a step only for a request that has `announced`."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can do.

    Attributes:
        one_sided: the owner's process does no work for a read.
        memory: kinds of memory it moves (``host``, ``cuda``).
        cross_process: it reaches other processes of this host.
        cross_host: it reaches other hosts.
    """

    one_sided: bool
    memory: frozenset[str]
    cross_process: bool
    cross_host: bool


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Pages to read.

    Attributes:
        pages: (n,) int64 page numbers in the remote region.
        generations: (n,) uint64 generations that were announced for them.
        local: where they go.
        local_pages: (n,) int64 page numbers there, without repeats.
        digest: (n,) bool: pages to digest in the course of the read, for a connection that `digests`; None: no page.
        on_digests: called from the reading thread with their indices (into the request), and (n,) V16 digests, once
            they have arrived and passed their checks.
        announced: `pages` and `generations` once more, where the caller has them prepared; a `digest` that is its
            `every` asks for all digests.
    """

    pages: np.ndarray
    generations: np.ndarray
    local: PagedMemory
    local_pages: np.ndarray
    digest: np.ndarray | None = None
    on_digests: OnDigests | None = None
    announced: Announced | None = None


class Stream(ABC):
    """One read whose pages become known in parts: what is known is copied while the reader looks for the rest."""

    @abstractmethod
    def add(self, request: ReadRequest, deadline: Deadline) -> bool:
        """Start reading more pages, into the same memory as before, at the latest with `flush`; return soon.

        Returns:
            False when the read is over: a page was refused or the deadline passed. `finish` names the pages that were
            not read because of that.
        """

    @abstractmethod
    def flush(self) -> None:
        """Start what was added and waits for more to go with it; nothing else will be added soon."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """True when `finish` would not wait."""

    @abstractmethod
    def finish(self) -> TransferReport:
        """Wait for everything that was added; same promises, errors and report as `Connection.read`.

        This or `abandon` must be called once, whatever happened.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Start nothing more, and wait until nothing writes to local memory any more.

        Raises:
            TransferError: the card failed, or does not end what was started.
        """


class Connection(ABC):
    """A way to read one region of one owner. Thread-safe."""

    scheme: str
    path: str
    """How the bytes really travel, for reports."""
    immediate: bool = False
    """A read copies memory and waits for nobody, so that an event loop may do a small one itself."""
    fills: frozenset[str] = frozenset({"host"})
    """Kinds of local memory that it can read into."""
    digest: str = "xxh3_128"
    """Algorithm of the digests in the region's records."""
    tier: str = "engine"
    """What holds the region's pages at its owner, see `RegionDescriptor`."""
    digests: bool = False
    """It digests pages in the course of the read (see `ReadRequest.digest`), which is cheaper than afterwards."""

    @abstractmethod
    def read(self, request: ReadRequest, *, deadline: Deadline, on_group: OnGroup | None = None) -> TransferReport:
        """Read pages in order; end early, after the current group, at the first page that is refused.

        When it returns, nothing writes to the local pages any more, whatever happened. Pages that were refused are
        named in the report with the reason, pages not reached with the reason that ended the read; their local bytes
        are undefined.

        Raises:
            PeerGoneError, TransferError: the connection is of no more use.
        """

    def prepare(self, local: PagedMemory | None = None) -> None:
        """Do at once what the first read into `local` would do: map the owner's memory for its card, and prove that.

        None stands for memory like the owner's. Who only asks what is `fresh` need not have it done.

        Raises:
            TransportUnavailableError, PeerGoneError: as `Transport.connect`.
        """
        del local

    def stream(self, local: PagedMemory) -> Stream | None:
        """Return a read into `local` whose pages come in parts, or None where there is nothing to gain by it.

        Raises:
            TransportUnavailableError: these pages cannot be filled from here.
        """
        del local
        return None

    def readers(self, local: PagedMemory) -> int:
        """Return how many threads should share a large read into `local`, in parts, to make it faster."""
        del local
        return 1

    def fresh(self, pages: np.ndarray, generations: np.ndarray) -> np.ndarray:
        """Return a (n,) bool array: which pages would pass the first check right now.

        A hint that saves a read bound to fail; where asking costs a message, all pages are taken to be fresh.
        """
        del generations
        return np.ones(len(pages), bool)

    @abstractmethod
    def close(self) -> None:
        """Release what the connection holds. No read may be running. Idempotent."""


class Transport(ABC):
    """One backend."""

    scheme: str
    capabilities: Capabilities

    @abstractmethod
    def connect(self, owner: OwnerInfo, descriptor: RegionDescriptor, deadline: Deadline | None = None) -> Connection:
        """Open a way to a region and prove it by reading known bytes through it.

        Args:
            owner: whose region.
            descriptor: what the owner told of it.
            deadline: how long to wait for the owner; default: as long as the backend sees fit.

        Raises:
            TransportUnavailableError: this backend does not reach that owner from here; the message says why.
            PeerGoneError: the owner's incarnation is over.
        """

    def require_memory(self, owner: OwnerInfo, kind: str) -> None:
        """Raise `TransportUnavailableError` unless this backend moves that kind of memory."""
        if kind not in self.capabilities.memory:
            raise TransportUnavailableError(f"does not read {kind} memory", scheme=self.scheme, peer=str(owner))

    @abstractmethod
    def close(self) -> None:
        """Release everything. Connections must be closed first. Idempotent."""


class ServingTransport(Transport):
    """A backend whose owners answer readers, where memory cannot be mapped."""

    @abstractmethod
    def serve(self, incarnation: bytes) -> tuple[tuple[str, int], ...]:
        """Listen for readers, if not yet, and return the (address, port) pairs to announce.

        Raises:
            TransportUnavailableError, MissingExtraError: this backend cannot be used here.
        """

    @abstractmethod
    def lend(self, region: LentRegion) -> None:
        """Serve a region from now on."""

    @abstractmethod
    def stop_serving(self) -> None:
        """Drop every reader; when it returns, no lent memory is touched any more. Idempotent."""
