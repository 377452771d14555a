"""The wire to a Redis or Valkey server: bounded waiting, a breaker while it is away, its errors as ours."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from hashlib import sha1
from typing import TYPE_CHECKING, Any, NoReturn

from kvmarket.errors import (
    ConfigError,
    MissingExtraError,
    NamespaceDeniedError,
    RegistryError,
    RegistryFullError,
    RegistryUnavailableError,
)
from kvmarket.registry.redis_wire import Command, Node, ServerError, Wire, WireClosedError, tag_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONNECTIONS_MAX = 16
"""Connections of one link; more callers wait for one, within the timeout."""
CLOCK_GOOD_S = 1.0
NODES_KNOWN_MAX = 1024
"""Hash tags whose node of a cluster is remembered."""
RETRY_MIN_S, RETRY_MAX_S = 0.1, 1.0
"""How long after a failure the server is asked again: doubling between these."""


class ServerAwayError(RegistryUnavailableError):
    """The server did not answer a moment ago, so nothing was sent to it."""


class Breaker:
    """Whether the server may be asked. No I/O, no clock of its own; not thread-safe.

    Closed, everybody may ask. One failure opens it: then nobody may but one attempt per pause, and every failed attempt
    doubles the pause. One success closes it.
    """

    def __init__(self) -> None:
        self._retry_at: float | None = None
        self._pause_s = RETRY_MIN_S

    @property
    def is_open(self) -> bool:
        """True while the server counts as away."""
        return self._retry_at is not None

    def admits(self, now: float) -> bool:
        """Tell whether to ask now; admitting an attempt while open starts its pause."""
        if self._retry_at is None:
            return True
        if self._retry_at - RETRY_MAX_S <= now < self._retry_at:  # earlier: the clock was set back
            return False
        self._retry_at = now + self._pause_s
        return True

    def failed(self, now: float) -> None:
        """The server did not answer."""
        self._pause_s = RETRY_MIN_S if self._retry_at is None else min(2 * self._pause_s, RETRY_MAX_S)
        self._retry_at = now + self._pause_s

    def succeeded(self) -> None:
        """The server answered."""
        self._retry_at = None

    def wait_s(self, now: float) -> float:
        """Return seconds until the next attempt."""
        return max(0.0, self._retry_at - now) if self._retry_at is not None else 0.0


class Gate:
    """The breaker of one server, shared by all links to it. Thread-safe.

    Args:
        on_failure: called when the server does not answer.
        may_probe: tells whether the calling thread may ask a server that is away whether it is back.
        clock: seconds.
    """

    def __init__(
        self,
        on_failure: Callable[[], None],
        may_probe: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._breaker, self._lock = Breaker(), threading.Lock()
        self._on_failure, self._may_probe = on_failure, may_probe

    @property
    def is_open(self) -> bool:
        """True while the server counts as away."""
        with self._lock:
            return self._breaker.is_open

    def admits(self) -> bool:
        """Tell whether the calling thread may ask now."""
        with self._lock:
            if self._breaker.is_open and not self._may_probe():
                return False
            return self._breaker.admits(self._clock())

    def failed(self) -> None:
        """The server did not answer."""
        with self._lock:
            self._breaker.failed(self._clock())
        self._on_failure()

    def succeeded(self) -> None:
        """The server answered."""
        if self._breaker.is_open:
            with self._lock:
                self._breaker.succeeded()


class ServerClock:
    """What the server's clock says, in whole seconds, asked anew every `CLOCK_GOOD_S`. Thread-safe."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told: tuple[float, int] = (-math.inf, 0)

    def now(self) -> int | None:
        """Return the time, or None where it must be asked for."""
        at, seconds = self._told
        age = self._clock() - at
        return seconds + int(age) if 0 <= age < CLOCK_GOOD_S else None

    def told(self, seconds: int) -> int:
        """Take what the server said just now; return it."""
        self._told = (self._clock(), seconds)
        return seconds


class Script:
    """A server-side script, known to the server by its digest after the first use."""

    def __init__(self, source: str) -> None:
        self.source = source.encode()
        self.digest = sha1(self.source, usedforsecurity=False).hexdigest().encode()

    def by_digest(self, keys: Sequence[bytes], args: Sequence[bytes | int]) -> Command:
        """The command that runs it if the server knows it."""
        return (b"EVALSHA", self.digest, len(keys), *keys, *args)


@dataclass
class _Client:
    """What is used of the client library, imported once a link is made."""

    errors: Any
    make: Callable[[Node | None], Any]


def _load(url: str, timeout_s: float) -> _Client:
    try:
        import hiredis  # noqa: F401 - what reads and writes, see `redis_wire`
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise MissingExtraError("redis", "redis") from error
    try:
        pool = redis.ConnectionPool.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0), protocol=2
        )

        def make(node: Node | None) -> Any:
            options = dict(pool.connection_kwargs)
            if node is not None:
                options |= {"host": node[0] or options["host"], "port": node[1]}
            return pool.connection_class(**options)

        make(None)  # connects when it is used: this only shows whether it takes the options
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the registry URL has an option that the client refuses: {error}") from error
    return _Client(redis.exceptions, make)


