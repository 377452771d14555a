"""An owner's lease as its process sees it: what it has announced, under which number, and what it owes the server.

No I/O and no clock of its own. The process knows its owner by the number it got first, its *handle*; on the server it
has a number per lease. A lease that ran out never comes back: the owner starts over under a new number, announces all
it holds once more, and removes what it had under the old one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from kvmarket.identity import OwnerInfo


@dataclass(frozen=True, slots=True)
class Stretch:
    """Blocks of one run, one after the other: what the server keeps under the key of the first one.

    Attributes:
        keys: the block keys.
        values: their wire records (the owner's number in them is filled in when they are sent).
        renew_at: when to announce them again.
    """

    keys: Sequence[bytes]
    values: Sequence[bytes]
    renew_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be told to the server: new stretches, and the first keys of those that are no more.

    Attributes:
        puts: stretches that are new or replace the one of the same first key.
        drops: first keys.
        removed: blocks that are announced no more.
    """

    puts: list[Stretch]
    drops: list[bytes]
    removed: int = 0


@dataclass
class Space:
    """What one owner announced in one namespace. A change is planned, told to the server, and then taken over.

    Attributes:
        epoch: under which epoch.
        joined: its present lease is known in the namespace.
        stretches: by their first key, the oldest first.
        homes: the stretch of every block.
    """

    epoch: int
    joined: bool = False
    stretches: dict[bytes, Stretch] = field(default_factory=dict)
    homes: dict[bytes, Stretch] = field(default_factory=dict)

    def plan(self, new: Sequence[Stretch], withdrawn: Sequence[bytes] = ()) -> Change:
        """Plan to announce `new` blocks, in place of older records of them, and to withdraw others."""
        told = dict.fromkeys(key for stretch in new for key in stretch.keys)
        gone = dict.fromkeys(key for key in withdrawn if key in self.homes)
        touched = {id(home): home for key in (*told, *gone) if (home := self.homes.get(key)) is not None}
        puts = [part for home in touched.values() for part in _parts(home, told, gone)] + list(new)
        firsts = {stretch.keys[0] for stretch in puts}
        drops = [home.keys[0] for home in touched.values() if home.keys[0] not in firsts]
        return Change(puts, drops, len(gone))

    def took(self, change: Change, renew_at: float) -> None:
        """Take over what the server took."""
        for stretch in change.puts:
            if (old := self.stretches.pop(stretch.keys[0], None)) is not None:
                self._leave(old)
        for first in change.drops:
            self._leave(self.stretches.pop(first))
        for stretch in change.puts:
            kept = replace(stretch, renew_at=renew_at)
            self.stretches[stretch.keys[0]] = kept  # at the end: it is the youngest now
            self.homes.update(dict.fromkeys(stretch.keys, kept))

    def _leave(self, stretch: Stretch) -> None:
        for key in stretch.keys:
            if self.homes.get(key) is stretch:
                del self.homes[key]

    def due(self, now: float, limit: int) -> list[Stretch]:
        """Return stretches to renew now, of some `limit` blocks."""
        found: list[Stretch] = []
        blocks = 0
        for stretch in self.stretches.values():
            if stretch.renew_at > now or blocks >= limit:
                break
            found.append(stretch)
            blocks += len(stretch.keys)
        return found


def _parts(stretch: Stretch, told: Container[bytes], gone: Container[bytes]) -> list[Stretch]:
    """Return what is left of a stretch without some of its blocks."""
    parts: list[Stretch] = []
    begin: int | None = None
    for at, key in enumerate((*stretch.keys, b"")):
        stays = key not in told and key not in gone and at < len(stretch.keys)
        if stays and begin is None:
            begin = at
        elif not stays and begin is not None:
            parts.append(Stretch(stretch.keys[begin:at], stretch.values[begin:at]))
            begin = None
    return parts


@dataclass
class Lease:
    """One owner of this process.

    Attributes:
        info: who it is; `info.owner` is its handle.
        number: its number on the server now.
        body: what its lease says on the server: who it is. Another body there: the number is another's by now.
        lost: the present number must not be used any more: start over.
        old: numbers whose keys this process still has to remove, and the namespaces and epochs they are in.
        regions: region number -> packed descriptor.
        spaces: namespace digest -> what was announced in it.
        lock: held for as long as one change of this owner takes, its I/O included.
    """

    info: OwnerInfo
    number: int
    body: bytes
    lost: bool = False
    released: bool = False
    old: list[int] = field(default_factory=list)
    regions: dict[int, bytes] = field(default_factory=dict)
    spaces: dict[bytes, Space] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def space(self, digest: bytes, epoch: int) -> Space | None:
        """Return the space of a namespace in `epoch`, begun anew for a later one; None when `epoch` is over."""
        space = self.spaces.get(digest)
        if space is None or space.epoch < epoch:
            space = self.spaces[digest] = Space(epoch)
        return space if space.epoch == epoch else None

    def begin(self, number: int) -> None:
        """Start over under a new number; everything must be told to the server again."""
        self.old.append(self.number)
        self.number, self.lost = number, False
        for space in self.spaces.values():
            space.joined = False

    def answered(self, bodies: Sequence[bytes | None]) -> None:
        """Take the answers to one heartbeat: what the lease says, then its copy in every namespace joined."""
        if any(body != self.body for body in bodies):
            self.lost = True

    def joined(self) -> list[bytes]:
        """Name the namespaces that know the present lease."""
        return [digest for digest, space in list(self.spaces.items()) if space.joined]
