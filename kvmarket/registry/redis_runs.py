"""Reading runs of blocks from the server: whole where they are small, searched by a script where they are crowded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.errors import RegistryProtocolError
from kvmarket.registry.redis_batches import Asked, select
from kvmarket.registry.redis_link import Link, ServerClock
from kvmarket.registry.redis_scripts import namespace_key
from kvmarket.registry.redis_search import LOOKUP

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmarket.registry.redis_wire import Command

STRETCHES_READ = 4
"""A run of at most so many stretches is read whole."""
PLAIN_RUNS_MAX = 64
CROWDED_KNOWN_MAX = 4096
NAMESPACES_KNOWN_MAX = 4096
LIKELY_OWNERS_MAX = 8
"""Owners whose leases a look-up asks for at once; those of others it finds take another round trip, once."""
Answer = tuple[int, Sequence[int], Sequence[bytes], Mapping[bytes, bytes | None]]
"""Epoch; where each segment starts, counted in blocks asked for; the segments; owners (4 bytes) and their leases."""


def read_epoch(reply: bytes | None) -> int:
    """Read what the server holds as a namespace's epoch; 0 for nothing. Raises `RegistryProtocolError`."""
    if reply is not None and not reply.isdigit():
        raise RegistryProtocolError(f"the registry holds {reply!r} where an epoch should be")
    return int(reply or 0)


class RunReader:
    """Finds what may hold the blocks asked for. Thread-safe.

    Args:
        link: to the server.
        clock: seconds.

    Attributes:
        crowded: names of runs that were too large to be read whole.
    """

    def __init__(self, link: Link, clock: Callable[[], float]) -> None:
        self._link, self._server_clock = link, ServerClock(clock)
        self._likely: dict[bytes, tuple[bytes, ...]] = {}
        self.crowded: set[bytes] = set()

    def find(self, digest: bytes, known: int, part: Asked) -> Answer:
        """Look for blocks in one epoch; where the server has another, only that is returned."""
        prefix = namespace_key(digest, b"r", known, b"")
        runs = [prefix + head for head in part.heads]
        plain = len(runs) <= PLAIN_RUNS_MAX and self.crowded.isdisjoint(runs)
        answer = self._read(digest, known, runs, part) if plain else None
        return answer if answer is not None else self._search(digest, known, runs, part)

    def _read(self, digest: bytes, known: int, runs: Sequence[bytes], part: Asked) -> Answer | None:
        """All there is of some runs, by plain commands: the server hardly works. None where one of them is crowded."""
        likely = self._likely.get(digest, ())
        lease = namespace_key(digest, b"l", b"")
        fixed = (b"MGET", namespace_key(digest, b"e"), namespace_key(digest, b"h"))
        commands: list[Command] = [fixed + tuple([lease + b"%d" % int.from_bytes(owner, "big") for owner in likely])]
        commands += [(b"HRANDFIELD", run, STRETCHES_READ + 1, b"WITHVALUES") for run in runs]
        if (now := self._server_clock.now()) is None:
            commands.append((b"TIME",))
        (told, held, *leases), *replies = map(self._link.checked, self._link.send(commands))
        if now is None:
            now = self._server_clock.told(int(replies.pop()[0]))
        epoch, found = read_epoch(told), replies
        if epoch != known or held:
            return epoch, (), (), {}
        crowded = [run for run, fields in zip(runs, found, strict=True) if len(fields) > 2 * STRETCHES_READ]
        if crowded:
            if len(self.crowded) > CROWDED_KNOWN_MAX:
                self.crowded = set()
            self.crowded.update(crowded)
            return None
        places, segments, named = select(part, found, now)
        bodies: dict[bytes, bytes | None] = dict(zip(likely, leases, strict=True))
        if unknown := tuple(named - bodies.keys()):
            names = [lease + b"%d" % int.from_bytes(owner, "big") for owner in unknown]
            bodies |= dict(zip(unknown, self._link.call(b"MGET", *names), strict=True))
            if len(self._likely) >= NAMESPACES_KNOWN_MAX:
                self._likely = {}
            self._likely[digest] = (*unknown, *likely)[:LIKELY_OWNERS_MAX]
        return epoch, places, segments, {owner: bodies[owner] for owner in named}

    def _search(self, digest: bytes, known: int, runs: Sequence[bytes], part: Asked) -> Answer:
        """The same by a script, which sends no more than what is asked for."""
        names = [namespace_key(digest, b"e"), namespace_key(digest, b"h"), *runs]
        leases = namespace_key(digest, b"l", b"")
        reply = self._link.run(LOOKUP, names, [known, leases, part.width, part.table, part.hashes])
        epoch = read_epoch(reply[0])
        if len(reply) == 1:
            return epoch, (), (), {}
        _, places, segments, found = reply
        return epoch, np.frombuffer(places, ">i4").tolist(), segments, dict(zip(found[::2], found[1::2], strict=True))
