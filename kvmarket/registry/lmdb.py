"""The embedded registry: one LMDB file shared by all processes of a host, without a daemon.

Readers take no lock and make no system call worth naming; writers take turns. Tables:

    meta        counters and the version
    owners      owner (4)              -> who it is
    regions     owner (4) region (2)   -> descriptor
    namespaces  digest                 -> epoch and description
    blocks      epoch (4) block key    -> records, one per owner
    stretches   epoch (4) head (8) owner (4) hash -> the same for whole runs, see `lmdb_stretches`
    runs        owner (4)              -> epoch (4) head (8) of every run the owner has blocks in, for fencing
    retired     epoch (4)              -> epochs whose blocks may be removed

Bumping an epoch gives the namespace a new number, which makes all its blocks unreachable at once; `sweep` removes them
later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmarket.errors import RegistryError, RegistryProtocolError
from kvmarket.identity import visible_to
from kvmarket.metrics import Metrics
from kvmarket.registry.base import LookupResult, NamespaceInfo, Registry, shown
from kvmarket.registry.host import this_process
from kvmarket.registry.lmdb_cursors import (
    count_prefix,
    delete_prefix,
    delete_record,
    forget_runs,
    keys_of_run,
    read_records,
    run_is_used,
)
from kvmarket.registry.lmdb_file import acquire_file, in_halves, release_file
from kvmarket.registry.lmdb_lookup import Answer, Answers, LmdbLookup, distinct
from kvmarket.registry.lmdb_stretches import announce_stretches, withdraw_stretches
from kvmarket.registry.records import (
    HEAD_BYTES,
    OWNER_AT,
    BlockRecords,
    Part,
    cut_to_living,
    encode_records,
    pack,
    pack_owner,
    run_length,
    unpack,
    unpack_owner,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvmarket.identity import OwnerInfo
    from kvmarket.registry.lmdb_reading import Cursor, Transaction

SWEEP_KEYS_MAX = 20_000
"""Keys removed per write transaction of a sweep, so that a sweep never keeps other writers waiting for long."""
SWEEP_BYTES_PER_KEY = 4096
"""No more keys either than one for this many bytes of the file: changing many pages at once takes room."""
OWNERS_CACHED_MAX = 4096
_U32 = 4


def _u32(number: int) -> bytes:
    return number.to_bytes(_U32, "big")


class LmdbRegistry(Registry):
    """The registry file in `directory`, opened for this process."""

    scheme = "lmdb"
    local = True

    def __init__(self, directory: Path, *, map_bytes: int = 1 << 30) -> None:
        self.metrics = Metrics()
        self._file = acquire_file(directory, map_bytes)
        self._sweep_keys = max(1, min(SWEEP_KEYS_MAX, self._file.limit_bytes // SWEEP_BYTES_PER_KEY))
        self._owner_cache: dict[int, OwnerInfo] = {}
        self._epoch_read: tuple[bytes, int] = (b"", 0)
        self._answers = Answers()
        self._closed = False

    # ---- owners

    def register_owner(self, incarnation: bytes) -> OwnerInfo:
        locks, number = self._file.locks, 0
        try:
            with self._file.write() as txn:
                number = self._next(txn, b"owner")
                info = this_process(number, incarnation)
                locks.acquire(number)  # first: nobody may see the record of an owner that seems dead
                txn.put(_u32(number), pack_owner(info), db=self.table("owners"))
        except RegistryError:
            locks.release(number)
            raise
        return info

    def register_region(self, owner: int, region_id: int, descriptor: dict[str, Any]) -> None:
        with self._file.write() as txn:
            key = _u32(owner) + region_id.to_bytes(2, "big")
            txn.put(key, pack("region", descriptor), db=self.table("regions"))

    def release_owner(self, owner: int) -> None:
        try:
            self._fence(owner)
        finally:  # without the lock it is dead to everybody, and the next sweep removes what is left
            self._file.locks.release(owner)

    def region(self, owner: int, region_id: int) -> dict[str, Any] | None:
        with self._file.read() as txn:
            data = txn.get(_u32(owner) + region_id.to_bytes(2, "big"), db=self.table("regions"))
        return unpack("region", data) if data is not None else None

    def alive(self, owner: int) -> bool:
        return self._file.locks.alive(owner)

    def _owner(self, txn: Transaction, owner: int) -> OwnerInfo | None:
        known = self._owner_cache.get(owner)
        if known is not None:
            return known
        data = txn.get(_u32(owner), db=self.table("owners"))
        if data is None:
            return None
        info = unpack_owner(owner, data)
        if len(self._owner_cache) >= OWNERS_CACHED_MAX:
            self._owner_cache.clear()
        self._owner_cache[owner] = info
        return info

    # ---- namespaces

    def open_namespace(self, digest: bytes, description: dict[str, Any]) -> int:
        if epoch := self.epoch(digest):
            return epoch
        with self._file.write() as txn:
            if epoch := self.epoch_in(txn, digest):
                return epoch
            epoch = self._next(txn, b"epoch")
            body = {"epoch": epoch, "description": description}
            txn.put(digest, pack("namespace", body), db=self.table("namespaces"))
            return epoch

    def epoch(self, digest: bytes) -> int:
        with self._file.read() as txn:
            return self.epoch_in(txn, digest)

    def bump_epoch(self, digest: bytes) -> int:
        with self._file.write() as txn:
            data = txn.get(digest, db=self.table("namespaces"))
            if data is None:
                return 0
            body = unpack("namespace", data)
            txn.put(_u32(self.epoch_in(txn, digest)), b"", db=self.table("retired"))
            epoch = self._next(txn, b"epoch")
            fresh = {"epoch": epoch, "description": body.get("description", {})}
            txn.put(digest, pack("namespace", fresh), db=self.table("namespaces"))
            return epoch

    def epoch_in(self, txn: Transaction, digest: bytes) -> int:
        """Return a namespace's epoch as a transaction has it, 0 when it is not known."""
        data = txn.get(digest, db=self.table("namespaces"))
        if data is None:
            return 0
        known = self._epoch_read
        if known[0] != data:  # decoded once, as long as it stays the same
            self._epoch_read = known = (data, int(unpack("namespace", data).get("epoch", 0)))
        return known[1]

    def namespaces(self, limit: int = 64, *, own: bytes = b"", tag: str = "") -> list[NamespaceInfo]:
        found: list[NamespaceInfo] = []
        with self._file.read() as txn:
            holders = self._owners_by_epoch(txn)
            for digest, data in txn.cursor(self.table("namespaces")):
                body = unpack("namespace", data)
                owners = tuple(holders.get(body.get("epoch", 0), ()))
                if owners:
                    found.append(NamespaceInfo(digest, body.get("description", {}), owners))
        return shown(found, limit, own, tag)

    def _owners_by_epoch(self, txn: Transaction) -> dict[int, list[int]]:
        """Live owners of every epoch: one seek per (owner, epoch)."""
        holders: dict[int, list[int]] = {}
        cursor = txn.cursor(self.table("runs"))
        for owner_key, _ in txn.cursor(self.table("owners")):
            owner, epoch = int.from_bytes(owner_key, "big"), 0
            if not self.alive(owner):
                continue
            while cursor.set_range_dup(owner_key, _u32(epoch)):
                epoch = int.from_bytes(cursor.value()[:_U32], "big")
                holders.setdefault(epoch, []).append(owner)
                epoch += 1
        return holders

    # ---- blocks

    def announce(self, digest: bytes, epoch: int, keys: Sequence[bytes], records: BlockRecords) -> bool:
        owners = set(records["owner"].tolist())
        with self._file.write() as txn:
            if self.epoch_in(txn, digest) != epoch:
                return False
            self._file.require_room(txn)
            for owner in owners:
                if txn.get(_u32(owner), db=self.table("owners")) is None:
                    raise RegistryProtocolError(f"owner {owner} is not registered")
            prefix = _u32(epoch)
            blocks, runs = txn.cursor(self.table("blocks")), txn.cursor(self.table("runs"))
            fresh: dict[tuple[bytes, bytes], bool] = {}
            replaced: set[tuple[bytes, bytes]] = set()
            entered: set[bytes] = set()
            for key, value in zip(keys, encode_records(records), strict=True):
                full, owner_key = prefix + key, value[OWNER_AT]
                place = (owner_key, full[: _U32 + HEAD_BYTES])
                if place not in fresh:  # an owner without any block in the run has none to replace
                    fresh[place] = runs.put(*place, dupdata=False)
                if (not fresh[place] or full in entered) and delete_record(blocks, full, owner_key):
                    replaced.add(place)
                blocks.put(full, value)
                entered.add(full)
            announce_stretches(txn.cursor(self.table("stretches")), prefix, keys, records, replaced)
        return True

    def withdraw(self, digest: bytes, owner: int, keys: Sequence[bytes]) -> int:
        return in_halves(lambda part: self._withdraw(digest, owner, part), keys)

    def _withdraw(self, digest: bytes, owner: int, keys: Sequence[bytes]) -> int:
        """Remove the records of one owner in one transaction."""
        with self._file.write() as txn:
            prefix, owner_key = _u32(self.epoch_in(txn, digest)), _u32(owner)
            blocks = txn.cursor(self.table("blocks"))
            removed = sum(delete_record(blocks, prefix + key, owner_key) for key in keys)
            runs = {(owner_key, prefix + key[:HEAD_BYTES]) for key in keys}
            self._forget_runs(txn, blocks, runs)
        return removed

    def _forget_runs(self, txn: Transaction, blocks: Cursor, pairs: set[tuple[bytes, bytes]]) -> None:
        forget_runs(txn.cursor(self.table("runs")), blocks, txn.cursor(self.table("stretches")), pairs)

    def discard(self, digest: bytes, keys: Sequence[bytes], records: BlockRecords) -> int:
        return in_halves(lambda part: self._discard(digest, keys, part), records)

    def _discard(self, digest: bytes, keys: Sequence[bytes], records: BlockRecords) -> int:
        """Remove records as they are, in one transaction."""
        gone: set[tuple[bytes, bytes]] = set()
        removed = 0
        with self._file.write() as txn:
            prefix, blocks = _u32(self.epoch_in(txn, digest)), txn.cursor(self.table("blocks"))
            for block, value in zip(records["block"].tolist(), encode_records(records), strict=True):
                key = prefix + keys[block]
                if blocks.set_key_dup(key, value):
                    blocks.delete()
                    removed += 1
                    gone.add((value[OWNER_AT], key[: _U32 + HEAD_BYTES]))
            self._forget_runs(txn, blocks, gone)
        return removed

    def lookup(self, digest: bytes, keys: Sequence[bytes]) -> LookupResult:
        with self.looking_up(digest) as lookup:
            lookup.more(keys)
            return lookup.result()

    def looking_up(self, digest: bytes) -> LmdbLookup:
        return LmdbLookup(self, self._file.read(), digest)

    def lookup_some(
        self, txn: Transaction, epoch: int, keys: Sequence[bytes], living: dict[int, OwnerInfo]
    ) -> tuple[Part, str]:
        """Look up consecutive keys; for `LmdbLookup`.

        Args:
            txn: the transaction.
            epoch: of the namespace.
            keys: at least one.
            living: owners known to be alive; those that are found to be are added.

        Returns:
            The leading run that living owners hold, and what ended it, as in `LookupResult`.
        """
        snapshot = txn.id()
        known = self._answers.get(snapshot, epoch, keys)
        if known is not None:
            for owner in known.owners:
                if not self._is_living(txn, owner, living):
                    break
            else:
                return known.part, known.ended
        records, run, ended = self._look_up(txn, epoch, keys, living)
        part = Part(records, run)
        self._answers.put(Answer(snapshot, epoch, list(keys), part, ended, distinct(records["owner"])))
        return part, ended

    def _look_up(
        self, txn: Transaction, epoch: int, keys: Sequence[bytes], living: dict[int, OwnerInfo]
    ) -> tuple[BlockRecords, int, str]:
        with txn.cursor(self.table("blocks")) as cursor, txn.cursor(self.table("stretches")) as stretches:
            records, one_each = read_records(cursor, stretches, _u32(epoch), keys)
        dead = [owner for owner in distinct(records["owner"]) if not self._is_living(txn, owner, living)]
        if one_each and not dead:
            return records, len(keys), ""
        return cut_to_living(records, run_length(records["block"]), len(keys), dead)

    def _is_living(self, txn: Transaction, owner: int, living: dict[int, OwnerInfo]) -> bool:
        if owner in living:
            return True
        info = self._owner(txn, owner)
        if info is None or not self.alive(owner):
            return False
        living[owner] = info
        return True

    # ---- upkeep

    def sweep(self) -> int:
        with self._file.read() as txn:
            known = [int.from_bytes(key, "big") for key, _ in txn.cursor(self.table("owners"))]
            retired = [key for key, _ in txn.cursor(self.table("retired"))]
        dead = [owner for owner in known if not self.alive(owner)]
        for owner in dead:
            self._fence(owner)
            self._file.locks.forget(owner)
            self.metrics.add(owners_fenced=1)
        for owner in set(self._file.locks.owners_on_disk()) - set(known):
            if not self.alive(owner):
                self._file.locks.forget(owner)
        self._file.locks.remove_drafts()
        for epoch in retired:
            self._purge_epoch(epoch)
        return len(dead)

    def _fence(self, owner: int) -> None:
        """Remove an owner and its records: the runs table makes that cost its own keys, in bounded transactions."""
        owner_key = _u32(owner)
        done = False
        while not done:
            with self._file.write() as txn:
                txn.delete(owner_key, db=self.table("owners"))
                delete_prefix(txn.cursor(self.table("regions")), owner_key, self._sweep_keys)
                done = self._fence_some(txn, owner_key)
        self._owner_cache.pop(owner, None)

    def _fence_some(self, txn: Transaction, owner_key: bytes) -> bool:
        runs, blocks = txn.cursor(self.table("runs")), txn.cursor(self.table("blocks"))
        stretches = txn.cursor(self.table("stretches"))
        removed = 0
        while runs.set_key(owner_key):
            if removed >= self._sweep_keys:
                return False
            run = runs.value()
            keys = keys_of_run(blocks, run)
            removed += len(keys)
            for key in keys:
                delete_record(blocks, key, owner_key)
            is_empty = not run_is_used(blocks, run)
            withdraw_stretches(stretches, owner_key, run, has_others=False, is_empty=is_empty)
            runs.set_key_dup(owner_key, run)
            runs.delete()
        return True

    def _purge_epoch(self, epoch_key: bytes) -> None:
        removed = limit = self._sweep_keys
        while removed >= limit:
            with self._file.write() as txn:
                removed = delete_prefix(txn.cursor(self.table("stretches")), epoch_key, limit)
                if removed < limit:
                    removed += delete_prefix(txn.cursor(self.table("blocks")), epoch_key, limit - removed)
                if removed < limit:
                    txn.delete(epoch_key, db=self.table("retired"))

    def usage(self, tag: str = "") -> tuple[Path, int, int, int, int, int]:
        """Return path, bytes used, bytes at most, block records, owners, dead owners.

        Records in namespaces of a secret other than that of `tag` are not counted.
        """
        env = self._file.env
        with self._file.read() as txn:
            owners = [int.from_bytes(key, "big") for key, _ in txn.cursor(self.table("owners"))]
            blocks = txn.stat(self.table("blocks"))["entries"] - self._hidden_blocks(txn, tag)
        used = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        dead = sum(not self.alive(owner) for owner in owners)
        return self._file.path, used, self._file.limit_bytes, blocks, len(owners), dead

    def _hidden_blocks(self, txn: Transaction, tag: str) -> int:
        """Count the records of namespaces that who has the secret of `tag` is not shown."""
        hidden = 0
        cursor = txn.cursor(self.table("blocks"))
        for _, data in txn.cursor(self.table("namespaces")):
            body = unpack("namespace", data)
            epoch = _u32(body.get("epoch", 0))
            if not visible_to(tag, body.get("description", {})):
                hidden += count_prefix(cursor, epoch)
        return hidden

    def live_owners(self) -> list[tuple[OwnerInfo, list[int]]]:
        """Return every live owner with the numbers of its regions."""
        found = []
        with self._file.read() as txn:
            regions = [(key[:_U32], int.from_bytes(key[_U32:], "big")) for key, _ in txn.cursor(self.table("regions"))]
            for owner_key, _ in txn.cursor(self.table("owners")):
                info = self._owner(txn, int.from_bytes(owner_key, "big"))
                if info is not None and self.alive(info.owner):
                    found.append((info, [region for key, region in regions if key == owner_key]))
        return found

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            release_file(self._file)

    def table(self, name: str) -> Any:
        """Return a table of the file."""
        return self._file.tables[name]

    def _next(self, txn: Transaction, counter: bytes) -> int:
        number = int.from_bytes(txn.get(counter, db=self.table("meta")) or b"", "big") + 1
        txn.put(counter, _u32(number), db=self.table("meta"))
        return number
