"""Fetching: choose a source per block, read, verify, and adopt only what is proven."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.announced import Announced
from kvmarket.digest import can_digest
from kvmarket.errors import PeerGoneError, RegistryError, TransferError, TransportError, TransportUnavailableError
from kvmarket.explain import Explanations
from kvmarket.helper import Helper
from kvmarket.outcome import Answer, Fetched, Outcome, Sources
from kvmarket.overlapped_fetch import GROUPS_MAX, OverlappedFetch
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.registry import LookupResult, Registry
from kvmarket.registry.records import RECORD, BlockRecords, by_region, have_digest, next_run, run_length
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
        self._digest = namespace.digest
        self._fingerprint, self._page_bytes = namespace.spec.fingerprint, namespace.spec.page_bytes
        self._registry, self._transports, self._metrics = registry, transports, metrics
        self.is_connected = transports.is_connected
        self.verify = config.verify
        self._helper = Helper()
        self._stale = StaleRecords(registry, self._digest, metrics)
        self._why = Explanations(registry, namespace).why

    def lookup(self, keys: Sequence[bytes]) -> Answer:
        """Find the longest run of `keys` that live owners hold, and say why it is not longer.

        Never raises for a bad registry: that is a miss, too.
        """
        return self._counted(self._lookup(keys))

    def _lookup(self, keys: Sequence[bytes]) -> Answer:
        began = time.perf_counter() if self._metrics.timed else 0.0
        try:
            result = self._registry.lookup(self._digest, keys)
            if began:
                self._metrics.observe("lookup_seconds", time.perf_counter() - began)
            return result, *self._why(result, len(keys))
        except RegistryError as error:
            return _nothing_found(error)

    def _counted(self, answer: Answer) -> Answer:
        self._metrics.add(lookups=1)
        if answer[1] is not MissReason.NONE:
            self._metrics.add_reason("misses", answer[1])
        return answer

    def fresh(self, found: LookupResult) -> LookupResult:
        """Drop records that a read would refuse already, as far as that shows without asking the owner.

        Shortens the run, and `first_missing` then says why: ``stale_generation`` or ``unverified``.
        """
        keep, why = np.ones(len(found.records), bool), "stale_generation"
        for owner_id, owner in found.owners.items():
            for region, rows in by_region(found.records, owner_id):
                records = found.records[rows]
                try:
                    connection = self._connect(owner, region)
                    keep[rows] = current = connection.fresh(records["page"], records["generation"])
                    if not current.all():
                        self._stale.met(found.keys, records[~current])
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
        return self.complete(self.begin(groups, local, local_pages, deadline))

    def begin(  # noqa: D417 - those of `fetch`
        self,
        groups: Iterable[list[bytes]],
        local: PagedMemory,
        local_pages: np.ndarray,
        deadline: Deadline,
        groups_max: int = GROUPS_MAX,
    ) -> OverlappedFetch:
        """Begin a `fetch`, without waiting for copies.

        `advance` may follow; `complete` or `OverlappedFetch.abandon` must, soon.

        Args:
            groups, local, local_pages, deadline: see `fetch`.
            groups_max: how many groups to take. Fewer than all: only over a connection that is open.
        """
        begun = OverlappedFetch(self, groups, local, local_pages, deadline, self._registry.looking_up(self._digest))
        self.advance(begun, groups_max)
        return begun

    def complete(self, begun: OverlappedFetch) -> Fetched:
        """Go on with what was begun, read the rest, check all of it: once, on any thread."""
        if begun.unfinished:
            self.advance(begun, GROUPS_MAX)
        begun.settle()
        (found, reason, detail), outcome = begun.answer, begun.outcome
        self._read_rest(found, begun.local, begun.local_pages, begun.deadline, outcome=outcome, sources=begun.sources)
        return Fetched(found, reason, detail, outcome, begun.asked)

    def advance(self, begun: OverlappedFetch, groups_max: int) -> None:
        """Take up to so many more groups of an `unfinished` fetch. Errors end it."""
        try:
            answer = self._look_up_in_parts(begun, groups_max)
        except BaseException:
            begun.abandon()
            raise
        if answer is not None:
            begun.answer, begun.unfinished = answer, False

    def _look_up_in_parts(self, begun: OverlappedFetch, groups_max: int) -> Answer | None:
        """Look up the next groups; return None when there may be more of them."""
        if not begun.in_parts:
            if groups_max < GROUPS_MAX:
                return None
            answer = self.lookup(begun.remaining_keys())
            begun.note("lookup")
            return answer
        try:
            found = begun.run(groups_max)
        except RegistryError as error:
            return self._counted(_nothing_found(error))
        if found is None:
            return None
        if self._metrics.timed:
            self._metrics.observe("lookup_seconds", begun.stages["lookup"])
        return self._counted((found, *self._why(found, begun.asked)))

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
        connection = self.open(int(run["region"][0]), owner, local, outcome, deadline)
        if connection is None:
            return 0
        targets = local_pages[outcome.blocks : outcome.blocks + len(run)]
        announced = Announced.of(run)
        verification = Verification(self.verify, announced, local, targets, connection.digest)
        threads = 1
        try:
            if connection.digests:  # such a read is nothing that threads could share
                report = connection.read(verification.request, deadline=deadline)
                report.refused.update(dict.fromkeys(verification.mismatched, MissReason.DIGEST_MISMATCH))
            else:
                request = ReadRequest(announced.pages, announced.generations, local, targets)
                reading = SharedRead(connection, request, deadline, verification)
                report, threads = reading.run(self._helper), reading.threads
        except TransportError as error:
            self.failed(owner, error, outcome)
            return 0
        outcome.stages["verify"] += verification.seconds / threads
        outcome.stages["read"] += report.seconds - verification.seconds / threads
        outcome.blocks_verified += verification.blocks
        if report.refused:
            self.met_stale(report, run, keys)
        return self.adopt(report, len(run), owner, outcome)

    def open(
        self, region: int, owner: OwnerInfo, local: PagedMemory, outcome: Outcome, deadline: Deadline
    ) -> Connection | None:
        """Return a connection that reads a region of `owner` into `local`, or None; `outcome` then says why."""
        began = time.perf_counter()
        try:
            connection = self._connect(owner, region, deadline, local)
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

    def adopt(self, report: TransferReport, blocks: int, owner: OwnerInfo, outcome: Outcome) -> int:
        """Add to `outcome` what a read came to; return how many leading blocks are good.

        Args:
            report: of the read.
            blocks: how many it was to read, all of one region of `owner`.
            owner: who delivered.
            outcome: of the fetch; its blocks are those before.
        """
        refused = report.refused
        good = min(refused) if refused else blocks
        self._metrics.add_read(report.transport, report.path, report.nbytes, report.tier, good)
        if refused:
            outcome.reason = refused[good]
            outcome.detail = f"block {outcome.blocks + good} from {owner}: {outcome.reason}"
            for reason, number in Counter(refused.values()).items():
                self._metrics.add_reason("blocks_refused", reason, number)
        outcome.blocks += good
        outcome.transfers.append(report)
        name = str(owner)
        outcome.sources[name] = outcome.sources.get(name, 0) + good
        return good

    def met_stale(self, report: TransferReport, run: BlockRecords, keys: Sequence[bytes]) -> None:
        """Have records removed that turned out to be stale: of `run`, as it was read, in a look-up of `keys`."""
        stale = [at for at, reason in report.refused.items() if reason is MissReason.STALE_GENERATION]
        self._stale.met(keys, run[stale])

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


def _nothing_found(error: RegistryError) -> Answer:
    return LookupResult(0, 0, np.empty(0, RECORD)), MissReason.REGISTRY_UNAVAILABLE, str(error)
