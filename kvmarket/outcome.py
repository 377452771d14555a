"""What a fetch comes to, while it runs and in the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmarket.report import FetchReport, MissReason, TransferReport

if TYPE_CHECKING:
    import numpy as np

    from kvmarket.identity import OwnerInfo
    from kvmarket.registry import LookupResult
    from kvmarket.spec import KVCacheSpec


Answer = tuple["LookupResult", MissReason, str]
"""What a look-up found, and why that is not more."""


@dataclass
class Outcome:
    """What reading a run of blocks came to.

    Attributes:
        blocks: leading blocks that are adopted.
        reason, detail: why it is not more.
        transfers: one report per transfer.
        sources: owner description -> blocks.
        stages: seconds by stage.
        blocks_verified: blocks whose digest was compared.
    """

    blocks: int = 0
    reason: MissReason = MissReason.NONE
    detail: str = ""
    transfers: list[TransferReport] = field(default_factory=list)
    sources: dict[str, int] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=lambda: {"connect": 0.0, "read": 0.0, "verify": 0.0})
    blocks_verified: int = 0

    def add_disk(self, report: TransferReport) -> None:
        """Add what this process's own disk held of the following blocks."""
        if report.pages:
            self.blocks += report.pages
            self.blocks_verified += report.pages
            self.sources["disk"] = report.pages
            self.transfers.append(report)
        self.stages["read"] += report.seconds


@dataclass(slots=True)
class Sources:
    """Owners in the course of one fetch: those that are not asked again, and those that blocks were taken from."""

    excluded: set[int] = field(default_factory=set)
    used: dict[int, OwnerInfo] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetch came to.

    Attributes:
        found: what the registry knows.
        reason, detail: why that is not more.
        outcome: what was read of it.
        blocks_asked: how many keys there were.
        stored: blocks behind those found that this process's own disk holds.
    """

    found: LookupResult
    reason: MissReason
    detail: str
    outcome: Outcome
    blocks_asked: int
    stored: int = 0

    def report(self, tokens: int, spec: KVCacheSpec) -> FetchReport:
        """Return the report of a fetch of `tokens` tokens."""
        found, outcome = self.found, self.outcome
        return FetchReport(
            tokens_asked=tokens,
            tokens_matched=(found.blocks + self.stored) * spec.block_size,
            tokens_adopted=outcome.blocks * spec.block_size,
            blocks_adopted=outcome.blocks,
            blocks_verified=outcome.blocks_verified,
            nbytes=outcome.blocks * spec.page_bytes,
            sources=outcome.sources,
            transfers=tuple(outcome.transfers),
            stages=outcome.stages,
            reason=outcome.reason,
            first_missing_block=outcome.blocks if outcome.blocks < self.blocks_asked else None,
            detail=outcome.detail,
        )


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What `Marketplace.fetch` returns.

    Attributes:
        kv: (blocks_adopted, page_bytes) uint8: the pages, packed. With ``out=`` a view of it, of cupy for a GPU.
        report: what happened.
    """

    kv: np.ndarray
    report: FetchReport
