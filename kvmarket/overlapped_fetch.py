"""Reading the first blocks of a prefix while the later ones are still being hashed and looked up.

A card copies 2 MiB in less time than hashing and looking up a block take together, so that a fetch whose steps follow
each other keeps it waiting for most of the time. Only the common case is overlapped: blocks that one region of one
owner holds, over a connection that streams. Whatever else comes up ends this part; the ordinary way does the rest.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from kvmarket.announced import Announced
from kvmarket.errors import TransportError
from kvmarket.outcome import Answer, Outcome, Sources
from kvmarket.registry.records import next_run
from kvmarket.report import MissReason
from kvmarket.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

    from kvmarket.deadline import Deadline
    from kvmarket.fetch import Fetcher
    from kvmarket.identity import OwnerInfo
    from kvmarket.region.pages import PagedMemory
    from kvmarket.registry import LookupResult
    from kvmarket.registry.base import Lookup
    from kvmarket.registry.records import Part
    from kvmarket.transport import Connection
    from kvmarket.transport.base import Stream

GROUPS_MAX = 1 << 62
"""All groups."""


class OverlappedFetch:
    """The overlapped part of one fetch: `run` inside the look-up, `settle` or `abandon` behind it.

    For one thread at a time.

    Attributes:
        local, local_pages, deadline: as of `Fetcher.fetch`.
        asked: keys that came so far.
        stages: seconds by stage.
        unfinished: the look-up is not over.
        answer: what it came to, then.
        outcome, sources: of the fetch so far, once it is settled.
    """

    answer: Answer

    def __init__(  # noqa: PLR0917 - made in one place
        self,
        fetcher: Fetcher,
        groups: Iterable[list[bytes]],
        local: PagedMemory,
        local_pages: np.ndarray,
        deadline: Deadline,
        lookup: Lookup | None,
    ) -> None:
        self._fetcher, self._groups, self._lookup, self._entered = fetcher, iter(groups), lookup, False
        self.local, self.local_pages, self.deadline = local, local_pages, deadline
        self.outcome, self.sources = Outcome(), Sources()
        self.asked, self.unfinished = 0, True
        self.stages = {"hash": 0.0, "lookup": 0.0}
        self._since = time.perf_counter()
        self._owner: OwnerInfo | None = None
        self._region = -1
        self._connection: Connection | None = None
        self._stream: Stream | None = None
        self._failure: TransportError | None = None
        self._open = True
        self._blocks = 0
        self._verifications: list[tuple[int, Verification]] = []

    @property
    def in_parts(self) -> bool:
        """True where `run` looks up; False: all at once is the only way."""
        return self._lookup is not None

    @property
    def found(self) -> LookupResult:
        """What the look-up found."""
        return self.answer[0]

    def run(self, groups_max: int) -> LookupResult | None:
        """Take groups of keys: look them up, and start reading what was found.

        Returns:
            What was found; None when `groups_max` groups were taken and there may be more, in a look-up that stays
            open: who leaves it for a while calls `flush` first. Errors of the look-up end it.
        """
        lookup = self._lookup
        if lookup is None:
            raise RuntimeError("the look-up is over")
        self._since = time.perf_counter()  # another thread may go on with what one has begun
        if not self._entered:
            lookup.__enter__()
            self._entered = True
        try:
            for _ in range(groups_max):
                keys = next(self._groups, None)
                if keys is None:
                    self.flush()
                    found = lookup.result()
                    break
                self._take(keys)
                part = lookup.more(keys)
                self.note("lookup")
                if self._open and part.blocks:
                    self._open = self._start(part, lookup, may_connect=groups_max == GROUPS_MAX)
                    self._since = time.perf_counter()
            else:
                return None
        except BaseException as error:
            self._end_lookup(error)
            raise
        self._end_lookup()
        return found

    def _end_lookup(self, error: BaseException | None = None) -> None:
        """End the look-up; raises its own error for one that it met."""
        lookup, self._lookup = self._lookup, None
        if lookup is not None and self._entered:
            lookup.__exit__(type(error) if error else None, error, None)

    def _take(self, keys: list[bytes]) -> None:
        self.note("hash")
        self.asked += len(keys)

    def remaining_keys(self) -> list[bytes]:
        """Return all keys that have not come yet."""
        keys: list[bytes] = []
        for group in self._groups:
            self._take(group)
            keys += group
        return keys

    def note(self, stage: str) -> None:
        """Book the time since the last call."""
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self._since
        self._since = now

    def _start(self, part: Part, lookup: Lookup, *, may_connect: bool) -> bool:
        """Start reading the blocks of `part`, which follow those before; False when the ordinary way must go on."""
        if self._stream is None and not self._connect(part, lookup, may_connect=may_connect):
            return False
        if self._owner is None or self._stream is None or self._connection is None:
            return False
        mine = part.announced
        if mine is None or part.source != (self._owner.owner, self._region):
            records = part.records
            mine = Announced.of(records[(records["owner"] == self._owner.owner) & (records["region"] == self._region)])
        verify = self._fetcher.verify
        if len(mine) != part.blocks or (verify == "full" and not mine.vouched):
            return False
        first, self._blocks = self._blocks, self._blocks + part.blocks
        targets = self.local_pages[first : self._blocks]
        verification = Verification(verify, mine, self.local, targets, self._connection.digest)
        self._verifications.append((first, verification))
        try:
            return self._stream.add(verification.request, self.deadline)
        except TransportError as error:
            self._failure = error
            return False

    def flush(self) -> None:
        """Start what was found and has not been started: nothing more is found soon."""
        if self._stream is not None and self._failure is None:
            try:
                self._stream.flush()
            except TransportError as error:
                self._failure = error

    def _connect(self, part: Part, lookup: Lookup, *, may_connect: bool) -> bool:
        number, region = part.source
        if part.announced is None:
            run = next_run(part.records, 0, set())
            if run is None:
                return False
            number, region = int(run["owner"][0]), int(run["region"][0])
        owner = lookup.owners[number]
        if not may_connect and not self._fetcher.is_connected(owner, region, self.local):
            return False
        connection = self._fetcher.open(region, owner, self.local, Outcome(), self.deadline)
        if connection is None or not connection.digests:
            return False
        try:
            self._stream = connection.stream(self.local)
        except TransportError:
            return False
        self._owner, self._region, self._connection = owner, region, connection
        return True

    @property
    def streams(self) -> bool:
        """True while what is found is begun to be read at once."""
        return self._open and self._stream is not None

    @property
    def copied(self) -> bool:
        """True when `settle` would not wait: everything that the look-up, which is over, found has been copied."""
        return self._blocks >= self.found.blocks and (self._stream is None or self._stream.ended)

    def settles_within(self, seconds: float) -> bool:
        """Wait a moment until all is `copied`; tell whether it is."""
        end = time.perf_counter() + seconds
        while not self.copied:
            if self._blocks < self.found.blocks or time.perf_counter() >= end:
                return False
        return True

    @property
    def whole(self) -> bool:
        """True when all that was found has been read and is good; for a settled one."""
        return self.outcome.blocks == self.found.blocks

    def abandon(self) -> None:
        """Wait until nothing writes to the local pages any more, and forget what was read. Idempotent."""
        self._end_lookup()
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(TransportError):
                stream.abandon()

    def settle(self) -> None:
        """Wait for what was started, and add what is good of it to `outcome`. Idempotent."""
        stream, self._stream = self._stream, None
        if stream is None or self._owner is None:
            self.outcome.stages |= self.stages
            return
        outcome, owner, found = self.outcome, self._owner, self.found
        outcome.stages |= self.stages
        began = time.perf_counter()
        try:
            if self._failure is not None:
                stream.abandon()
                raise self._failure
            report = stream.finish()
        except TransportError as error:
            self._fetcher.failed(owner, error, outcome)
            self.sources.excluded.add(owner.owner)
            return
        verify_s = 0.0
        for first, verification in self._verifications:
            report.refused.update({first + index: MissReason.DIGEST_MISMATCH for index in verification.mismatched})
            verify_s += verification.seconds
            outcome.blocks_verified += verification.blocks
        outcome.stages["verify"] += verify_s
        outcome.stages["read"] += time.perf_counter() - began - verify_s
        if found.blocks < self._blocks:  # the registry failed on the way: nothing of it can be checked
            return
        good = self._fetcher.adopt(report, self._blocks, owner, outcome)
        if report.refused:
            records = found.records
            mine = records[(records["owner"] == owner.owner) & (records["region"] == self._region)]
            self._fetcher.met_stale(report, mine, found.keys)
        if good:
            self.sources.used[owner.owner] = owner
        if good < self._blocks:
            self.sources.excluded.add(owner.owner)
