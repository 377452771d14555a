"""Stock vLLM replicas as child processes, for tests, examples and benchmarks.

A :class:`ReplicaHost` starts one server process that imports vLLM once and forks a
:class:`Replica` per engine, so that the second and third engine of a test cost a few seconds
instead of an import each. A replica holds one in-process vLLM engine and obeys commands sent
over a socket; every wait has a deadline. What vLLM prints goes to a log file and is shown only
when something fails::

    with ReplicaHost() as host:
        replica = host.start(ReplicaConfig(model=write_model(tmp, TINY_MODEL)))
        (result,) = replica.generate([random_prompt(1600, seed=1)], max_tokens=16)

Importing this module imports neither vLLM nor torch; Linux only.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvmarket.testing._framing import Channel
from kvmarket.testing._vllm_handle import Pending, Replica, ReplicaError, log_tail

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

__all__ = ["Generation", "Pending", "Replica", "ReplicaConfig", "ReplicaError", "ReplicaHost"]

#: Set before vLLM is imported: one process per engine, one thread per process, no network.
_ENVIRON = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
_FORK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """How one vLLM engine is started.

    Attributes:
        model: Directory of the checkpoint.
        connector: vLLM's ``kv_transfer_config`` as a dict; None starts without a connector.
        block_size: Tokens per block. CPU attention takes multiples of 32 only.
        kv_cache_bytes: Size of the KV cache.
        max_model_len: Longest sequence in tokens; None takes the model's.
        max_batched_tokens: Tokens per engine step; a longer prompt is computed in chunks.
        max_sequences: Requests per engine step.
        dtype: Of weights, activations and KV cache. Comparing tokens needs ``float32``.
        environ: Added to the environment before the engine is built.
        prepare: ``module:function`` to call before that, for what must be in place when the engine starts.
        network: Name of a network namespace to move into before that; see `kvmarket.testing.networks`.
        engine_args: Further ``vllm.EngineArgs`` fields; they override the ones above.
    """

    model: str | os.PathLike[str]
    connector: Mapping[str, Any] | None = None
    block_size: int = 32
    kv_cache_bytes: int = 64 << 20
    max_model_len: int | None = None
    max_batched_tokens: int = 4096
    max_sequences: int = 8
    dtype: str = "float32"
    environ: Mapping[str, str] = field(default_factory=dict)
    network: str = ""
    prepare: str = ""
    engine_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generation:
    """The outcome of one prompt.

    Attributes:
        tokens: Generated token ids.
        cached_tokens: Prompt tokens whose KV was not computed, as vLLM counts them at admission:
            a load that failed afterwards still counts.
        external_tokens: Those of them that a connector supplied; None if vLLM does not say.
        ttft_s: Seconds from adding the request to the step that returned its first token.
        total_s: Seconds from adding the request to its last token.
        finish_reason: ``length``, or what else ended the request.
    """

    tokens: tuple[int, ...]
    cached_tokens: int
    external_tokens: int | None
    ttft_s: float
    total_s: float
    finish_reason: str | None


class ReplicaHost:
    """Forks replicas from one process that has vLLM imported. A context manager.

    Leaving it stops every replica, by force if need be.

    Args:
        log_dir: Where logs go; by default a temporary directory that is removed at the end.
        python_path: Further directories to import from, for :meth:`Replica.call`.
        environ: Added to the environment of the server before it imports vLLM.
        preload: Import vLLM once, before the forks; with False every replica does it itself, as on a GPU host, where
            what vLLM imports may start threads or touch the card.

    Attributes:
        scratch: Temporary directory of the host and its replicas.
    """

    def __init__(
        self,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        python_path: Sequence[str | os.PathLike[str]] = (),
        environ: Mapping[str, str] | None = None,
        preload: bool = True,
    ) -> None:
        # Also the replicas' TMPDIR, and removed by the server should this process be killed.
        self._scratch = tempfile.TemporaryDirectory(prefix="kvmarket-replicas-", ignore_cleanup_errors=True)
        self.scratch = Path(self._scratch.name)
        self._log_dir = Path(log_dir or self.scratch)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._replicas: list[Replica] = []
        self._log_path = self._log_dir / "host.log"
        path = os.pathsep.join(os.fspath(entry) for entry in (*python_path, *sys.path) if entry)
        forced = {"PYTHONPATH": path, "TMPDIR": str(self.scratch)}
        ours, theirs = socket.socketpair()
        with self._log_path.open("wb") as log, theirs:
            self._server = subprocess.Popen(  # noqa: S603 - our own module
                [
                    *(sys.executable, "-m", "kvmarket.testing._vllm_child"),
                    *(str(theirs.fileno()), str(self.scratch), *(() if preload else ("no-preload",))),
                ],
                env={**os.environ, **_ENVIRON, **(environ or {}), **forced},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._channel = Channel(ours)
        self._imported_s: float | None = None

    def wait_ready(self, *, timeout_s: float = 120.0) -> float:
        """Wait until vLLM is imported and return the seconds the import took."""
        if self._imported_s is None:
            self._imported_s = float(self._recv(timeout_s))
        return self._imported_s

    def launch(self, config: ReplicaConfig, *, timeout_s: float = 120.0) -> Replica:
        """Fork a replica and return while its engine starts; see :meth:`Replica.wait_ready`.

        Raises:
            ReplicaError: vLLM cannot be imported, or not within ``timeout_s``.
        """
        self.wait_ready(timeout_s=timeout_s)
        log_path = self._log_dir / f"replica-{len(self._replicas)}.log"
        ours, theirs = socket.socketpair()
        with log_path.open("wb") as log, theirs:
            fds = [theirs.fileno(), log.fileno()]
            try:
                self._channel.send(config, timeout_s=_FORK_TIMEOUT_S, fds=fds)
            except OSError as error:
                raise self._error(f"is gone: {error}") from error
        pid = int(self._recv(_FORK_TIMEOUT_S))
        (pidfd,) = self._channel.take_fds()
        replica = Replica(Channel(ours), pid, pidfd, log_path)
        self._replicas.append(replica)
        return replica

    def start(self, config: ReplicaConfig, *, timeout_s: float = 120.0) -> Replica:
        """Fork a replica and wait until its engine is up."""
        replica = self.launch(config, timeout_s=timeout_s)
        replica.wait_ready(timeout_s=timeout_s)
        return replica

    def stop_all(self) -> None:
        """Stop all replicas, by force if need be; others can be started then."""
        for replica in self._replicas:
            if replica.alive:
                replica.kill(signal.SIGCONT)
                with suppress(ReplicaError):
                    replica.stop(timeout_s=5.0)
            replica.close()
        self._replicas.clear()

    def close(self) -> None:
        """Stop all replicas and the server. Idempotent."""
        self.stop_all()
        self._channel.close()
        try:
            self._server.wait(timeout=10.0)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait(timeout=10.0)
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _recv(self, timeout_s: float) -> Any:
        try:
            return self._channel.recv(timeout_s=timeout_s)
        except TimeoutError:
            raise self._error(f"did not answer within {timeout_s:.1f} s") from None
        except EOFError:
            raise self._error("died") from None

    def _error(self, what: str) -> ReplicaError:
        return ReplicaError(f"replica host {what}\n--- {self._log_path}\n{log_tail(self._log_path)}")
