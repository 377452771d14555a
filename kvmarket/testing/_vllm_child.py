"""The processes behind :mod:`kvmarket.testing.vllm_replica`: the fork server and the replicas.

The server imports vLLM, then forks one replica for each configuration it receives. It stays
single-threaded, so that a fork copies no lock in a locked state. A replica dies with the server,
the server ends when the process that started it closes its socket or dies.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

from kvmarket.testing._framing import Channel
from kvmarket.testing._vllm_engine import EngineDriver
from kvmarket.testing.networks import enter_network

if TYPE_CHECKING:
    from kvmarket.testing.vllm_replica import ReplicaConfig

_PR_SET_PDEATHSIG = 1
_REPLY_TIMEOUT_S = 30.0
_EXIT_TIMEOUT_S = 5.0
_REAP_INTERVAL_S = 0.2
_POLL_INTERVAL_S = 0.01

#: What an engine of a Llama-type model imports while it starts, to be imported before the first
#: fork instead. One that another vLLM version lacks is skipped.
_PRELOAD = (
    "vllm.v1.engine.llm_engine",
    "vllm.engine.arg_utils",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.models.llama",
    "vllm.v1.metrics.loggers",
    "vllm.v1.metrics.reader",
)


def main(fd: int, scratch: str, *, preload: bool) -> None:
    """Serve fork requests on socket ``fd`` until its other end is closed, then remove ``scratch``.

    With ``preload`` vLLM is imported before the first fork.

    Raises:
        ImportError: vLLM is not installed, or broken.
        RuntimeError: Importing vLLM started a thread, so that a fork would not be safe.
    """
    channel = Channel(socket.socket(fileno=fd))
    began = time.monotonic()
    if preload:
        _import_vllm()
    channel.send(time.monotonic() - began, timeout_s=_REPLY_TIMEOUT_S)
    while True:
        ready, _, _ = select.select([channel], [], [], _REAP_INTERVAL_S)
        _reap()
        if not ready:
            continue
        try:
            config = channel.recv(timeout_s=_REPLY_TIMEOUT_S)
        except EOFError:
            break
        _fork(channel, config)
    # The replicas see the end of their sockets, too: let them shut down before they are killed.
    end = time.monotonic() + _EXIT_TIMEOUT_S
    while _reap() and time.monotonic() < end:
        time.sleep(_POLL_INTERVAL_S)
    shutil.rmtree(scratch, ignore_errors=True)


def _import_vllm() -> None:
    importlib.import_module("vllm")
    for name in _PRELOAD:
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    _register_model()
    if threading.active_count() != 1:
        raise RuntimeError(f"importing vLLM started threads: {threading.enumerate()}")


def _fork(channel: Channel, config: ReplicaConfig) -> None:
    sock_fd, log_fd = channel.take_fds()
    pid = os.fork()
    if pid == 0:
        channel.close()
        _replica(config, sock_fd, log_fd)
    os.close(sock_fd)
    os.close(log_fd)
    # Opened here, where an early death leaves a zombie behind: elsewhere the number may be stale.
    pidfd = os.pidfd_open(pid)
    channel.send(pid, timeout_s=_REPLY_TIMEOUT_S, fds=[pidfd])
    os.close(pidfd)


def _register_model() -> None:
    """Tell vLLM its own Llama class again, as a class instead of a name.

    Asked about a name, it imports itself in yet another process the first time on a machine.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.llama import LlamaForCausalLM

    ModelRegistry.register_model("LlamaForCausalLM", LlamaForCausalLM)


def _reap() -> bool:
    """Collect dead replicas; return whether live ones are left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _replica(config: ReplicaConfig, sock_fd: int, log_fd: int) -> None:
    """Be a replica; never returns."""
    began = time.monotonic()
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.close(log_fd)
        _serve(config, Channel(socket.socket(fileno=sock_fd)), began)
        code = 0
    except BaseException:  # noqa: BLE001 - the last frame of this process: nothing may pass it
        traceback.print_exc()
    finally:
        # Not sys.exit: the exit handlers of the server are not this process's.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(config: ReplicaConfig, channel: Channel, began: float) -> None:
    os.environ.update(config.environ)
    try:
        if config.network:
            enter_network(config.network)
        if config.prepare:
            module, _, name = config.prepare.partition(":")
            getattr(importlib.import_module(module), name)()
        driver = EngineDriver(config)
    except Exception:
        channel.send((0, False, traceback.format_exc()), timeout_s=_REPLY_TIMEOUT_S)
        raise
    channel.send((0, True, time.monotonic() - began), timeout_s=_REPLY_TIMEOUT_S)
    while True:
        try:
            call_id, op, arguments = channel.recv(timeout_s=None)
        except EOFError:
            driver.stop()
            return
        try:
            reply = (call_id, True, getattr(driver, op)(**arguments))
        except Exception:  # noqa: BLE001 - whatever the engine or a hook raises is the caller's to judge
            reply = (call_id, False, traceback.format_exc())
        channel.send(reply, timeout_s=_REPLY_TIMEOUT_S)
        if op == "stop":
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], preload="no-preload" not in sys.argv[3:])
