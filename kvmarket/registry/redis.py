"""The registry for many hosts: a Redis or Valkey server that holds hints, with leases for owners and a time to live.

Announcing and looking up are one round trip each, decided by a script on the server. The server may stall, restart or
lose everything: look-ups then miss at once, and owners announce again when it is back. The generation at the owner is
what stays true.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.errors import RegistryError, RegistryProtocolError
from kvmarket.metrics import Metrics
from kvmarket.registry.base import LookupResult, NamespaceInfo, Registry, shown
from kvmarket.registry.records import (
    OWNER_AT,
    RECORD,
    RUN_BLOCKS,
    blocks_to_run_end,
    concatenate,
    cut_to_living,
    encode_records,
    pack,
    run_length,
    unpack,
    unpack_owner,
)
from kvmarket.registry.redis_batches import asked, batches, decode
from kvmarket.registry.redis_keeper import Keeper
from kvmarket.registry.redis_link import Gate, Link
from kvmarket.registry.redis_owners import DIGEST_BYTES, Owners
from kvmarket.registry.redis_runs import RunReader, read_epoch
from kvmarket.registry.redis_scripts import BUMP, OPEN, namespace_key, owners_key
from kvmarket.registry.redis_search import ASKED, DISCARD
from kvmarket.server_url import parse_url, without_secrets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.identity import OwnerInfo
    from kvmarket.registry.records import BlockRecords

EPOCH_TRIES = 4
"""How often a look-up asks again because the epoch moved meanwhile."""
OWNERS_CACHED_MAX = 4096
EPOCHS_KNOWN_MAX = 4096


class RedisRegistry(Registry):
    """The registry at `url`, see `kvmarket.server_url`. Connects when it is first asked.

    Raises:
        MissingExtraError: the client library is not installed.
        ConfigError: the URL has an option that the client library does not take.
        ValueError: the URL cannot be used.
    """

    scheme = "redis"
    local = False

    def __init__(self, url: str) -> None:
        self.metrics = Metrics()
        self._clock = time.monotonic
        self.options = parse_url(url)
        self.shown = without_secrets(url)
        self._keeper = Keeper(self._beat, self.options.lease_s / 3)
        self._gate = Gate(self._server_failed, self._keeper.leaves_it_to_caller, self._now)
        self.metrics.gauge("registry_away", lambda: self._gate.is_open)
        self._reads = Link(self.options.url, self.shown, self.options.timeout_s, self._gate)
        self._writes = Link(self.options.url, self.shown, self.options.write_timeout_s, self._gate)
        self._runs = RunReader(self._reads, self._now)
        self._owners = Owners(self._writes, self.options, self._now, metrics=self.metrics)
        self._lock = threading.Lock()
        self._infos: dict[bytes, OwnerInfo] = {}
        self._epochs: dict[bytes, int] = {}
        self._opened: dict[bytes, dict[str, Any]] = {}

    def _server_failed(self) -> None:
        self.metrics.add(server_failures=1)
        self._keeper.wake()

    def _now(self) -> float:
        return self._clock()

    # ---- owners

    def register_owner(self, incarnation: bytes) -> OwnerInfo:
        info = self._owners.register(incarnation)
        self._keeper.start()
        return info

    def register_region(self, owner: int, region_id: int, descriptor: dict[str, Any]) -> None:
        self._owners.register_region(owner, region_id, pack("region", descriptor))

    def release_owner(self, owner: int) -> None:
        self._owners.release(owner)

    def region(self, owner: int, region_id: int) -> dict[str, Any] | None:
        lease = self._owners.find(owner)
        number = lease.number if lease is not None else owner
        data = self._reads.call(b"HGET", owners_key(b"g", number), region_id)
        return unpack("region", data) if data is not None else None

    def alive(self, owner: int) -> bool:
        if self._owners.find(owner) is not None:
            return True
        return bool(self._reads.call(b"EXISTS", owners_key(b"l", owner)))

    def _owner(self, number: int, data: bytes) -> OwnerInfo:
        key = number.to_bytes(4, "big") + data
        info = self._infos.get(key)
        if info is None:
            info = unpack_owner(number, data)
            with self._lock:
                if len(self._infos) >= OWNERS_CACHED_MAX:
                    self._infos.clear()
                self._infos[key] = info
        return info

    # ---- namespaces

    def open_namespace(self, digest: bytes, description: dict[str, Any]) -> int:
        epoch = self._open(digest, description)
        with self._lock:
            self._opened.setdefault(digest, description)
        self._keeper.start()
        return epoch

    def _open(self, digest: bytes, description: dict[str, Any]) -> int:
        """Make a namespace known, in at least the epoch that this process has seen."""
        self._writes.call(b"HSETNX", owners_key(b"d"), digest, pack("namespace", {"description": description}))
        keys = [namespace_key(digest, b"e"), namespace_key(digest, b"h")]
        hold_ms = int(self.options.lease_s * 1000)
        return self._seen(digest, int(self._writes.run(OPEN, keys, [self._epochs.get(digest, 0), hold_ms])))

    def _seen(self, digest: bytes, epoch: int) -> int:
        """Remember the highest epoch seen of a namespace; return `epoch`."""
        with self._lock:
            if epoch > self._epochs.get(digest, 0):
                if len(self._epochs) >= EPOCHS_KNOWN_MAX and digest not in self._epochs:
                    self._epochs = {key: self._epochs[key] for key in self._opened if key in self._epochs}
                self._epochs[digest] = epoch
        return epoch

    def epoch(self, digest: bytes) -> int:
        return self._seen(digest, read_epoch(self._reads.call(b"GET", namespace_key(digest, b"e"))))

    def epoch_hint(self, digest: bytes) -> int:
        return self._epochs.get(digest, 0)

    def still(self, digest: bytes, owners: Sequence[int]) -> tuple[int, list[int]]:
        numbers = [lease.number if (lease := self._owners.find(owner)) else owner for owner in owners]
        commands: list[tuple[Any, ...]] = [(b"GET", namespace_key(digest, b"e"))]
        commands += [(b"EXISTS", namespace_key(digest, b"l", number)) for number in numbers]
        epoch, *alive = map(self._reads.checked, self._reads.send(commands))
        return self._seen(digest, read_epoch(epoch)), [o for o, lives in zip(owners, alive, strict=True) if not lives]

    def bump_epoch(self, digest: bytes) -> int:
        return self._seen(digest, int(self._writes.run(BUMP, [namespace_key(digest, b"e")], [])))

    def namespaces(self, limit: int = 64, *, own: bytes = b"", tag: str = "") -> list[NamespaceInfo]:
        holders = self._holders()
        found: list[NamespaceInfo] = []
        digests = list(holders)
        if not digests:
            return found
        described = self._reads.call(b"HMGET", owners_key(b"d"), *digests)
        for digest, data in zip(digests, described, strict=True):
            body = unpack("namespace", data) if data is not None else {}
            found.append(NamespaceInfo(digest, body.get("description", {}), tuple(sorted(holders[digest]))))
        return shown(found, limit, own, tag)

    def _holders(self) -> dict[bytes, list[int]]:
        """Live owners that have entries in the present epoch, by namespace; two questions a living owner."""
        ask, checked = self._reads.send, self._reads.checked
        numbers = [int(member) for member in self._reads.call(b"SMEMBERS", owners_key(b"s"))]
        if not numbers:
            return {}
        alive = map(checked, ask([(b"EXISTS", owners_key(b"l", number)) for number in numbers]))
        living = [number for number, lives in zip(numbers, alive, strict=True) if lives]
        joined = ask([(b"SMEMBERS", owners_key(b"n", number)) for number in living]) if living else []
        pairs = [(n, pair) for n, found in zip(living, map(checked, joined), strict=True) for pair in found]
        digests = sorted({pair[:DIGEST_BYTES] for _, pair in pairs})
        if not digests:
            return {}
        now = map(checked, ask([(b"GET", namespace_key(digest, b"e")) for digest in digests]))
        epochs = {digest: read_epoch(epoch) for digest, epoch in zip(digests, now, strict=True)}
        current = [
            (n, p[:DIGEST_BYTES])
            for n, p in pairs
            if int.from_bytes(p[DIGEST_BYTES:], "big") == epochs[p[:DIGEST_BYTES]]
        ]
        holders: dict[bytes, list[int]] = {}
        if current:
            held = map(checked, ask([(b"EXISTS", namespace_key(d, b"i", epochs[d], n)) for n, d in current]))
            for (number, digest), has in zip(current, held, strict=True):
                if has:
                    holders.setdefault(digest, []).append(number)
        return holders

    # ---- blocks

    def announce(self, digest: bytes, epoch: int, keys: Sequence[bytes], records: BlockRecords) -> bool:
        if not keys:
            return self.epoch(digest) == epoch
        owners = set(records["owner"].tolist())
        if len(owners) != 1:
            raise RegistryProtocolError("one call announces the blocks of one owner")
        taken = self._owners.announce(digest, epoch, owners.pop(), keys, encode_records(records))
        if taken:
            self._seen(digest, epoch)
        return taken

    def withdraw(self, digest: bytes, owner: int, keys: Sequence[bytes]) -> int:
        if not keys or not (epoch := self._epochs.get(digest) or self.epoch(digest)):
            return 0
        return self._owners.withdraw(digest, epoch, owner, keys)

    def discard(self, digest: bytes, keys: Sequence[bytes], records: BlockRecords) -> int:
        epoch, removed = self._epochs.get(digest, 0), 0
        for record, wire in zip(records, encode_records(records), strict=True):
            block = int(record["block"])
            part = asked(keys[max(0, block - RUN_BLOCKS + blocks_to_run_end(keys[block])) : block + 1])
            where = [namespace_key(digest, b"r", epoch, part.heads[-1])]
            table, hashes = ASKED.pack(*part.runs[-1]), part.hashes[-part.runs[-1][1] * part.width :]
            removed += int(self._writes.run(DISCARD, where, [part.width, table, hashes, wire[OWNER_AT], wire]))
        return removed

    def lookup(self, digest: bytes, keys: Sequence[bytes]) -> LookupResult:
        if not keys:
            epoch = self.epoch(digest)
            return LookupResult(epoch, 0, np.empty(0, RECORD), "" if epoch else "not_published")
        parts: list[BlockRecords] = []
        owners: dict[int, OwnerInfo | None] = {}
        epoch, complete = 0, 0
        for start, end in batches(keys):
            epoch, blocks, records = self._lookup_part(digest, keys[start:end], owners)
            if start:
                records["block"] += start
            parts.append(records)
            complete = start + blocks
            if complete < end:
                break
        return _longest(epoch, keys, complete, parts[0] if len(parts) == 1 else concatenate(parts), owners)

    def _lookup_part(
        self, digest: bytes, keys: Sequence[bytes], owners: dict[int, OwnerInfo | None]
    ) -> tuple[int, int, BlockRecords]:
        """One round trip: the epoch, how many blocks the server has in a row, and their records."""
        part = asked(keys)
        tries = 0
        while True:
            known, tries = self._epochs.get(digest, 0), tries + 1
            epoch, places, segments, bodies = self._runs.find(digest, known, part)
            if epoch <= known or tries == EPOCH_TRIES:  # a lower one: the server lost it, and this process will tell it
                break
            self._seen(digest, epoch)
        for number, body in bodies.items():
            owner = int.from_bytes(number, "big")
            owners[owner] = self._owner(owner, body) if body is not None else None
        records = decode(part, places, segments)
        return epoch, run_length(records["block"]), records

    # ---- upkeep

    def _beat(self) -> float:
        """What the keeper does at every beat; returns seconds until the next attempt where the server is away, or 0."""
        try:
            for digest, description in list(self._opened.items()):
                before = self._epochs.get(digest, 0)
                now = self.epoch(digest)
                if now < before or not now:
                    now = self._open(digest, description)
                self._owners.epoch_moved(digest, now)
            for lease in self._owners.all():
                self._owners.renew(lease)
            if self._keeper.beats % SWEEP_BEATS == 0:
                self._owners.fence_dead()
        except RegistryError:
            return self.options.timeout_s if not self._gate.is_open else PROBE_S
        return 0.0

    def sweep(self) -> int:
        return self._owners.fence_dead()

    def usage(self, tag: str = "") -> tuple[str, int, int, int, int, int]:
        """Return the server, bytes it uses and may use (0: no limit), entries of living owners, owners, dead owners.

        Entries in namespaces of a secret other than that of `tag` are not counted.
        """
        listed = {info.digest for info in self.namespaces(EPOCHS_KNOWN_MAX, tag=tag)}
        lines = self._reads.call(b"INFO", b"memory").decode().split()
        memory = dict(line.split(":", 1) for line in lines if ":" in line)
        numbers = self._reads.call(b"SMEMBERS", owners_key(b"s"))
        living = [info.owner for info, _ in self.live_owners()]
        entries = 0
        for number in living:
            for pair in self._reads.call(b"SMEMBERS", owners_key(b"n", number)):
                epoch = int.from_bytes(pair[DIGEST_BYTES:], "big")
                if pair[:DIGEST_BYTES] in listed:
                    name = namespace_key(pair[:DIGEST_BYTES], b"i", epoch, number)
                    entries += sum(map(int, self._reads.call(b"HVALS", name)))
        used, limit = int(memory.get("used_memory", 0)), int(memory.get("maxmemory", 0))
        return self.shown, used, limit, entries, len(numbers), len(numbers) - len(living)

    def live_owners(self) -> list[tuple[OwnerInfo, list[int]]]:
        """Return every live owner with the numbers of its regions."""
        found = []
        for number in sorted(int(member) for member in self._reads.call(b"SMEMBERS", owners_key(b"s"))):
            data = self._reads.call(b"GET", owners_key(b"l", number))
            if data is not None:
                regions = self._reads.call(b"HKEYS", owners_key(b"g", number))
                found.append((self._owner(number, data), sorted(map(int, regions))))
        return found

    def close(self) -> None:
        self._keeper.stop()
        self._reads.close()
        self._writes.close()


PROBE_S = 0.2
"""How often the keeper asks a server that is away whether it is back."""
SWEEP_BEATS = 10
"""Every so many beats the keeper fences owners of other processes that are gone."""


def _longest(
    epoch: int, keys: Sequence[bytes], complete: int, records: BlockRecords, owners: dict[int, OwnerInfo | None]
) -> LookupResult:
    """Cut what the server has to the longest run that live owners hold."""
    living = {owner: info for owner, info in owners.items() if info is not None}
    dead = [owner for owner, info in owners.items() if info is None]
    records, run, ended = cut_to_living(records, complete, len(keys), dead)
    if len(living) > 1:
        left = set(np.unique(records["owner"]).tolist())
        living = {owner: info for owner, info in living.items() if owner in left}
    return LookupResult(epoch, run, records, ended, living if run else {}, keys)
