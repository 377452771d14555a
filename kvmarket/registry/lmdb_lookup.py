"""A look-up in the embedded registry whose keys come in parts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from kvmarket.registry.base import Lookup, LookupResult
from kvmarket.registry.records import RECORD, BlockRecords

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from kvmarket.identity import OwnerInfo
    from kvmarket.registry.lmdb import LmdbRegistry
    from kvmarket.registry.lmdb_reading import Reading


ANSWERS_MAX = 64
ANSWER_BLOCKS_MAX = 1024
"""Look-ups remembered, and of how many blocks each at most: some 8 MiB."""
_OPAQUE = np.dtype(f"V{RECORD.itemsize}")


class LmdbLookup(Lookup):
    """A look-up in parts, in one transaction."""

    def __init__(self, registry: LmdbRegistry, reading: Reading, digest: bytes) -> None:
        self._registry, self._reading, self._digest = registry, reading, digest
        self._living: dict[int, OwnerInfo] = {}
        self._keys: list[bytes] = []
        self._found: list[BlockRecords] = []
        self._blocks, self._ended = 0, ""

    def __enter__(self) -> Self:
        self._txn = self._reading.__enter__()
        try:
            self.epoch = self._registry.epoch_in(self._txn, self._digest)
            self._cursor = self._txn.cursor(self._registry.table("blocks"))
        except BaseException as error:
            self._reading.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cursor.close()
        self._reading.__exit__(kind, error, trace)

    def more(self, keys: Sequence[bytes]) -> BlockRecords:
        if not self.epoch:
            self._ended = "not_published"
        if self._ended or not keys:
            return np.empty(0, RECORD)
        records, run, self._ended = self._registry.lookup_some(self._txn, self._cursor, self.epoch, keys, self._living)
        records["block"] += self._blocks
        self._found.append(records)
        self._keys += keys
        self._blocks += run
        return records

    @property
    def ended(self) -> bool:
        return bool(self._ended)

    @property
    def owners(self) -> Mapping[int, OwnerInfo]:
        return self._living

    def result(self) -> LookupResult:
        found = self._found
        records = found[0] if len(found) == 1 else np.empty(0, RECORD)
        if len(found) > 1:  # as opaque items, because numpy compares the fields of each part otherwise
            records = np.concatenate([part.view(_OPAQUE) for part in found]).view(RECORD)
        used = set(distinct(records["owner"]))
        living = {owner: info for owner, info in self._living.items() if owner in used}
        return LookupResult(self.epoch, self._blocks, records, self._ended, living, self._keys)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a look-up found.

    Attributes:
        snapshot: the number of the transaction that wrote the file last: as long as it stays, so does the answer, but
            for owners that have died since.
        epoch, keys: what was asked.
        records, run, ended: what was found, see `LmdbRegistry.lookup_some`.
        owners: whose records those are.
    """

    snapshot: int
    epoch: int
    keys: list[bytes]
    records: BlockRecords
    run: int
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
