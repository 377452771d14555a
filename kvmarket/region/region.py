"""A region lent to peers: pages in place plus the generations that guard them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvmarket.errors import InvalidInputError, TransportError
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.region.generations import GenerationTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmarket.region.cuda import CudaAddress
    from kvmarket.region.leases import PageLeases
    from kvmarket.region.memory import SharedMemory
    from kvmarket.region.pages import PagedMemory, PageLayout


class Exports(Protocol):
    """How peers reach memory that is not shared memory."""

    def addresses(self, probe: bytes) -> Sequence[CudaAddress]:
        """Return where peers find `probe` and then each memory."""

    def close(self) -> None:
        """Give back what `addresses` took."""


class LentRegion:
    """Pages of this process that peers may read. The owner promises `invalidate` before a page's bytes change.

    Attributes:
        region_id: its number among this owner's regions.
        pages: the pages, writable.
        generations: one counter per page, shared with readers.
        tier: what holds the pages: ``engine`` (memory of the caller's, lent in place) or ``host`` (an arena of copies).
        leases: taken by readers that this process knows of; None where nobody waits for them.
    """

    def __init__(
        self,
        region_id: int,
        incarnation: bytes,
        pages: PagedMemory,
        shared: Sequence[SharedMemory],
        fingerprint: bytes,
        *,
        exports: Exports | None = None,
        digest: str = "xxh3_128",
        verify: str = "full",
        tier: str = "engine",
        leases: PageLeases | None = None,
    ) -> None:
        """Lend `pages`.

        Args:
            region_id: see above.
            incarnation: the owner's.
            pages: see above.
            shared: the memories of host pages, in the same order; empty when only this process may read them.
            fingerprint: the spec's.
            exports: how peers reach CUDA pages; None when only this process may read them.
            digest: algorithm of the digests that will be announced.
            verify: how this owner verifies what it adopts, see `RegionDescriptor`.
            tier: see above.
            leases: see above.
        """
        pages.layout.check([len(memory) for memory in pages.memories])
        self.region_id, self.pages, self._shared, self._fingerprint = region_id, pages, tuple(shared), fingerprint
        self._verify, self.tier, self.leases = verify, tier, leases
        self.generations = GenerationTable(pages.layout.num_pages, incarnation)
        self._exports, self._digest = exports, digest
        self._cuda: tuple[CudaAddress, ...] = ()
        if exports is not None:
            try:
                self._cuda = tuple(exports.addresses(self.generations.probe))
            except TransportError:
                self.generations.close()
                raise

    @property
    def layout(self) -> PageLayout:
        """Where the pages lie."""
        return self.pages.layout

    def page_numbers(self, pages: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return `pages` as an int64 array, or raise `InvalidInputError` for one that this region does not have."""
        numbers = np.asarray(pages, dtype=np.int64).reshape(-1)
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < self.layout.num_pages:
            raise InvalidInputError(f"page number outside [0, {self.layout.num_pages}) in region {self.region_id}")
        return numbers

    def invalidate(self, pages: Sequence[int] | np.ndarray) -> None:
        """Stop peers from adopting `pages`, at once. Call it before their bytes change."""
        self.generations.invalidate(self.page_numbers(pages))

    def describe(self, endpoints: Mapping[str, tuple[tuple[str, int], ...]] | None = None) -> RegionDescriptor:
        """What peers are told of this region; `endpoints`: where its owner listens, by transport."""
        return RegionDescriptor(
            region_id=self.region_id,
            fingerprint=self._fingerprint,
            layout=self.layout,
            memories=tuple(memory.address for memory in self._shared),
            generations=self.generations.memory.address,
            probe=self.generations.probe,
            endpoints=endpoints or {},
            kind=self.pages.kind,
            cuda=self._cuda,
            digest=self._digest,
            verify=self._verify,
            tier=self.tier,
        )

    def close(self) -> None:
        """Make every page unreadable and give the generation table back. The pages' memory stays the caller's."""
        self.generations.close()
        if self._exports is not None:
            self._exports.close()
