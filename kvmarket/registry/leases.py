"""An owner's lease as its process sees it: what it has announced, under which number, and what it owes the server.

No I/O and no clock of its own. The process knows its owner by the number it got first, its *handle*; on the server it
has a number per lease. A lease that ran out never comes back: the owner starts over under a new number, announces all
it holds once more, and removes what it had under the old one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.identity import OwnerInfo


@dataclass
class Space:
    """What one owner announced in one namespace.

    Attributes:
        epoch: under which epoch.
        joined: its present lease is known in the namespace.
        entries: block key -> the wire record (the owner's number in it is filled in when it is sent) and when to renew
            it; the oldest first.
    """

    epoch: int
    joined: bool = False
    entries: dict[bytes, tuple[bytes, float]] = field(default_factory=dict)

    def announced(self, keys: Sequence[bytes], values: Sequence[bytes], renew_at: float) -> None:
        """Keep what the server took."""
        for key, value in zip(keys, values, strict=True):
            self.entries.pop(key, None)  # to the end: it is the youngest now
            self.entries[key] = (value, renew_at)

    def withdrawn(self, keys: Sequence[bytes]) -> None:
        """Forget entries."""
        for key in keys:
            self.entries.pop(key, None)

    def due(self, now: float, limit: int) -> list[bytes]:
        """Return up to `limit` keys to renew now."""
        found: list[bytes] = []
        for key, (_, renew_at) in self.entries.items():
            if renew_at > now or len(found) == limit:
                break
            found.append(key)
        return found


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
