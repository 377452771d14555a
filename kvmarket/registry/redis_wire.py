"""Commands and answers over one connection to the server.

The client library connects, encrypts and says who asks; what follows is packed and parsed by hiredis, without the
library's own layers in between: they cost more than the server needs for the answer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

READ_BYTES = 1 << 16
_MOVED = re.compile(r"MOVED \d+ (.*):(\d+)$")
_TAG = re.compile(rb"\{(.+?)\}")

Command = tuple[Any, ...]
Node = tuple[str, int]


class ServerError(Exception):
    """An error that the server answered."""

    @property
    def moved_to(self) -> Node | None:
        """The node of a cluster that serves the key: its host (empty: the one that was asked) and port."""
        found = _MOVED.match(str(self))
        return (found[1], int(found[2])) if found else None


class WireClosedError(Exception):
    """The server closed the connection."""


class WireGarbledError(OSError):
    """What arrived is no answer of such a server."""


class Wire:
    """One connection of the client library, used directly. Not thread-safe."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._socket: Any = None
        self._reader: Any = None
        self.fresh = True
        """Not used before its present use."""

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands and return their answers; errors the server answers are returned in their place.

        Raises:
            WireClosedError: the server closed the connection.
            OSError: the answer did not come in time, or another trouble.
        """
        import hiredis

        if self._socket is None:
            self._connection.connect()
            self._socket = self._connection._sock  # noqa: SLF001 - the library has no public name for it
            self._reader = hiredis.Reader(protocolError=WireGarbledError, replyError=ServerError)
        try:
            self._socket.sendall(b"".join([hiredis.pack_command(command) for command in commands]))
            return [self._answer() for _ in commands]
        except (BrokenPipeError, ConnectionResetError) as error:
            raise WireClosedError(str(error)) from error

    def _answer(self) -> Any:
        while (answer := self._reader.gets()) is False:
            data = self._socket.recv(READ_BYTES)
            if not data:
                raise WireClosedError("the server closed the connection")
            self._reader.feed(data)
        return answer

    def close(self) -> None:
        """Close it. Idempotent; it connects anew when it is used again."""
        self._socket = self._reader = None
        self._connection.disconnect()


def tag_of(command: Command) -> bytes:
    """Return the hash tag of the key a command is about; empty where it names none."""
    at = 3 if command[0] in (b"EVALSHA", b"EVAL") else 1
    found = _TAG.search(command[at]) if len(command) > at and isinstance(command[at], bytes) else None
    return found[1] if found else b""
