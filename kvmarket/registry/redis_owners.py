"""The owners of this process at the server: announcing under a lease, starting over, fencing who is gone."""

from __future__ import annotations

import contextlib
import secrets
import struct
import threading
import time
from itertools import pairwise
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
from kvmarket.registry.leases import Change, Lease, Space, Stretch
from kvmarket.registry.records import HEAD_BYTES, pack_owner
from kvmarket.registry.redis_batches import CHANGES_PER_CALL_MAX, batches, cuts, encode_stretch
from kvmarket.registry.redis_link import Link, ServerAwayError
from kvmarket.registry.redis_scripts import (
    ADMIT,
    CHANGE,
    JOIN,
    PURGE,
    REGION,
    REGISTER,
    namespace_key,
    owners_key,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvmarket.identity import OwnerInfo
    from kvmarket.server_url import ServerUrl

PURGE_STRETCHES = 500
"""Stretches removed per call, so that fencing never keeps the server from others for long."""
DIGEST_BYTES = 32
_COUNTS = struct.Struct(">HH")
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
            if len(set(keys)) < len(keys):
                known = dict(zip(keys, values, strict=True))
                keys, values = list(known), list(known.values())
            if len(space.homes) + sum(key not in space.homes for key in keys) > self._options.entries_max:
                raise RegistryFullError(f"an owner may announce {self._options.entries_max} blocks in a namespace")
            if lease.lost:
                self.start_over(lease)
            told = 0
            try:
                for start, end in batches(keys, CHANGES_PER_CALL_MAX):
                    self._announce_some(lease, digest, space, keys[start:end], values[start:end])
                    told = end
            except _EpochMovedError:
                return False
            except RegistryError as error:
                sure = isinstance(error, (RegistryFullError, ServerAwayError))  # nothing was sent or taken
                self._take_back(lease, digest, space, keys[:told], sure=sure)
                raise
            return True

    def _announce_some(
        self, lease: Lease, digest: bytes, space: Space, keys: Sequence[bytes], values: Sequence[bytes]
    ) -> None:
        starts, _ = cuts(keys)
        new = [Stretch(keys[a:b], values[a:b]) for a, b in pairwise(starts)]
        change = space.plan(new)
        if not self._tell(lease, digest, space, change):
            self.start_over(lease)
            if not self._tell(lease, digest, space, change):
                raise LeaseExpiredError(f"owner {lease.info.owner} loses its lease faster than it announces")
        space.took(change, self._renew_at())

    def _take_back(self, lease: Lease, digest: bytes, space: Space, keys: Sequence[bytes], *, sure: bool) -> None:
        """End an announcement that failed after `keys`: all or none."""
        change = space.plan([], keys)
        try:
            if keys and sure:
                sure = self._tell(lease, digest, space, change)
        except RegistryError:
            sure = False
        space.took(change, self._renew_at())
        lease.lost = lease.lost or not sure  # nobody knows how much of it the server took

    def _tell(self, lease: Lease, digest: bytes, space: Space, change: Change) -> bool:
        """Tell the server of one change; False when the lease is over."""
        if not space.joined and not self._join(lease, digest, space):
            return False
        self._keep_alive()
        number, size = lease.number.to_bytes(4, "big"), HEAD_BYTES
        gets: dict[bytes, list[bytes | int]] = {}
        loses: dict[bytes, list[bytes]] = {}
        for stretch in change.puts:
            first = stretch.keys[0]
            gets.setdefault(first[:size], []).extend((first[size:], len(stretch.keys), encode_stretch(stretch, number)))
        for first in change.drops:
            loses.setdefault(first[:size], []).append(first[size:])
        heads = list(gets | loses)
        prefix = namespace_key(digest, b"r", space.epoch, b"")
        names = [namespace_key(digest, b"e"), namespace_key(digest, b"l", lease.number)]
        names += [namespace_key(digest, b"i", space.epoch, lease.number), *[prefix + head for head in heads]]
        counts = b"".join([_COUNTS.pack(len(gets.get(head, ())) // 3, len(loses.get(head, ()))) for head in heads])
        sent: list[bytes | int] = [space.epoch, lease.body, int(self._options.ttl_s), number, size, counts]
        for each in (gets, loses):
            for head in heads:
                sent += each.get(head, ())
        outcome = self._link.run(CHANGE, names, sent)
        if outcome == 0:
            raise _EpochMovedError
        return bool(outcome == 1)

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
            if space is None or space.epoch != epoch:
                return 0  # nobody finds what was announced in an earlier one
            removed = 0
            for start, end in batches(keys, CHANGES_PER_CALL_MAX):
                change = space.plan([], keys[start:end])
                removed += change.removed
                if change.removed:
                    self._withdraw_some(lease, digest, space, change)
            return removed

    def _withdraw_some(self, lease: Lease, digest: bytes, space: Space, change: Change) -> None:
        try:
            if not lease.lost:
                lease.lost = not self._tell(lease, digest, space, change)
        except _EpochMovedError:
            pass
        except RegistryError:
            lease.lost = True  # what could not be withdrawn goes with the number
            raise
        finally:
            space.took(change, self._renew_at())

    # ---- the life of a lease

    def _keep_alive(self) -> None:
        """Renew all leases in the middle of long work; whether one is over already shows at the next heartbeat."""
        now = self._clock()
        if 0 <= now - self._kept_alive_at < self._options.lease_s / 3:
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
                if not self._tell_again(lease, digest, space, list(space.stretches.values())):
                    raise LeaseExpiredError("the lease ran out while everything was announced again")
                self._metrics.add(blocks_reannounced=len(space.homes))
        lease.lost = False

    def _tell_again(self, lease: Lease, digest: bytes, space: Space, stretches: Sequence[Stretch]) -> bool:
        for some in _calls(stretches):
            change = Change(some, [])
            if not self._tell(lease, digest, space, change):
                return False
            space.took(change, self._renew_at())
        return True

    def _renew_at(self) -> float:
        return self._clock() + self._options.ttl_s / 2

    def _renew_entries(self, lease: Lease) -> None:
        for digest, space in list(lease.spaces.items()):
            if stretches := space.due(self._clock(), RENEW_ENTRIES_MAX):
                with contextlib.suppress(_EpochMovedError):  # what is left of it goes with `epoch_moved`
                    lease.lost = not self._tell_again(lease, digest, space, stretches)

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
        for _ in range(self._options.entries_max // PURGE_STRETCHES + 2):
            if not self._link.run(PURGE, names, [prefix, owner, PURGE_STRETCHES, HEAD_BYTES]):
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


def _calls(stretches: Sequence[Stretch]) -> Iterator[list[Stretch]]:
    """Cut stretches into calls."""
    some: list[Stretch] = []
    blocks = 0
    for stretch in stretches:
        if some and blocks + len(stretch.keys) > CHANGES_PER_CALL_MAX:
            yield some
            some, blocks = [], 0
        some.append(stretch)
        blocks += len(stretch.keys)
    if some:
        yield some


class _EpochMovedError(RegistryError):
    """The namespace has another epoch by now."""
