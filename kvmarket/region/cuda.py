"""Pages in the memory of a GPU, how peers find them, and what the rest of kvmarket asks of CUDA.

Nothing here imports a CUDA library: `kvmarket.transport.cuda_runtime` implements `CudaApi` on cupy, and
`kvmarket.testing.host_cuda` on host memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from kvmarket.errors import InvalidInputError
from kvmarket.region.pages import PagedMemory, PageLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

HANDLE_BYTES = 64
UUID_BYTES = 16
NO_DIGESTS = np.empty(0, "V16")


@dataclass(frozen=True, slots=True)
class CudaAddress:
    """How a peer finds a piece of CUDA memory: the allocation it is part of, and where in it.

    Attributes:
        device: UUID of the card, 16 bytes.
        handle: IPC handle of the whole allocation, 64 bytes.
        buffer_id: number of the allocation in its process; never used twice, unlike its address.
        allocation_bytes: size of the whole allocation.
        offset: first byte of the piece in the allocation.
        nbytes: size of the piece.
    """

    device: bytes
    handle: bytes
    buffer_id: int
    allocation_bytes: int
    offset: int
    nbytes: int

    def __post_init__(self) -> None:
        if len(self.device) != UUID_BYTES or len(self.handle) != HANDLE_BYTES:
            raise InvalidInputError("a CUDA address has a card UUID of 16 bytes and a handle of 64")
        if self.nbytes < 1 or self.offset + self.nbytes > self.allocation_bytes:
            raise InvalidInputError("a CUDA address reaches outside its allocation")

    def as_list(self) -> list[object]:
        """The wire form."""
        return [self.device, self.handle, self.buffer_id, self.allocation_bytes, self.offset, self.nbytes]


class CudaTransfer(ABC):
    """A copy that was launched.

    Attributes:
        digests: (n,) V16, of the pages that were to be digested; there after `wait`.
    """

    digests: np.ndarray

    @property
    @abstractmethod
    def ended(self) -> bool:
        """True when `wait` would not wait: the copy has ended, or failed."""

    @abstractmethod
    def wait(self) -> None:
        """Return when the copy has ended and its bytes are visible to every later launch.

        Raises:
            TransferError: it failed, or the card does not end it; in the second case its target may still change.
        """


class CudaApi(ABC):
    """What kvmarket needs of CUDA. Thread-safe. Arrays are one-dimensional uint8 (cupy's, where this is real)."""

    @abstractmethod
    def make_current(self, device: int) -> None:
        """Make a card's context current for this thread, for libraries that look for one."""

    @abstractmethod
    def device_of(self, array: Any) -> int:
        """Return the ordinal of the card that holds `array`."""

    @abstractmethod
    def ordinal(self, uuid: bytes) -> int | None:
        """Return this process's number of a card, or None when it does not see that card."""

    @abstractmethod
    def peer_access(self, here: int, there: int) -> bool:
        """Let cards `here` and `there` read each other; return False when `here` cannot read memory of `there`."""

    @abstractmethod
    def pointer(self, array: Any) -> int:
        """Return the address of the first byte."""

    @abstractmethod
    def allocate(self, nbytes: int, device: int) -> Any:
        """Return an array of its own allocation, which can be exported. It is freed with the last reference to it."""

    @abstractmethod
    def upload(self, data: bytes, array: Any) -> None:
        """Write bytes from the host, and return when they are there."""

    @abstractmethod
    def download(self, array: Any) -> bytes:
        """Return the bytes of a small array."""

    @abstractmethod
    def export(self, array: Any) -> CudaAddress:
        """Make an array readable by other processes.

        Raises:
            RegistrationError: its allocation cannot be exported; the message says what to change.
        """

    @abstractmethod
    def open(self, address: CudaAddress, device: int) -> Any:
        """Map a peer's whole allocation for use by card `device`; it is unmapped with the last reference to the array.

        Raises:
            TransportUnavailableError: it cannot be mapped here.
            PeerGoneError: what is there is smaller than announced.
        """

    @abstractmethod
    def copy(
        self,
        source: CudaPagedMemory,
        source_pages: np.ndarray,
        target: CudaPagedMemory,
        target_pages: np.ndarray,
        digest: np.ndarray | Literal[True] | None = None,
    ) -> CudaTransfer:
        """Launch one copy of pages to pages, on a stream of its own, after `target.after` if there is one.

        Args:
            source: where from; may be another card's memory.
            source_pages: (n,) int64 page numbers there.
            target: where to; its card does the copying.
            target_pages: (n,) int64 page numbers there, without repeats.
            digest: (n,) bool: which of these pages to digest in the course of the copy; True: all; None: none.
        """

    @abstractmethod
    def digests(self, memory: CudaPagedMemory, pages: np.ndarray) -> np.ndarray:
        """Return the `kvmarket.digest.sum128` of each page, (n,) V16, computed where the pages are."""


@dataclass(frozen=True)
class CudaPagedMemory(PagedMemory):
    """A page layout over memory of one card: `memories` are flat uint8 arrays there.

    Attributes:
        api: the CUDA that the arrays belong to.
        after: reads into these pages start on the card only after this event (of torch or cupy): record it behind the
            work that still uses the memory. None: there is no such work.
    """

    api: CudaApi
    after: Any = None
    kind: ClassVar[str] = "cuda"

    @classmethod
    def of(cls, api: CudaApi, layout: PageLayout, memories: Sequence[Any], after: Any = None) -> CudaPagedMemory:
        """Check that the layout fits the memories and that all of them are on one card.

        Raises:
            InvalidInputError: they do not fit, or lie on several cards.
        """
        if not memories:
            raise InvalidInputError("a region needs at least one memory")
        layout.check([len(memory) for memory in memories])
        devices = sorted({api.device_of(memory) for memory in memories})
        if len(devices) > 1:
            raise InvalidInputError(f"the memories lie on cards {devices}; lend one region per card")
        return cls(layout, tuple(memories), api, after)

    @cached_property
    def device(self) -> int:
        """The ordinal of the card."""
        return self.api.device_of(self.memories[0])

    @cached_property
    def pointers(self) -> tuple[int, ...]:
        """The address of each memory."""
        return tuple(self.api.pointer(memory) for memory in self.memories)
