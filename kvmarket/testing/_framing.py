"""Pickled messages over a stream socket, every wait bounded.

For test processes that trust each other: pickle executes what the peer sends.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_HEADER = struct.Struct("<Q")
_CHUNK_BYTES = 1 << 20
_FDS_MAX = 8


class Channel:
    """One end of a connected stream socket that carries pickled messages and file descriptors.

    A receive that times out keeps what has arrived; the next one continues there.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket and every received descriptor nobody took. Idempotent."""
        self._sock.close()
        for fd in self.take_fds():
            os.close(fd)

    def take_fds(self) -> list[int]:
        """Return the descriptors received so far; the caller owns them."""
        fds, self._fds = self._fds, []
        return fds

    def send(self, message: Any, *, timeout_s: float, fds: Sequence[int] = ()) -> None:
        """Send one message, and copies of ``fds`` with it.

        Raises:
            TimeoutError: The peer did not take it in time; the channel is unusable then.
            OSError: The peer is gone.
        """
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        frame = memoryview(_HEADER.pack(len(body)) + body)
        self._sock.settimeout(timeout_s)
        if fds:
            frame = frame[socket.send_fds(self._sock, [frame], list(fds)) :]
        self._sock.sendall(frame)

    def recv(self, *, timeout_s: float | None) -> Any:
        """Return the next message, waiting without end if ``timeout_s`` is None.

        Raises:
            TimeoutError: No whole message arrived in time.
            EOFError: The peer closed its end, or died.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := self._pop()) is None:
            remaining = None if end is None else end - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise TimeoutError("no message in time")
            self._sock.settimeout(remaining)
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, _CHUNK_BYTES, _FDS_MAX)
            except ConnectionResetError:
                data, fds = b"", []
            if not data:
                raise EOFError("the peer closed the channel")
            self._buffer += data
            self._fds += fds
        return message[0]

    def _pop(self) -> tuple[Any] | None:
        if len(self._buffer) < _HEADER.size:
            return None
        (length,) = _HEADER.unpack_from(self._buffer)
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[_HEADER.size : end])
        del self._buffer[:end]
        return (pickle.loads(body),)  # noqa: S301 - both ends are ours
