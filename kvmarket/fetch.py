"""Fetching: choose a source per block, read, verify, and adopt only what is proven."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.digest import can_digest
from kvmarket.errors import PeerGoneError, RegistryError, TransferError, TransportError, TransportUnavailableError
from kvmarket.explain import explain_nothing_found
from kvmarket.helper import Helper
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.registry import LookupResult, Registry
from kvmarket.registry.records import RECORD, BlockRecords, have_digest, run_length
from kvmarket.report import MissReason, TransferReport
from kvmarket.shared_read import SharedRead
from kvmarket.stale import StaleRecords
from kvmarket.transport import Connection, ReadRequest, TransportSelector
from kvmarket.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.config import MarketConfig
    from kvmarket.deadline import Deadline
    from kvmarket.identity import Namespace, OwnerInfo
    from kvmarket.metrics import Metrics
    from kvmarket.region.pages import PagedMemory

EXPLAIN_EVERY_S = 5.0
"""How often a registry that is not local is asked why nothing is found: it takes several round trips."""


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


class Fetcher:
    """Look-ups and reads in one namespace. Thread-safe."""

    def __init__(
        self,
        namespace: Namespace,
        registry: Registry,
        transports: TransportSelector,
        config: MarketConfig,
        metrics: Metrics,
    ) -> None:
        self._namespace, self._digest = namespace, namespace.digest
        self._fingerprint, self._page_bytes = namespace.spec.fingerprint, namespace.spec.page_bytes
        self._registry, self._transports, self._metrics = registry, transports, metrics
        self._verify = config.verify
        self._helper = Helper()
        self._stale = StaleRecords(registry, self._digest, metrics)
        self._explaining = threading.Lock()
        self._explained: tuple[float, MissReason, str] = (-math.inf, MissReason.NOT_PUBLISHED, "")

    def lookup(self, keys: Sequence[bytes]) -> tuple[LookupResult, MissReason, str]:
        """Find the longest run of `keys` that live owners hold, and say why it is not longer.

        Never raises for a bad registry: that is a miss, too.
        """
        answer = self._lookup(keys)
        self._metrics.add(lookups=1)
        if answer[1] is not MissReason.NONE:
            self._metrics.add_reason("misses", answer[1])
        return answer

    def _lookup(self, keys: Sequence[bytes]) -> tuple[LookupResult, MissReason, str]:
        began = time.perf_counter() if self._metrics.timed else 0.0
        try:
            result = self._registry.lookup(self._digest, keys)
            if began:
                self._metrics.observe("lookup_seconds", time.perf_counter() - began)
            if result.blocks == len(keys):
                return result, MissReason.NONE, ""
            if result.blocks == 0 and result.first_missing == "not_published":
                return result, *self._explain()
        except RegistryError as error:
            nothing = LookupResult(0, 0, np.empty(0, RECORD))
            return nothing, MissReason.REGISTRY_UNAVAILABLE, str(error)
        return result, MissReason(result.first_missing), f"block {result.blocks} is not held by a live owner"

    def _explain(self) -> tuple[MissReason, str]:
        """Say why nothing at all was found. Where the registry is not local, an answer is good for a while."""
        if self._registry.local:
            return explain_nothing_found(self._registry, self._namespace)
        now = time.monotonic()
        with self._explaining:
            if now - self._explained[0] > EXPLAIN_EVERY_S:
                self._explained = (now, *explain_nothing_found(self._registry, self._namespace))
            return self._explained[1:]

    def fresh(self, found: LookupResult) -> LookupResult:
        """Drop records that a read would refuse already, as far as that shows without asking the owner.

        Shortens the run, and `first_missing` then says why: ``stale_generation`` or ``unverified``.
        """
        keep, why = np.ones(len(found.records), bool), "stale_generation"
        for owner_id, owner in found.owners.items():
            for region in np.unique(found.records["region"][found.records["owner"] == owner_id]).tolist():
                rows = np.flatnonzero((found.records["owner"] == owner_id) & (found.records["region"] == region))
                try:
                    connection = self._connect(owner, region)
                    keep[rows] = connection.fresh(found.records["page"][rows], found.records["generation"][rows])
                    self._stale.met(found.keys, found.records[rows[~keep[rows]]])
                except _UnverifiedError:
                    keep[rows], why = False, "unverified"
                except TransportError:
                    keep[rows] = False
        if self._verify == "full" and not (vouched := have_digest(found.records)).all():
            keep, why = keep & vouched, "unverified"
        if keep.all():
            return found
        records = found.records[keep]
        blocks = run_length(records["block"])
        records = records[records["block"] < blocks]
        return replace(found, blocks=blocks, records=records, first_missing=why)

    def read(self, found: LookupResult, local: PagedMemory, local_pages: np.ndarray, deadline: Deadline) -> Outcome:
        """Read the blocks `found` names into `local_pages` (one per block) and prove them.

        When it returns nothing writes to the local pages any more. Pages beyond `Outcome.blocks` hold undefined bytes.
        """
        outcome = Outcome()
        excluded: set[int] = set()
        used: dict[int, OwnerInfo] = {}
        records = found.records
        if self._verify == "full" and not (vouched := have_digest(records)).all():
            records = records[vouched]
            outcome.reason, outcome.detail = (
                MissReason.UNVERIFIED,
                "it was announced without a digest (as with KVMARKET_VERIFY=none)",
            )
        while outcome.blocks < found.blocks:
            if deadline.expired:
                outcome.reason, outcome.detail = MissReason.DEADLINE, "the deadline passed"
                break
            run = _next_run(records, outcome.blocks, excluded)
            if run is None:
                break  # outcome.reason says why the last source was excluded
            owner = found.owners[int(run["owner"][0])]
            adopted = self._read_run(
                run, owner, local, local_pages, deadline=deadline, outcome=outcome, keys=found.keys
            )
            if adopted:
                used[owner.owner] = owner
            if adopted < len(run):
                excluded.add(owner.owner)
        if outcome.blocks == found.blocks:
            outcome.reason, outcome.detail = MissReason.NONE, ""
        self._check_still_true(found, used, outcome)
        self._metrics.add(blocks_adopted=outcome.blocks, blocks_verified=outcome.blocks_verified)
        return outcome

    def _read_run(
        self,
        run: BlockRecords,
        owner: OwnerInfo,
        local: PagedMemory,
        local_pages: np.ndarray,
        *,
        deadline: Deadline,
        outcome: Outcome,
        keys: Sequence[bytes],
    ) -> int:
        """Read consecutive blocks of one region; return how many leading ones are good."""
        began = time.perf_counter()
        try:
            connection = self._connect(owner, int(run["region"][0]), deadline)
        except TransportError as error:
            gone = isinstance(error, PeerGoneError)
            outcome.reason = MissReason.OWNER_GONE if gone else MissReason.UNREACHABLE
            if isinstance(error, _SpecMismatchError):
                outcome.reason = MissReason.SPEC_MISMATCH
            elif isinstance(error, _UnverifiedError):
                outcome.reason = MissReason.UNVERIFIED
            outcome.detail = f"{owner}: {error}"
            self._metrics.add_reason("connections_failed", outcome.reason)
            return 0
        finally:
            outcome.stages["connect"] += time.perf_counter() - began
        if local.kind not in connection.fills:
            outcome.reason = MissReason.UNREACHABLE
            kinds = " or ".join(sorted(connection.fills))
            outcome.detail = f"{owner}: its blocks are read into {kinds} memory only, not into {local.kind} memory"
            return 0
        if self._verify == "full" and not can_digest(local.kind, connection.digest):
            outcome.reason = MissReason.UNVERIFIED
            outcome.detail = f"{owner}: its digests ({connection.digest}) cannot be compared in {local.kind} memory"
            return 0
        targets = local_pages[outcome.blocks : outcome.blocks + len(run)]
        verification = Verification(self._verify, run, local, targets, connection.digest)
        request = ReadRequest(run["page"].copy(), run["generation"].copy(), local, targets)
        reading = SharedRead(connection, request, deadline, verification)
        try:
            report = reading.run(self._helper)
        except TransportUnavailableError as error:  # the card of these local pages does not reach the owner's
            outcome.reason, outcome.detail = MissReason.UNREACHABLE, f"{owner}: {error}"
            return 0
        except (PeerGoneError, TransferError) as error:
            self._transports.forget(owner)
            outcome.reason, outcome.detail = MissReason.OWNER_GONE, f"{owner}: {error}"
            self._metrics.add_reason("connections_failed", outcome.reason)
            return 0
        verify_s = verification.seconds / reading.threads
        outcome.stages["verify"] += verify_s
        outcome.stages["read"] += report.seconds - verify_s
        outcome.blocks_verified += verification.blocks
        refused = self._counted(report).refused
        good = min(refused, default=len(run))
        if good < len(run):
            outcome.reason = refused[good]
            outcome.detail = f"block {outcome.blocks + good} from {owner}: {outcome.reason}"
            stale = [at for at, reason in refused.items() if reason is MissReason.STALE_GENERATION]
            self._stale.met(keys, run[stale])
        outcome.blocks += good
        if good:
            self._metrics.add_labelled("tier_blocks", "tier", report.tier, good)
        outcome.transfers.append(report)
        outcome.sources[str(owner)] = outcome.sources.get(str(owner), 0) + good
        return good

    def _counted(self, report: TransferReport) -> TransferReport:
        """Count what a read moved and what it refused; returns the report."""
        self._metrics.add_read(report.transport, report.path, report.nbytes)
        for reason, number in Counter(report.refused.values()).items() if report.refused else ():
            self._metrics.add_reason("blocks_refused", reason, number)
        return report

    def _connect(self, owner: OwnerInfo, region_id: int, deadline: Deadline | None = None) -> Connection:
        def describe() -> RegionDescriptor:
            try:
                self._transports.forget_dead(self._registry.alive)
                wire = self._registry.region(owner.owner, region_id)
                if wire is None:
                    raise PeerGoneError(f"region {region_id} is not registered any more", peer=str(owner))
                descriptor = RegionDescriptor.from_wire(wire)
            except RegistryError as error:
                raise TransportUnavailableError(str(error), peer=str(owner)) from error
            if descriptor.fingerprint != self._fingerprint or descriptor.layout.page_bytes != self._page_bytes:
                raise _SpecMismatchError(
                    f"its pages have {descriptor.layout.page_bytes} bytes and spec {descriptor.fingerprint.hex()}, "
                    f"expected {self._page_bytes} and {self._fingerprint.hex()}",
                    peer=str(owner),
                )
            if self._verify == "full" and descriptor.verify != "full":
                raise _UnverifiedError(
                    f"it does not compare every digest of what it adopts (KVMARKET_VERIFY={descriptor.verify} there)",
                    peer=str(owner),
                )
            return descriptor

        return self._transports.connection(owner, region_id, describe, deadline)

    def _check_still_true(self, found: LookupResult, used: dict[int, OwnerInfo], outcome: Outcome) -> None:
        """After the last copy: the namespace's epoch must not have moved and every source must still be alive."""
        if not outcome.blocks:
            return
        try:
            epoch, gone = self._registry.still(self._digest, list(used))
        except RegistryError as error:
            outcome.blocks, outcome.reason, outcome.detail = 0, MissReason.REGISTRY_UNAVAILABLE, str(error)
            return
        if epoch != found.epoch:
            outcome.blocks, outcome.reason = 0, MissReason.EPOCH_CHANGED
            outcome.detail = "the namespace was told to forget while the fetch ran"
            return
        for owner in (used[number] for number in gone):
            self._transports.forget(owner)
            of_owner = found.records[found.records["owner"] == owner.owner]
            outcome.blocks = min(outcome.blocks, int(of_owner["block"].min()))
            outcome.reason, outcome.detail = MissReason.OWNER_GONE, f"{owner} died during the fetch"

    def close(self) -> None:
        """Stop the helping threads."""
        self._stale.close()
        self._helper.close()


