"""Fetching: choose a source per block, read, verify, and adopt only what is proven."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.digest import can_digest
from kvmarket.errors import PeerGoneError, RegistryError, TransferError, TransportError, TransportUnavailableError
from kvmarket.explain import explain_nothing_found
from kvmarket.helper import Helper
from kvmarket.outcome import Fetched, Outcome, Sources
from kvmarket.overlapped_fetch import OverlappedFetch
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.registry import LookupResult, Registry
from kvmarket.registry.records import RECORD, BlockRecords, have_digest, next_run, run_length
from kvmarket.report import MissReason, TransferReport
from kvmarket.shared_read import SharedRead
from kvmarket.stale import StaleRecords
from kvmarket.transport import Connection, ReadRequest, TransportSelector
from kvmarket.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmarket.config import MarketConfig
    from kvmarket.deadline import Deadline
    from kvmarket.identity import Namespace, OwnerInfo
    from kvmarket.metrics import Metrics
    from kvmarket.region.pages import PagedMemory

_Answer = tuple[LookupResult, MissReason, str]
"""What a look-up found, and why that is not more."""
EXPLAIN_EVERY_S = 5.0
"""How often a registry that is not local is asked why nothing is found: it takes several round trips."""


class Fetcher:
    """Look-ups and reads in one namespace. Thread-safe.

    Attributes:
        verify: see `MarketConfig.verify`.
    """

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
        self.verify = config.verify
        self._helper = Helper()
        self._stale = StaleRecords(registry, self._digest, metrics)
        self._explaining = threading.Lock()
        self._explained: tuple[float, MissReason, str] = (-math.inf, MissReason.NOT_PUBLISHED, "")

    def lookup(self, keys: Sequence[bytes]) -> _Answer:
        """Find the longest run of `keys` that live owners hold, and say why it is not longer.

        Never raises for a bad registry: that is a miss, too.
        """
        return self._counted(self._lookup(keys))

    def _lookup(self, keys: Sequence[bytes]) -> _Answer:
        began = time.perf_counter() if self._metrics.timed else 0.0
        try:
            result = self._registry.lookup(self._digest, keys)
            if began:
                self._metrics.observe("lookup_seconds", time.perf_counter() - began)
            return result, *self._why(result, len(keys))
        except RegistryError as error:
            return _nothing_found(error)

    def _counted(self, answer: _Answer) -> _Answer:
        self._metrics.add(lookups=1)
        if answer[1] is not MissReason.NONE:
            self._metrics.add_reason("misses", answer[1])
        return answer

    def _why(self, result: LookupResult, asked: int) -> tuple[MissReason, str]:
        """Say why a look-up of `asked` blocks did not find more."""
        if result.blocks == asked:
            return MissReason.NONE, ""
        if result.blocks == 0 and result.first_missing == "not_published":
            return self._explain()
        return MissReason(result.first_missing), f"block {result.blocks} is not held by a live owner"

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
        if self.verify == "full" and not (vouched := have_digest(found.records)).all():
            keep, why = keep & vouched, "unverified"
        if keep.all():
            return found
        records = found.records[keep]
        blocks = run_length(records["block"])
        records = records[records["block"] < blocks]
        return replace(found, blocks=blocks, records=records, first_missing=why)

    def fetch(
        self, groups: Iterable[list[bytes]], local: PagedMemory, local_pages: np.ndarray, deadline: Deadline
    ) -> Fetched:
        """Look up and read blocks whose keys come in groups: `lookup` and `read` in one, overlapped where that helps.

        Args:
            groups: the keys, in order; see `PrefixKeys.groups`.
            local: where the blocks go.
            local_pages: (n,) page numbers there, at least one per key.
            deadline: when it passes, what is proven is the hit.
        """
        overlapped = OverlappedFetch(self, groups, local, local_pages, deadline)
        try:
            found, reason, detail = self._look_up_in_parts(overlapped)
        except BaseException:
            overlapped.abandon()
            raise
        outcome = Outcome()
        outcome.stages |= overlapped.stages
        sources = overlapped.finish(found, outcome)
        self._read_rest(found, local, local_pages, deadline, outcome=outcome, sources=sources)
        return Fetched(found, reason, detail, outcome, overlapped.asked)

    def _look_up_in_parts(self, overlapped: OverlappedFetch) -> _Answer:
        lookup = self._registry.looking_up(self._digest)
        if lookup is None:
            keys = overlapped.remaining_keys()
            answer = self.lookup(keys)
            overlapped.note("lookup")
            return answer
        try:
            with lookup:
                overlapped.run(lookup)
                found = lookup.result()
            if self._metrics.timed:
                self._metrics.observe("lookup_seconds", overlapped.stages["lookup"])
            return self._counted((found, *self._why(found, overlapped.asked)))
        except RegistryError as error:
            return self._counted(_nothing_found(error))

    def read(self, found: LookupResult, local: PagedMemory, local_pages: np.ndarray, deadline: Deadline) -> Outcome:
        """Read the blocks `found` names into `local_pages` (one per block) and prove them.

        When it returns nothing writes to the local pages any more. Pages beyond `Outcome.blocks` hold undefined bytes.
        """
        outcome = Outcome()
        self._read_rest(found, local, local_pages, deadline, outcome=outcome, sources=Sources())
        return outcome

    def _read_rest(
        self,
        found: LookupResult,
        local: PagedMemory,
        local_pages: np.ndarray,
        deadline: Deadline,
        *,
        outcome: Outcome,
        sources: Sources,
    ) -> None:
        """Read what of `found` is not in `outcome` yet, then check that all of it is still true."""
        records = found.records
        if self.verify == "full" and outcome.blocks < found.blocks and not (vouched := have_digest(records)).all():
            records = records[vouched]
            outcome.reason, outcome.detail = (
                MissReason.UNVERIFIED,
                "it was announced without a digest (as with KVMARKET_VERIFY=none)",
            )
        while outcome.blocks < found.blocks:
            if deadline.expired:
                outcome.reason, outcome.detail = MissReason.DEADLINE, "the deadline passed"
                break
            run = next_run(records, outcome.blocks, sources.excluded)
            if run is None:
                break  # outcome.reason says why the last source was excluded
            owner = found.owners[int(run["owner"][0])]
            adopted = self._read_run(
                run, owner, local, local_pages, deadline=deadline, outcome=outcome, keys=found.keys
            )
            if adopted:
                sources.used[owner.owner] = owner
            if adopted < len(run):
                sources.excluded.add(owner.owner)
        if outcome.blocks == found.blocks:
            outcome.reason, outcome.detail = MissReason.NONE, ""
        self._check_still_true(found, sources.used, outcome)
        self._metrics.add(blocks_adopted=outcome.blocks, blocks_verified=outcome.blocks_verified)

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
        connection = self.open(run, owner, local, outcome, deadline)
        if connection is None:
            return 0
        targets = local_pages[outcome.blocks : outcome.blocks + len(run)]
        verification = Verification(self.verify, run, local, targets, connection.digest)
        request = ReadRequest(run["page"].copy(), run["generation"].copy(), local, targets)
        reading = SharedRead(connection, request, deadline, verification)
        try:
            report = reading.run(self._helper)
        except TransportError as error:
            self.failed(owner, error, outcome)
            return 0
        outcome.stages["verify"] += verification.seconds / reading.threads
        outcome.stages["read"] += report.seconds - verification.seconds / reading.threads
        outcome.blocks_verified += verification.blocks
        return self.adopt(report, run, keys, owner, outcome)

    def open(
        self, run: BlockRecords, owner: OwnerInfo, local: PagedMemory, outcome: Outcome, deadline: Deadline
    ) -> Connection | None:
        """Return a connection that reads the region of `run` into `local`, or None; `outcome` then says why."""
        began = time.perf_counter()
        try:
            connection = self._connect(owner, int(run["region"][0]), deadline, local)
        except TransportError as error:
            gone = isinstance(error, PeerGoneError)
            outcome.reason = MissReason.OWNER_GONE if gone else MissReason.UNREACHABLE
            if isinstance(error, _SpecMismatchError):
                outcome.reason = MissReason.SPEC_MISMATCH
            elif isinstance(error, _UnverifiedError):
                outcome.reason = MissReason.UNVERIFIED
            outcome.detail = f"{owner}: {error}"
            self._metrics.add_reason("connections_failed", outcome.reason)
            return None
        finally:
            outcome.stages["connect"] += time.perf_counter() - began
        if local.kind not in connection.fills:
            outcome.reason = MissReason.UNREACHABLE
            kinds = " or ".join(sorted(connection.fills))
            outcome.detail = f"{owner}: its blocks are read into {kinds} memory only, not into {local.kind} memory"
            return None
        if self.verify == "full" and not can_digest(local.kind, connection.digest):
            outcome.reason = MissReason.UNVERIFIED
            outcome.detail = f"{owner}: its digests ({connection.digest}) cannot be compared in {local.kind} memory"
            return None
        return connection

    def failed(self, owner: OwnerInfo, error: TransportError, outcome: Outcome) -> None:
        """Note why a read was given up; raise what no read may raise."""
        outcome.detail = f"{owner}: {error}"
        if isinstance(error, TransportUnavailableError):  # the card of these local pages does not reach the owner's
            outcome.reason = MissReason.UNREACHABLE
        elif isinstance(error, (PeerGoneError, TransferError)):
            self._transports.forget(owner)
            outcome.reason = MissReason.OWNER_GONE
            self._metrics.add_reason("connections_failed", outcome.reason)
        else:
            raise error

    def adopt(
        self, report: TransferReport, run: BlockRecords, keys: Sequence[bytes], owner: OwnerInfo, outcome: Outcome
    ) -> int:
        """Add to `outcome` what a read of the blocks of `run` came to; return how many leading ones are good.

        Args:
            report: of the read.
            run: the records that were read, all of one region of `owner`.
            keys: what was looked up, so that records which turned out to be stale can be removed.
            owner: who delivered.
            outcome: of the fetch; its blocks are those before `run`.
        """
        refused = report.refused
        good = min(refused, default=len(run))
        self._metrics.add_read(report.transport, report.path, report.nbytes, report.tier, good)
        if refused:
            outcome.reason = refused[good]
            outcome.detail = f"block {outcome.blocks + good} from {owner}: {outcome.reason}"
            for reason, number in Counter(refused.values()).items():
                self._metrics.add_reason("blocks_refused", reason, number)
            stale = [at for at, reason in refused.items() if reason is MissReason.STALE_GENERATION]
            self._stale.met(keys, run[stale])
        outcome.blocks += good
        outcome.transfers.append(report)
        outcome.sources[str(owner)] = outcome.sources.get(str(owner), 0) + good
        return good

    def _connect(
        self, owner: OwnerInfo, region_id: int, deadline: Deadline | None = None, local: PagedMemory | None = None
    ) -> Connection:
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
            if self.verify == "full" and descriptor.verify != "full":
                raise _UnverifiedError(
                    f"it does not compare every digest of what it adopts (KVMARKET_VERIFY={descriptor.verify} there)",
                    peer=str(owner),
                )
            return descriptor

        return self._transports.connection(owner, region_id, describe, deadline, local)

    def _check_still_true(self, found: LookupResult, used: dict[int, OwnerInfo], outcome: Outcome) -> None:
        """After the last copy: the namespace's epoch must not have moved and every source must still be alive.

        This is what cannot overlap with a copy. An owner that is alive now was alive at every moment before, so its
        memory was its own until the last byte was read; asked any earlier, the answer says nothing of the bytes that
        were read since. And whoever was told to forget, and has returned from that, must not be handed a block by a
        fetch that ends later.
        """
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


def _nothing_found(error: RegistryError) -> _Answer:
    return LookupResult(0, 0, np.empty(0, RECORD)), MissReason.REGISTRY_UNAVAILABLE, str(error)
