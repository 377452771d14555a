"""The wire to a Redis or Valkey server: bounded waiting, a breaker while it is away, its errors as ours."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from hashlib import sha1
from typing import TYPE_CHECKING, Any

from kvmarket.errors import (
    ConfigError,
    MissingExtraError,
    NamespaceDeniedError,
    RegistryError,
    RegistryFullError,
    RegistryUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONNECTIONS_MAX = 16
"""Connections of one link; more callers wait for one, within the timeout."""
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
        if now < self._retry_at:
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
    """

    def __init__(self, on_failure: Callable[[], None], may_probe: Callable[[], bool]) -> None:
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
            return self._breaker.admits(time.monotonic())

    def failed(self) -> None:
        """The server did not answer."""
        with self._lock:
            self._breaker.failed(time.monotonic())
        self._on_failure()

    def succeeded(self) -> None:
        """The server answered."""
        if self._breaker.is_open:
            with self._lock:
                self._breaker.succeeded()


class Script:
    """A server-side script, known to the server by its digest after the first use."""

    def __init__(self, source: str) -> None:
        self.source = source.encode()
        self.digest = sha1(self.source, usedforsecurity=False).hexdigest().encode()

    def by_digest(self, keys: Sequence[bytes], args: Sequence[bytes | int]) -> tuple[Any, ...]:
        """The command that runs it if the server knows it."""
        return (b"EVALSHA", self.digest, len(keys), *keys, *args)


@dataclass
class _Client:
    """What is used of the client library, imported once a link is made."""

    pool: Any
    errors: Any
    make: Callable[[], Any]


def _load(url: str, timeout_s: float) -> _Client:
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise MissingExtraError("redis", "redis") from error
    try:
        pool = redis.ConnectionPool.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0), protocol=2
        )
        client = _Client(pool, redis.exceptions, lambda: pool.connection_class(**pool.connection_kwargs))
        client.make()  # connects when it is used: this only shows whether it takes the options
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the registry URL has an option that the client refuses: {error}") from error
    return client


class Link:
    """Connections to one server with one timeout. Thread-safe.

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
        self._idle: list[Any] = []
        self._slots = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._closed = False

    def run(self, script: Script, keys: Sequence[bytes], args: Sequence[bytes | int]) -> Any:
        """Run one script in one round trip, or two when the server does not know it."""
        command = script.by_digest(keys, args)
        (reply,) = self.send([command])
        if isinstance(reply, self._client.errors.NoScriptError):
            (reply,) = self.send([(b"EVAL", script.source, *command[2:])])
        return self.checked(reply)

    def call(self, *command: Any) -> Any:
        """Run one command."""
        return self.checked(self.send([command])[0])

    def checked(self, reply: Any) -> Any:
        """Return a reply of `send`, or raise the error that it is."""
        if isinstance(reply, Exception):
            raise self._translate(reply) from reply
        return reply

    def send(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands in one round trip; errors the server answers with are returned in their place.

        Raises:
            RegistryUnavailableError: no answer in time, or the breaker is open.
            NamespaceDeniedError: the server does not take user and password.
        """
        if not self._gate.admits():
            raise ServerAwayError(f"the registry at {self._shown} is away")
        if not self._slots.acquire(timeout=self._timeout_s):
            raise RegistryUnavailableError(f"{CONNECTIONS_MAX} requests to {self._shown} are waiting already")
        try:
            return self._exchange(commands)
        finally:
            self._slots.release()

    def _exchange(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        errors = self._client.errors
        connection, used = self._take()
        while True:
            try:
                replies = self._round_trip(connection, commands)
                break
            except (errors.RedisError, OSError) as error:
                connection.disconnect()
                stale = (
                    used and isinstance(error, errors.ConnectionError) and not isinstance(error, errors.TimeoutError)
                )
                if stale:  # the server closed it since it was used last, e.g. because it is a new server
                    self._drop_idle()
                    connection, used = self._client.make(), False
                    continue
                if isinstance(error, errors.AuthenticationError):
                    raise NamespaceDeniedError(f"the registry at {self._shown} refuses the user: {error}") from error
                self._drop_idle()
                self._gate.failed()
                raise RegistryUnavailableError(f"the registry at {self._shown} does not answer: {error}") from error
            except BaseException:
                connection.disconnect()  # an answer may still be on its way: nobody may take it for his
                raise
        self._gate.succeeded()
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return replies
        connection.disconnect()
        return replies

    def _round_trip(self, connection: Any, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        connection.connect()  # does nothing when it is
        packed = [chunk for command in commands for chunk in connection.pack_command(*command)]
        connection.send_packed_command(packed, check_health=False)
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(connection.read_response(disable_decoding=True))
            except self._client.errors.ResponseError as error:
                replies.append(error)
        return replies

    def _take(self) -> tuple[Any, bool]:
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        return self._client.make(), False

    def _drop_idle(self) -> None:
        with self._lock:
            dropped, self._idle = self._idle, []
        for connection in dropped:
            connection.disconnect()

    def _translate(self, error: Exception) -> RegistryError:
        text = str(error)
        if isinstance(error, self._client.errors.NoPermissionError) or "unauthenticated" in text:
            return NamespaceDeniedError(f"the registry at {self._shown} does not permit it: {text}")
        if "OOM" in text or "maxmemory" in text:
            return RegistryFullError(f"the registry at {self._shown} has no room: {text}")
        return RegistryUnavailableError(f"the registry at {self._shown} answers: {text}")

    def close(self) -> None:
        """Drop all connections. Idempotent."""
        with self._lock:
            self._closed = True
        self._drop_idle()