class _SpecMismatchError(TransportError):
    """The owner's region is not what its namespace promises."""


class _UnverifiedError(TransportError):
    """The owner may pass on wrong bytes that it adopted, or what it computed from them."""


def _next_run(records: BlockRecords, first: int, excluded: set[int]) -> BlockRecords | None:
    """Return the records of the longest run from block `first` on that one region of one owner serves."""
    if not first and not excluded and _of_one_region(records):
        return records
    best: BlockRecords | None = None
    here = records[records["block"] == first]
    for candidate in here:
        owner, region = int(candidate["owner"]), int(candidate["region"])
        if owner in excluded:
            continue
        same = records[(records["owner"] == owner) & (records["region"] == region) & (records["block"] >= first)]
        gaps = np.flatnonzero(same["block"] != np.arange(first, first + len(same)))
        run = same[: int(gaps[0])] if len(gaps) else same
        if best is None or len(run) > len(best):
            best = run
    return best


def _of_one_region(records: BlockRecords) -> bool:
    """Tell whether these are blocks 0, 1, 2, ... of one region: the common case, without a copy."""
    if not len(records) or int(records["block"][-1]) != len(records) - 1:
        return False
    same = (records["owner"] == records["owner"][0]) & (records["region"] == records["region"][0])
    return bool((same & (records["block"] == np.arange(len(records)))).all())
