"""The registry interface. Calls are synchronous and thread-safe; a `local` registry never waits for anybody.

A registry holds *hints*: what is true is the generation at the owner. It must never invent a record, never return one
of an owner that is not alive, and never return one across namespaces or epochs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from kvmarket.identity import visible_to

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from kvmarket.identity import OwnerInfo
    from kvmarket.metrics import Metrics
    from kvmarket.registry.records import BlockRecords, Part


@dataclass(frozen=True, slots=True)
class NamespaceInfo:
    """A namespace that somebody publishes in: its digest, its public description, and its live owners."""

    digest: bytes
    description: dict[str, Any]
    owners: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LookupResult:
    """The longest run of blocks that live owners announced.

    Attributes:
        epoch: the namespace's epoch; compare with `Registry.epoch` before adopting (0: unknown namespace).
        blocks: number of consecutive blocks, from the first one asked for, that have at least one record.
        records: their records, sorted by block; several owners of one block give several records.
        first_missing: what ended the run: ``""``, ``not_published`` or ``owner_gone``; ``stale_generation`` or
            ``unverified`` when a reader has shortened it.
        owners: who the owners of the records are.
        keys: what was asked for.
    """

    epoch: int
    blocks: int
    records: BlockRecords
    first_missing: str = ""
    owners: dict[int, OwnerInfo] = field(default_factory=dict)
    keys: Sequence[bytes] = ()


def shown(found: Iterable[NamespaceInfo], limit: int, own: bytes, tag: str) -> list[NamespaceInfo]:
    """Choose those of `found` that `Registry.namespaces` lists."""
    listed = [info for info in found if info.digest == own or visible_to(tag, info.description)]
    return sorted(listed, key=lambda info: info.digest != own)[:limit]


class Lookup(ABC):
    """A look-up whose keys come in parts, as if all had come at once. A context manager; for one thread.

    Attributes:
        epoch: the namespace's, 0 when it is not known.
    """

    epoch: int

    @abstractmethod
    def __enter__(self) -> Self:
        """Begin. Errors as of `Registry.lookup`."""

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End. Must not be long after the beginning: the registry may keep for it what others have removed."""

    @abstractmethod
    def more(self, keys: Sequence[bytes]) -> Part:
        """Look up the next keys; return what the run grew by. Nothing is added to a run that has ended."""

    @property
    @abstractmethod
    def ended(self) -> bool:
        """True once a key was found that no living owner holds."""

    @property
    @abstractmethod
    def owners(self) -> Mapping[int, OwnerInfo]:
        """Who holds what was found so far."""

    @abstractmethod
    def result(self) -> LookupResult:
        """Return what was found."""


class Registry(ABC):
    """Who holds which block."""

    scheme: str
    metrics: Metrics
    """What this object has counted, see `kvmarket.metric_families`."""
    local: bool
    """True when look-ups take microseconds and never block, so that an event loop may call them directly."""

    @abstractmethod
    def register_owner(self, incarnation: bytes) -> OwnerInfo:
        """Enter this process as an owner; it stays one until `release_owner` or its death."""

    @abstractmethod
    def register_region(self, owner: int, region_id: int, descriptor: dict[str, Any]) -> None:
        """Make a region of `owner` known. Must come before records that name it."""

    @abstractmethod
    def release_owner(self, owner: int) -> None:
        """Forget an owner of this process and all its records."""

    @abstractmethod
    def open_namespace(self, digest: bytes, description: dict[str, Any]) -> int:
        """Make a namespace known, if it is not, and return its epoch."""

    @abstractmethod
    def announce(self, digest: bytes, epoch: int, keys: Sequence[bytes], records: BlockRecords) -> bool:
        """Announce blocks, all or none; one owner's newer record of a block replaces its older one.

        Returns:
            False when the namespace's epoch is no longer `epoch`: the caller must forget what it published.
        """

    @abstractmethod
    def withdraw(self, digest: bytes, owner: int, keys: Sequence[bytes]) -> int:
        """Remove this owner's records of `keys`; return how many there were."""

    @abstractmethod
    def discard(self, digest: bytes, keys: Sequence[bytes], records: BlockRecords) -> int:
        """Remove records that their owner refuses, where they are still exactly these; return how many there were.

        Args:
            digest: the namespace.
            keys: what was looked up.
            records: some of what was found.
        """

    @abstractmethod
    def lookup(self, digest: bytes, keys: Sequence[bytes]) -> LookupResult:
        """Return the longest run of `keys`, from the first one on, that live owners hold."""

    def looking_up(self, digest: bytes) -> Lookup | None:
        """Return a look-up in parts, or None where each part would be a round trip."""
        del digest
        return None

    @abstractmethod
    def region(self, owner: int, region_id: int) -> dict[str, Any] | None:
        """Return a region's descriptor, or None."""

    @abstractmethod
    def alive(self, owner: int) -> bool:
        """Tell whether that owner's process still runs."""

    @abstractmethod
    def epoch(self, digest: bytes) -> int:
        """Return the namespace's epoch, or 0 when it is not known."""

    def epoch_hint(self, digest: bytes) -> int:
        """Return the epoch as far as this process knows, without ever waiting; a registry that is not local may lag."""
        return self.epoch(digest)

    def still(self, digest: bytes, owners: Sequence[int]) -> tuple[int, list[int]]:
        """Return the namespace's epoch, and those of `owners` that are not alive: what is checked before adopting."""
        return self.epoch(digest), [owner for owner in owners if not self.alive(owner)]

    @abstractmethod
    def bump_epoch(self, digest: bytes) -> int:
        """Make every process forget all blocks of the namespace, at once; return the new epoch."""

    @abstractmethod
    def namespaces(self, limit: int = 64, *, own: bytes = b"", tag: str = "") -> list[NamespaceInfo]:
        """List namespaces that have live owners and may be shown, for explanations.

        Args:
            limit: how many at most.
            own: the digest of the asker's namespace, which comes first.
            tag: of the asker's secret: namespaces with another secret are left out.
        """

    @abstractmethod
    def sweep(self) -> int:
        """Remove what dead owners left behind; return the number of owners removed."""

    @abstractmethod
    def close(self) -> None:
        """Release this process's handles. Owners of this process must have been released. Idempotent."""
