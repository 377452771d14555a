"""The owners of this process at the server: announcing under a lease, starting over, fencing who is gone."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from typing import TYPE_CHECKING

from kvmarket.errors import (
    LeaseExpiredError,
    RegistryError,
    RegistryFullError,
    RegistryProtocolError,
    RegistryUnavailableError,
)
from kvmarket.metrics import Metrics
from kvmarket.registry.host import this_process
from kvmarket.registry.leases import Lease, Space
from kvmarket.registry.records import pack_owner
from kvmarket.registry.redis_batches import batch, batches, with_owner
from kvmarket.registry.redis_link import Link, ServerAwayError
from kvmarket.registry.redis_scripts import (
    ADMIT,
    ANNOUNCE,
    JOIN,
    PURGE,
    REGION,
    REGISTER,
    WITHDRAW,
    namespace_key,
    owners_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmarket.identity import OwnerInfo
    from kvmarket.server_url import ServerUrl

PURGE_ENTRIES = 2000
"""Entries removed per call, so that fencing never keeps the server from others for long."""
DIGEST_BYTES = 32
NUMBER_TRIES = 8
RENEW_ENTRIES_MAX = 16_384
"""Entries of one namespace renewed per heartbeat."""


class Owners:
    """Leases of this process. Thread-safe: what changes one owner happens one after the other.

    Args:
        link: to the server.
        options: limits.
        clock: seconds; `pick`: an owner number, 32 bits; both for tests that make their own.
        metrics: where to count.
    """

    def __init__(
        self,
        link: Link,
        options: ServerUrl,
        clock: Callable[[], float] = time.monotonic,
        pick: Callable[[], int] = lambda: secrets.randbits(32),
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._link, self._options, self._clock, self._pick = link, options, clock, pick
        self._lease_ms = int(options.lease_s * 1000)
        self._lock = threading.Lock()
        self._leases: dict[int, Lease] = {}
        self._kept_alive_at = clock()

    def all(self) -> list[Lease]:
        """Return the leases of owners that are not released."""
        with self._lock:
            return list(self._leases.values())

    def find(self, owner: int) -> Lease | None:
        """Return the lease of an owner of this process, by its handle or its present number."""
        with self._lock:
            lease = self._leases.get(owner)
            return lease or next((each for each in self._leases.values() if each.number == owner), None)

    def register(self, incarnation: bytes) -> OwnerInfo:
        """Enter a new owner."""
        number = self._new_number(pack_owner(this_process(0, incarnation)))
        info = this_process(number, incarnation)
        lease = Lease(info, number, pack_owner(info))
        with self._lock:
            self._leases[number] = lease
        return lease.info

    def _new_number(self, body: bytes) -> int:
        """Lease a number that nobody has. They are random: a server that has lost everything cannot count on."""
        for _ in range(NUMBER_TRIES):
            number = self._pick()
            keys = [owners_key(b"s"), owners_key(b"l", number)]
            if self._link.run(REGISTER, keys, [number, self._lease_ms, body]):
                return number
        raise RegistryUnavailableError(f"{NUMBER_TRIES} random owner numbers were all in use")

    def register_region(self, owner: int, region_id: int, descriptor: bytes) -> None:
        """Make a region known, now and after every start over."""
        lease = self._require(owner)
        with lease.lock:
            lease.regions[region_id] = descriptor
            if lease.lost or not self._tell_region(lease, region_id):
                self.start_over(lease)

    def _tell_region(self, lease: Lease, region_id: int) -> bool:
        keys = [owners_key(b"l", lease.number), owners_key(b"g", lease.number)]
        return bool(self._link.run(REGION, keys, [region_id, lease.regions[region_id], lease.body]))

    def _require(self, owner: int) -> Lease:
        lease = self.find(owner)
        if lease is None:
            raise RegistryProtocolError(f"owner {owner} is not registered by this process")
        return lease

    # ---- blocks

    def announce(self, digest: bytes, epoch: int, owner: int, keys: Sequence[bytes], values: Sequence[bytes]) -> bool:
        """Announce wire records under the owner's lease; False when the epoch is another."""
        lease = self._require(owner)
        with lease.lock:
            if lease.released:
                raise RegistryProtocolError(f"owner {owner} is released")
            space = lease.space(digest, epoch)
            if space is None:
                return False
            if lease.lost:
                self.start_over(lease)
            try:
                if not self._tell(lease, digest, space, keys, values):
                    self.start_over(lease)
                    if not self._tell(lease, digest, space, keys, values):
                        raise LeaseExpiredError(f"owner {owner} loses its lease faster than it announces")
            except _EpochMovedError:
                return False
            except (RegistryFullError, ServerAwayError):
                raise  # nothing was sent or taken
            except RegistryError:
                lease.lost = True  # nobody knows how much of it the server took
                raise
            space.announced(keys, values, self._renew_at())
            return True

    def _tell(self, lease: Lease, digest: bytes, space: Space, keys: Sequence[bytes], values: Sequence[bytes]) -> bool:
        """Send entries in batches; False when the lease is over."""
        if not space.joined and not self._join(lease, digest, space):
            return False
        number = lease.number.to_bytes(4, "big")
        index = namespace_key(digest, b"i", space.epoch, lease.number)
        for start, end in batches(keys):
            self._keep_alive()
            part, records = batch(keys[start:end]), [with_owner(value, number) for value in values[start:end]]
            prefix = namespace_key(digest, b"r", space.epoch, b"")
            names = [namespace_key(digest, b"e"), namespace_key(digest, b"l", lease.number), index]
            names += [prefix + head for head in part.heads]
            limits: list[bytes | int] = [space.epoch, self._options.entries_max, int(self._options.ttl_s), number]
            lengths = bytes(map(len, records))
            sent: list[bytes | int] = [
                *limits,
                part.width,
                part.counts,
                part.keys,
                lengths,
                b"".join(records),
                lease.body,
            ]
            outcome = self._link.run(ANNOUNCE, names, sent)
            if outcome == -1:
                return False
            if outcome == 0:
                raise _EpochMovedError
            if outcome != 1:
                raise RegistryFullError(f"an owner may announce {self._options.entries_max} blocks in a namespace")
        return True

    def _join(self, lease: Lease, digest: bytes, space: Space) -> bool:
        """Make the lease known in a namespace, so that one call there can look at both."""
        keys = [owners_key(b"l", lease.number), owners_key(b"n", lease.number)]
        if not self._link.run(JOIN, keys, [digest + space.epoch.to_bytes(8, "big"), lease.body]):
            return False
        name = namespace_key(digest, b"l", lease.number)
        space.joined = bool(self._link.run(ADMIT, [name], [lease.body, self._lease_ms]))
        return space.joined

    def withdraw(self, digest: bytes, epoch: int, owner: int, keys: Sequence[bytes]) -> int:
        """Remove an owner's records of `keys` in an epoch."""
        lease = self.find(owner)
        if lease is None:
            return 0
        with lease.lock:
            space = lease.spaces.get(digest)
            if space is not None:
                space.withdrawn(keys)
            try:
                return sum(self._take_back(lease, digest, epoch, keys[a:b]) for a, b in batches(keys))
            except RegistryError:
                lease.lost = True  # what could not be withdrawn goes with the number
                raise

    def _take_back(self, lease: Lease, digest: bytes, epoch: int, keys: Sequence[bytes]) -> int:
        part, prefix = batch(keys), namespace_key(digest, b"r", epoch, b"")
        names = [namespace_key(digest, b"i", epoch, lease.number), *(prefix + head for head in part.heads)]
        number = lease.number.to_bytes(4, "big")
        return int(self._link.run(WITHDRAW, names, [number, part.width, part.counts, part.keys]))

    # ---- the life of a lease

    def _keep_alive(self) -> None:
        """Renew all leases in the middle of long work; whether one is over already shows at the next heartbeat."""
        now = self._clock()
        if now - self._kept_alive_at < self._options.lease_s / 3:
            return
        self._kept_alive_at = now
        names = [name for lease in self.all() for name in self._lease_names(lease)]
        if names:
            self._link.send([(b"GETEX", name, b"PX", self._lease_ms) for name in names])

    def _lease_names(self, lease: Lease) -> list[bytes]:
        names = [owners_key(b"l", lease.number)]
        return names + [namespace_key(digest, b"l", lease.number) for digest in lease.joined()]

    def renew(self, lease: Lease) -> None:
        """One heartbeat: renew the lease everywhere; if it is over, start over. Renew entries that grow old."""
        with lease.lock:
            if lease.released:
                return
            if not lease.lost:
                renewals = [(b"GETEX", name, b"PX", self._lease_ms) for name in self._lease_names(lease)]
                listed = (b"SADD", owners_key(b"s"), lease.number)  # also where the server has lost just this
                replies = self._link.send([listed, *renewals])[1:]
                lease.answered([self._link.checked(reply) for reply in replies])
                self._metrics.add(lease_renewals=int(not lease.lost))
            if lease.lost:
                self.start_over(lease)
            while lease.old:
                self.fence(lease.old[-1])
                lease.old.pop()
            self._renew_entries(lease)

    def start_over(self, lease: Lease) -> None:
        """Take a new number and announce under it all this owner holds.

        Raises:
            RegistryError: not all of it is announced; the next heartbeat tries again, under yet another number.
        """
        lease.begin(self._new_number(lease.body))
        self._metrics.add(leases_expired=1)
        lease.lost = True
        for region_id in lease.regions:
            self._tell_region(lease, region_id)
        for digest, space in list(lease.spaces.items()):
            with contextlib.suppress(_EpochMovedError):  # who announces next is told, and forgets what it published
                if not self._tell_again(lease, digest, space, list(space.entries)):
                    raise LeaseExpiredError("the lease ran out while everything was announced again")
                self._metrics.add(blocks_reannounced=len(space.entries))
        lease.lost = False

    def _tell_again(self, lease: Lease, digest: bytes, space: Space, keys: Sequence[bytes]) -> bool:
        values = [space.entries[key][0] for key in keys]
        told = self._tell(lease, digest, space, keys, values)
        if told:
            space.announced(keys, values, self._renew_at())
        return told

    def _renew_at(self) -> float:
        return self._clock() + self._options.ttl_s / 2

    def _renew_entries(self, lease: Lease) -> None:
        for digest, space in list(lease.spaces.items()):
            if keys := space.due(self._clock(), RENEW_ENTRIES_MAX):
                with contextlib.suppress(_EpochMovedError):  # what is left of it goes with `epoch_moved`
                    lease.lost = not self._tell_again(lease, digest, space, keys)

    def epoch_moved(self, digest: bytes, epoch: int) -> None:
        """Drop what was announced before a new epoch: nobody finds it, and the server has the room back."""
        for lease in self.all():
            with lease.lock:
                space = lease.spaces.get(digest)
                if space is not None and space.epoch < epoch:
                    self._purge(digest, space.epoch, lease.number, lease_too=False)
                    if lease.spaces.get(digest) is space:
                        del lease.spaces[digest]

    def release(self, owner: int) -> None:
        """Forget an owner of this process; without the server its lease just runs out."""
        lease = self.find(owner)
        if lease is None:
            return
        with self._lock:
            self._leases.pop(lease.info.owner, None)
        with lease.lock:
            lease.released = True
            for number in (lease.number, *lease.old):
                self.fence(number)

    def fence(self, number: int) -> bool:
        """Remove an owner and its entries, at the cost of these; tell whether this call ended it."""
        self._link.call(b"DEL", owners_key(b"l", number))
        for pair in self._link.call(b"SMEMBERS", owners_key(b"n", number)):
            epoch = int.from_bytes(pair[DIGEST_BYTES:], "big")
            self._purge(pair[:DIGEST_BYTES], epoch, number, lease_too=True)
        self._link.call(b"DEL", owners_key(b"g", number), owners_key(b"n", number))
        return bool(self._link.call(b"SREM", owners_key(b"s"), number))

    def _purge(self, digest: bytes, epoch: int, number: int, *, lease_too: bool) -> None:
        names = [namespace_key(digest, b"i", epoch, number)]
        if lease_too:
            names.append(namespace_key(digest, b"l", number))
        prefix, owner = namespace_key(digest, b"r", epoch, b""), number.to_bytes(4, "big")
        for _ in range(self._options.entries_max // PURGE_ENTRIES + 2):
            if not self._link.run(PURGE, names, [prefix, owner, PURGE_ENTRIES]):
                return
            self._keep_alive()

    def fence_dead(self) -> int:
        """Fence every owner, of any process, whose lease ran out; return how many."""
        numbers = [int(member) for member in self._link.call(b"SMEMBERS", owners_key(b"s"))]
        if not numbers:
            return 0
        alive = self._link.send([(b"EXISTS", owners_key(b"l", number)) for number in numbers])
        dead = [n for n, reply in zip(numbers, alive, strict=True) if not self._link.checked(reply)]
        fenced = sum(self.fence(number) for number in dead)
        self._metrics.add(owners_fenced=fenced)
        return fenced


class _EpochMovedError(RegistryError):
    """The namespace has another epoch by now."""
