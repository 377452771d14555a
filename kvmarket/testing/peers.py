"""Real processes for tests: forked from a warm one in milliseconds, told what to do, stopped or killed at any moment.

    with PeerPool() as pool:
        owner = pool.spawn()
        owner.call(publish_something, tokens)  # publish_something(state, tokens) runs over there
        owner.kill()

A function that runs in a peer must be defined at the top of a file that can be imported there. Its first argument is
the peer's `state`, a namespace that lasts as long as the peer does.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmarket.testing._framing import Channel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

START_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 20.0


class Peer:
    """One process. Not thread-safe.

    Attributes:
        pid: its process id.
    """

    def __init__(self, pid: int, channel: Channel) -> None:
        self.pid = pid
        self._channel = channel
        self._pidfd = os.pidfd_open(pid)

    def call(self, function: Callable[..., Any], *args: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Run ``function(state, *args)`` in the peer and return what it returns, or raise what it raises.

        Raises:
            TimeoutError: no answer in time; `result` may still get it.
            EOFError: the peer died.
        """
        self.start(function, *args)
        return self.result(timeout_s=timeout_s)

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Begin a call; `result` waits for it. Calls run one after the other."""
        source = inspect.getsourcefile(function)
        self._channel.send((function.__module__, source, function.__qualname__, args), timeout_s=CALL_TIMEOUT_S)

    def result(self, *, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Return the result of the oldest call that has not been asked for; errors as for `call`."""
        good, value = self._channel.recv(timeout_s=timeout_s)
        if not good:
            raise value
        return value

    @property
    def running(self) -> bool:
        """False once the process has ended."""
        return self._pidfd >= 0 and not select.select([self._pidfd], [], [], 0)[0]

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """End the process at once, as a crash would, and wait until it is gone. Idempotent.

        Raises:
            TimeoutError: it is still there.
        """
        if self._pidfd < 0:
            return
        self.signal(signal.SIGKILL)
        if not select.select([self._pidfd], [], [], timeout_s)[0]:
            raise TimeoutError(f"process {self.pid} does not end")
        os.close(self._pidfd)
        self._pidfd = -1
        self._channel.close()


class PeerPool:
    """Makes peers by forking a process that has everything imported. Peers die with the pool, or with this process.

    Args:
        preload: Python files to import before the first fork, because functions in them will be called.
    """

    def __init__(self, preload: Sequence[Path | str] = ()) -> None:
        ours, theirs = socket.socketpair()
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
        command = [sys.executable, "-m", "kvmarket.testing._peer_child", str(theirs.fileno()), *map(str, preload)]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
        )
        theirs.close()
        self._channel = Channel(ours)
        self._peers: list[Peer] = []

    @property
    def pid(self) -> int:
        """The process that forks."""
        return self._process.pid

    def spawn(self) -> Peer:
        """Fork one more peer."""
        ours, theirs = socket.socketpair()
        self._channel.send("fork", timeout_s=START_TIMEOUT_S, fds=[theirs.fileno()])
        theirs.close()
        peer = Peer(self._channel.recv(timeout_s=START_TIMEOUT_S), Channel(ours))
        self._peers.append(peer)
        return peer

    def reap(self) -> int:
        """Kill the peers that still run; return how many there were."""
        running = sum(peer.running for peer in self._peers)
        for peer in self._peers:
            peer.kill()
        self._peers.clear()
        return running

    def close(self) -> None:
        """Kill every peer and end the process that makes them. Idempotent."""
        self.reap()
        self._channel.close()
        try:
            self._process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(START_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
