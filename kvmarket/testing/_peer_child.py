"""The other side of `kvmarket.testing.peers`: a warm process that forks on request, and the loop of its children.

It must have one thread and nothing open when it forks, so it only imports.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pickle
import signal
import socket
import sys
import traceback
from types import ModuleType, SimpleNamespace
from typing import Any

import kvmarket
import kvmarket.registry.lmdb
import kvmarket.registry.memory
import kvmarket.testing.region_owner
import kvmarket.testing.samples  # noqa: F401 - warm
from kvmarket.testing._framing import Channel


@functools.cache
def _load_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_peer_{abs(hash(path))}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _resolve(module: str, source: str, name: str) -> Any:
    found = importlib.import_module(module) if module.startswith("kvmarket.") else _load_file(source)
    return functools.reduce(getattr, name.split("."), found)


def _sendable(error: BaseException) -> BaseException:
    """Return the error, with where it happened, or a stand-in for one that does not survive pickling."""
    error.add_note("in the peer:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - made in the line itself
    except Exception:  # noqa: BLE001 - whatever foreign classes do
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _serve(channel: Channel) -> None:
    state = SimpleNamespace()
    while True:
        try:
            module, source, name, args = channel.recv(timeout_s=None)
        except EOFError:
            return
        try:
            answer = (True, _resolve(module, source, name)(state, *args))
        except Exception as error:  # noqa: BLE001 - the caller gets it, whatever it is
            answer = (False, _sendable(error))
        channel.send(answer, timeout_s=30.0)


def main() -> None:
    """Fork a child per message until the other side is gone."""
    control = Channel(socket.socket(fileno=int(sys.argv[1])))
    for path in sys.argv[2:]:
        _load_file(path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped at once
    while True:
        try:
            control.recv(timeout_s=None)
        except EOFError:
            return
        (fd,) = control.take_fds()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            try:
                _serve(Channel(socket.socket(fileno=fd)))
            finally:
                os._exit(0)
        os.close(fd)
        control.send(pid, timeout_s=30.0)


if __name__ == "__main__":
    main()
