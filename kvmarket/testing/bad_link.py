"""A wire to a server that can be cut, or swallow everything, and be mended: a TCP proxy on the loopback address."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

LOOK_S = 0.01
SEND_S = 1.0
READ_BYTES = 1 << 16


class BadLink:
    """Forwards connections to a port of this machine until it is closed.

    Args:
        target: the port.

    Attributes:
        port: where to connect instead.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._listener.settimeout(SEND_S)
        self.port: int = self._listener.getsockname()[1]
        self._others: dict[socket.socket, socket.socket] = {}
        self._how, self._closed = "", False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="bad-link", daemon=True)
        self._thread.start()

    @property
    def is_bad(self) -> bool:
        """Whether it is cut or swallows everything."""
        return bool(self._how)

    def cut(self) -> None:
        """Close all connections, and new ones at once."""
        self._how = "cut"

    def swallow(self) -> None:
        """Accept connections and what is sent, and pass nothing on, until it is mended."""
        self._how = "swallow"

    def mend(self) -> None:
        """End `cut` or `swallow`; what was sent meanwhile arrives now."""
        self._how = ""

    def _run(self) -> None:
        while not self._closed:
            if self._how == "swallow":
                threading.Event().wait(LOOK_S)  # what arrives waits in the kernel
                continue
            if self._how == "cut":
                self._drop_all()
            for key, _ in self._selector.select(LOOK_S):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj in self._others:
                    self._pass_on(key.fileobj)

    def _accept(self) -> None:
        try:
            here, _ = self._listener.accept()
        except OSError:
            return
        if self._how:
            here.close()
            return
        try:
            there = socket.create_connection(("127.0.0.1", self._target), SEND_S)
        except OSError:
            here.close()
            return
        for one, other in ((here, there), (there, here)):
            one.settimeout(SEND_S)
            self._others[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, one: socket.socket) -> None:
        try:
            data = one.recv(READ_BYTES)
            if data:
                self._others[one].sendall(data)
                return
        except OSError:
            pass
        self._drop(one)

    def _drop(self, one: socket.socket) -> None:
        for end in (one, self._others.get(one)):
            if end is not None and end in self._others:
                del self._others[end]
                self._selector.unregister(end)
                end.close()

    def _drop_all(self) -> None:
        for end in list(self._others):
            if end in self._others:
                self._drop(end)

    def close(self) -> None:
        """Close everything. Idempotent."""
        self._closed = True
        self._thread.join(2 * SEND_S)
        self._drop_all()
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self._listener)
        self._selector.close()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