class Link:
    """Connections to one server, or to the nodes of its cluster, with one timeout. Thread-safe.

    Args:
        url: as the client library takes it.
        shown: the same without secrets, for messages.
        timeout_s: the longest wait for one answer, and for a connection.
        gate: shared by all links to the server.
    """

    def __init__(self, url: str, shown: str, timeout_s: float, gate: Gate) -> None:
        self._shown, self._timeout_s, self._gate = shown, timeout_s, gate
        self._lock = threading.Lock()
        self._client = _load(url, timeout_s)
        self._idle: dict[Node | None, list[Wire]] = {}
        self._nodes: dict[bytes, Node] = {}
        self._slots = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._closed = False

    def run(self, script: Script, keys: Sequence[bytes], args: Sequence[bytes | int]) -> Any:
        """Run one script in one round trip, or two when the server does not know it."""
        command = script.by_digest(keys, args)
        (reply,) = self.send([command])
        if isinstance(reply, ServerError) and str(reply).startswith("NOSCRIPT"):
            (reply,) = self.send([(b"EVAL", script.source, *command[2:])])
        return self.checked(reply)

    def call(self, *command: Any) -> Any:
        """Run one command."""
        return self.checked(self.send([command])[0])

    def checked(self, reply: Any) -> Any:
        """Return a reply of `send`, or raise the error that it is."""
        if isinstance(reply, ServerError):
            raise self._translate(str(reply)) from reply
        return reply

    def send(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip, in a cluster one per node; answered errors are returned in their place.

        Where a node of a cluster says that a key has moved, its commands are sent once more, to the node it names.

        Raises:
            RegistryUnavailableError: no answer in time, or the breaker is open.
            NamespaceDeniedError: the server does not take user and password.
        """
        if not self._gate.admits():
            raise ServerAwayError(f"the registry at {self._shown} is away")
        if not self._slots.acquire(timeout=self._timeout_s):
            raise RegistryUnavailableError(f"{CONNECTIONS_MAX} requests to {self._shown} are waiting already")
        try:
            replies = self._by_node(commands) if self._nodes else self._exchange(None, commands)
            if any(isinstance(reply, ServerError) and reply.moved_to for reply in replies):
                replies = self._follow(commands, replies)
            return replies
        finally:
            self._slots.release()

    def _by_node(self, commands: Sequence[Command]) -> list[Any]:
        groups: dict[Node | None, list[int]] = {}
        tag = b""
        for at, command in enumerate(commands):
            tag = tag_of(command) or tag  # what is about no key goes where the one before went
            groups.setdefault(self._nodes.get(tag), []).append(at)
        replies: list[Any] = [None] * len(commands)
        for node, numbers in groups.items():
            answers = self._exchange(node, [commands[at] for at in numbers])
            for at, answer in zip(numbers, answers, strict=True):
                replies[at] = answer
        return replies

    def _follow(self, commands: Sequence[Command], replies: list[Any]) -> list[Any]:
        """Send what has moved to the nodes that were named, once."""
        moved = [
            at for at, reply in enumerate(replies) if isinstance(reply, ServerError) and reply.moved_to is not None
        ]
        with self._lock:
            if len(self._nodes) >= NODES_KNOWN_MAX:
                self._nodes = {}
            for at in moved:
                self._nodes[tag_of(commands[at])] = replies[at].moved_to
        for at, answer in zip(moved, self._by_node([commands[at] for at in moved]), strict=True):
            replies[at] = answer
        return replies

    def _exchange(self, node: Node | None, commands: Sequence[Command]) -> list[Any]:
        errors = self._client.errors
        wire = self._take(node)
        while True:
            try:
                replies = wire.exchange(commands)
                break
            except WireClosedError as error:
                wire.close()
                self._drop_idle()
                if not wire.fresh:  # since it was used last, e.g. because it is a new server
                    wire = self._make(node)
                    continue
                self._away(error)
            except (errors.RedisError, OSError) as error:
                wire.close()
                if isinstance(error, errors.AuthenticationError):
                    raise NamespaceDeniedError(f"the registry at {self._shown} refuses the user: {error}") from error
                self._drop_idle()
                self._away(error)
            except BaseException:
                wire.close()  # an answer may still be on its way: nobody may take it for his
                raise
        self._gate.succeeded()
        with self._lock:
            if not self._closed:
                self._idle.setdefault(node, []).append(wire)
                return replies
        wire.close()
        return replies

    def _away(self, error: Exception) -> NoReturn:
        with self._lock:
            self._nodes = {}  # the node may have handed its keys to another
        self._gate.failed()
        raise RegistryUnavailableError(f"the registry at {self._shown} does not answer: {error}") from error

    def _make(self, node: Node | None) -> Wire:
        return Wire(self._client.make(node))

    def _take(self, node: Node | None) -> Wire:
        with self._lock:
            idle = self._idle.get(node)
            if idle:
                wire = idle.pop()
                wire.fresh = False
                return wire
        return self._make(node)

    def _drop_idle(self) -> None:
        with self._lock:
            dropped, self._idle = self._idle, {}
        for wires in dropped.values():
            for wire in wires:
                wire.close()

    def _translate(self, text: str) -> RegistryError:
        if text.startswith(("NOPERM", "NOAUTH", "WRONGPASS")) or "unauthenticated" in text:
            return NamespaceDeniedError(f"the registry at {self._shown} does not permit it: {text}")
        if "OOM" in text or "maxmemory" in text:
            return RegistryFullError(f"the registry at {self._shown} has no room: {text}")
        return RegistryUnavailableError(f"the registry at {self._shown} answers: {text}")

    def close(self) -> None:
        """Drop all connections. Idempotent."""
        with self._lock:
            self._closed = True
        self._drop_idle()
