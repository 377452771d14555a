"""A look-up in the embedded registry whose keys come in parts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Self

import numpy as np

from kvmarket.registry.base import Lookup, LookupResult
from kvmarket.registry.records import RECORD, Part, concatenate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from kvmarket.identity import OwnerInfo
    from kvmarket.registry.lmdb import LmdbRegistry
    from kvmarket.registry.lmdb_reading import Reading
    from kvmarket.registry.records import BlockRecords


ANSWERS_MAX = 64
ANSWER_BLOCKS_MAX = 1024
"""Look-ups remembered, and of how many blocks each at most: some 12 MiB."""
NOTHING = Part(np.empty(0, RECORD), 0)


class LmdbLookup(Lookup):
    """A look-up in parts, in one transaction."""

    def __init__(self, registry: LmdbRegistry, reading: Reading, digest: bytes) -> None:
        self._registry, self._reading, self._digest = registry, reading, digest
        self._living: dict[int, OwnerInfo] = {}
        self._keys: list[bytes] = []
        self._found: list[Part] = []
        self._blocks, self._ended = 0, ""

    def __enter__(self) -> Self:
        self._txn = self._reading.__enter__()
        try:
            self.epoch = self._registry.epoch_in(self._txn, self._digest)
        except BaseException as error:
            self._reading.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reading.__exit__(kind, error, trace)

    def more(self, keys: Sequence[bytes]) -> Part:
        if not self.epoch:
            self._ended = "not_published"
        if self._ended or not keys:
            return NOTHING
        part, self._ended = self._registry.lookup_some(self._txn, self.epoch, keys, self._living)
        self._found.append(part)
        self._keys += keys
        self._blocks += part.blocks
        return part

    @property
    def ended(self) -> bool:
        return bool(self._ended)

    @property
    def owners(self) -> Mapping[int, OwnerInfo]:
        return self._living

    def result(self) -> LookupResult:
        records = self._records()
        living = self._living
        if len(living) > 1:
            used = set(distinct(records["owner"]))
            living = {owner: info for owner, info in living.items() if owner in used}
        elif not len(records):
            living = {}
        return LookupResult(self.epoch, self._blocks, records, self._ended, living, self._keys)

    def _records(self) -> BlockRecords:
        """Return all records, each with the index of its block in the whole."""
        found = self._found
        if len(found) <= 1:
            return found[0].records if found else NOTHING.records
        records = concatenate([part.records for part in found])
        starts = accumulate((part.blocks for part in found[:-1]), initial=0)
        records["block"] += np.repeat(np.fromiter(starts, np.int64, len(found)), [len(part.records) for part in found])
        return records


@dataclass(frozen=True, slots=True)
class Answer:
    """What a look-up found.

    Attributes:
        snapshot: the number of the transaction that wrote the file last: as long as it stays, so does the answer, but
            for owners that have died since.
        epoch, keys: what was asked.
        part, ended: what was found, see `LmdbRegistry.lookup_some`.
        owners: whose records those are.
    """

    snapshot: int
    epoch: int
    keys: list[bytes]
    part: Part
    ended: str
    owners: list[int]


class Answers:
    """The last look-ups: a prompt is matched and then fetched, and mostly nobody wrote in between. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, Answer] = OrderedDict()

    def get(self, snapshot: int, epoch: int, keys: Sequence[bytes]) -> Answer | None:
        """Return the answer to the same question about the same snapshot, if it is known."""
        answer = self._kept.get(keys[0])
        if answer is None or answer.snapshot != snapshot or answer.epoch != epoch or answer.keys != keys:
            return None
        return answer

    def put(self, answer: Answer) -> None:
        """Remember an answer."""
        if len(answer.keys) > ANSWER_BLOCKS_MAX:
            return
        with self._lock:
            self._kept[answer.keys[0]] = answer
            while len(self._kept) > ANSWERS_MAX:
                self._kept.popitem(last=False)


def distinct(owners: np.ndarray) -> list[int]:
    """Return the different numbers in an array; nearly always it is one."""
    if not len(owners):
        return []
    if bool((owners == owners[0]).all()):
        return [int(owners[0])]
    return [int(owner) for owner in np.unique(owners)]
