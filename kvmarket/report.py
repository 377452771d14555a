"""What a publish, a match, a fetch and a transfer say about themselves.

Reports are values: a miss is one of them and says why. Times are seconds, sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class MissReason(StrEnum):
    """Why a block, or the rest of a prefix, was not served."""

    NONE = "none"
    """Everything that was asked for was served."""
    NOT_PUBLISHED = "not_published"
    """Nobody in this namespace has published the first missing block."""
    NAMESPACE_DIFFERS = "namespace_differs"
    """Nobody publishes in this namespace, but somebody does in one that differs; `detail` names the fields."""
    STALE_GENERATION = "stale_generation"
    """The owner has overwritten or freed the page since it was announced."""
    TORN = "torn"
    """The owner changed the page while it was being read; the bytes were discarded."""
    DIGEST_MISMATCH = "digest_mismatch"
    """The bytes read are not those the owner announced; they were discarded."""
    UNVERIFIED = "unverified"
    """Only owners that do not compare every digest of what they adopt hold it, and ``KVMARKET_VERIFY`` is ``full``
    here: nobody vouches for their bytes, nor for what they computed from them."""
    OWNER_GONE = "owner_gone"
    """The process that held the block died or restarted."""
    UNREACHABLE = "unreachable"
    """No transport reaches the owner from here; `detail` says what is missing."""
    SPEC_MISMATCH = "spec_mismatch"
    """The owner's page size or layout is not what its namespace promises."""
    EPOCH_CHANGED = "epoch_changed"
    """The namespace was told to forget (new weights) while the fetch ran."""
    DEADLINE = "deadline"
    """The deadline passed."""
    REGISTRY_UNAVAILABLE = "registry_unavailable"
    """The registry could not be read; `detail` says why."""
    SHORT_PROMPT = "short_prompt"
    """The prompt does not fill one block, so there is nothing to look up."""


@dataclass(frozen=True, slots=True)
class TransferReport:
    """One transfer of pages from one owner.

    Attributes:
        transport: the backend that carried the bytes.
        path: how they really travelled, e.g. ``mmap(memfd)`` or UCX lanes.
        pages: pages read and valid.
        nbytes: bytes of those pages.
        seconds: wall time of the whole call.
        copy_seconds: the part of it spent moving bytes.
        refused: page index in the request -> reason, for every page that was not delivered.
        tier: what held the pages: ``engine`` (memory lent in place), ``host`` (an arena of copies) or ``disk``.
    """

    transport: str
    path: str
    pages: int
    nbytes: int
    seconds: float
    copy_seconds: float
    refused: dict[int, MissReason] = field(default_factory=dict)
    tier: str = "engine"


@dataclass(frozen=True, slots=True)
class MatchReport:
    """What is published of a prefix, without moving a byte.

    Attributes:
        tokens: tokens of the longest published prefix.
        blocks: blocks of it.
        blocks_asked: full blocks in the prompt.
        owners: owners that hold at least one block of it.
        reason: why the match ends where it does.
        first_missing_block: index of the first block not found, or None.
        detail: a sentence for people.
        seconds: time taken.
    """

    tokens: int
    blocks: int
    blocks_asked: int
    owners: tuple[int, ...]
    reason: MissReason
    first_missing_block: int | None
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True)
class FetchReport:
    """What a fetch did.

    Attributes:
        tokens_asked: tokens in the prompt.
        tokens_matched: tokens of the longest published prefix.
        tokens_adopted: tokens whose KV is now in the caller's memory, proven to be the KV asked for.
        blocks_adopted: the same in blocks.
        blocks_verified: blocks whose bytes were compared with the owner's digest.
        nbytes: bytes adopted.
        sources: owner description -> blocks it served.
        transfers: one report per transfer.
        stages: seconds by stage: ``hash``, ``lookup``, ``connect``, ``read``, ``verify``, ``total``.
        reason: why the fetch ended where it did (`MissReason.NONE` when every full block was adopted).
        first_missing_block: index of the first block not adopted, or None.
        detail: a sentence for people.
    """

    tokens_asked: int
    tokens_matched: int
    tokens_adopted: int
    blocks_adopted: int
    blocks_verified: int
    nbytes: int
    sources: dict[str, int]
    transfers: tuple[TransferReport, ...]
    stages: dict[str, float]
    reason: MissReason
    first_missing_block: int | None
    detail: str

    @property
    def hit(self) -> bool:
        """True when at least one block was adopted."""
        return self.blocks_adopted > 0

    @property
    def transport(self) -> str:
        """The transports that carried bytes, joined by ``+``; empty when nothing moved."""
        return "+".join(sorted({t.transport for t in self.transfers if t.pages}))

    @property
    def tier(self) -> str:
        """The tiers that served, joined by ``+``; see `TransferReport`."""
        return "+".join(sorted({t.tier for t in self.transfers if t.pages}))

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready summary."""
        return {
            "tokens_asked": self.tokens_asked,
            "tokens_matched": self.tokens_matched,
            "tokens_adopted": self.tokens_adopted,
            "nbytes": self.nbytes,
            "transport": self.transport,
            "tier": self.tier,
            "paths": sorted({t.path for t in self.transfers if t.pages}),
            "sources": self.sources,
            "stages_ms": {k: round(v * 1e3, 3) for k, v in self.stages.items()},
            "reason": str(self.reason),
            "first_missing_block": self.first_missing_block,
            "detail": self.detail,
        }


@dataclass(frozen=True, slots=True)
class PublishReport:
    """What a publish did.

    Attributes:
        tokens: tokens covered by full blocks (a partial last block is never published).
        blocks: blocks readable by peers when the call returned.
        blocks_new: those that were not already published by this process.
        nbytes_copied: bytes copied into the arena (0 when published in place).
        seconds: time taken.
    """

    tokens: int
    blocks: int
    blocks_new: int
    nbytes_copied: int
    seconds: float
