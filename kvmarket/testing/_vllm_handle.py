"""The handle of one replica: commands, deadlines, signals."""

from __future__ import annotations

import functools
import itertools
import os
import select
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kvmarket.testing._framing import Channel
    from kvmarket.testing.vllm_replica import Generation

_LOG_TAIL_LINES = 40


class ReplicaError(RuntimeError):
    """A replica failed, died, or missed a deadline; the message ends with its log's tail."""


class Replica:
    """One vLLM engine in a child process. Made by :class:`ReplicaHost`."""

    def __init__(self, channel: Channel, pid: int, pidfd: int, log_path: Path) -> None:
        self.pid = pid
        self.log_path = log_path
        self._channel = channel
        # Signals go to the descriptor: unlike the number it never names another process.
        self._pidfd = pidfd
        self._closed = False
        self._ids = itertools.count(1)
        self._replies: dict[int, tuple[bool, Any]] = {}
        self._ready = Pending(functools.partial(self._await, 0, "start"))

    def wait_ready(self, *, timeout_s: float = 60.0) -> float:
        """Wait until the engine is up and return the seconds it took from the fork."""
        return float(self._ready.result(timeout_s=timeout_s))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 16,
        timeout_s: float = 60.0,
        **options: Any,
    ) -> list[Generation]:
        """Decode greedily after each prompt. See :meth:`begin_generate` for the options.

        Raises:
            ReplicaError: The engine failed, died, or missed the deadline.
        """
        pending = self.begin_generate(prompts, max_tokens=max_tokens, timeout_s=timeout_s, **options)
        result: list[Generation] = pending.result(timeout_s=timeout_s + 1.0)
        return result

    def begin_generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 16,
        timeout_s: float = 60.0,
        together: bool = False,
        cache_salt: str | None = None,
    ) -> Pending:
        """Start a generation and return at once.

        Args:
            prompts: Token ids of each prompt.
            max_tokens: Tokens to generate per prompt.
            timeout_s: After this the replica aborts the requests and reports a failure.
            together: Add all prompts before the first step instead of one after the other.
            cache_salt: Isolates the prompts' blocks from those with another salt.
        """
        token_lists = [list(prompt) for prompt in prompts]
        return self._begin(
            "generate",
            prompts=token_lists,
            max_tokens=max_tokens,
            timeout_s=timeout_s,
            together=together,
            cache_salt=cache_salt,
        )

    def counters(self, *, timeout_s: float = 10.0) -> dict[str, float]:
        """Return the replica's Prometheus counters and gauges by name, summed over their labels.

        What has labels besides model and engine also appears as ``name{label=value,...}``.
        """
        result: dict[str, float] = self._begin("counters").result(timeout_s=timeout_s)
        return result

    def reset_prefix_cache(self, *, connector: bool = False, timeout_s: float = 10.0) -> bool:
        """Forget all cached blocks, with ``connector`` also the connector's; False if refused."""
        return bool(self._begin("reset_prefix_cache", connector=connector).result(timeout_s=timeout_s))

    def call(self, target: str, *args: Any, timeout_s: float = 30.0, **kwargs: Any) -> Any:
        """Run ``module:function`` in the replica, with the ``LLMEngine`` before ``args``.

        For fault injection and inspection; arguments and result are pickled.
        """
        return self.begin_call(target, *args, **kwargs).result(timeout_s=timeout_s)

    def begin_call(self, target: str, *args: Any, **kwargs: Any) -> Pending:
        """Start :meth:`call` and return at once."""
        return self._begin("call", target=target, args=args, kwargs=kwargs)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal. A replica that is gone already is not an error."""
        if not self._closed:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signum)

    @property
    def alive(self) -> bool:
        """Whether the process exists; a stopped one does."""
        return not self._closed and not select.select([self._pidfd], [], [], 0)[0]

    def wait_exit(self, *, timeout_s: float = 10.0) -> None:
        """Wait until the process is gone.

        Raises:
            ReplicaError: It still exists after ``timeout_s``.
        """
        if not select.select([self._pidfd], [], [], timeout_s)[0]:
            raise self._error(f"still alive after {timeout_s:.1f} s")

    def stop(self, *, timeout_s: float = 15.0) -> None:
        """Shut the engine down and wait for its exit.

        Raises:
            ReplicaError: The shutdown failed or took too long; the process is killed then.
        """
        try:
            self._begin("stop").result(timeout_s=timeout_s)
            self.wait_exit(timeout_s=timeout_s)
        finally:
            self.kill()

    def close(self) -> None:
        """Kill the process if it lives, and release the handle. Idempotent."""
        self.kill()
        if not self._closed:
            self._closed = True
            self._channel.close()
            os.close(self._pidfd)

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        """Return the last lines of what the replica printed."""
        return log_tail(self.log_path, lines)

    def _begin(self, op: str, **arguments: Any) -> Pending:
        call_id = next(self._ids)
        try:
            self._channel.send((call_id, op, arguments), timeout_s=5.0)
        except OSError as error:
            raise self._error(f"cannot take {op!r}: {error}") from error
        return Pending(functools.partial(self._await, call_id, op))

    def _await(self, call_id: int, op: str, timeout_s: float) -> Any:
        end = time.monotonic() + timeout_s
        while call_id not in self._replies:
            try:
                reply_id, ok, value = self._channel.recv(timeout_s=max(0.0, end - time.monotonic()))
            except TimeoutError:
                raise self._error(f"{op!r} took longer than {timeout_s:.1f} s") from None
            except EOFError:
                raise self._error(f"died during {op!r}") from None
            self._replies[reply_id] = (ok, value)
        ok, value = self._replies.pop(call_id)
        if not ok:
            raise self._error(f"{op!r} failed:\n{value}")
        return value

    def _error(self, what: str) -> ReplicaError:
        return ReplicaError(f"replica {self.pid}: {what}\n--- {self.log_path}\n{log_tail(self.log_path)}")


class Pending:
    """A command a replica is working on. Commands of one replica run in order."""

    def __init__(self, wait: Callable[[float], Any]) -> None:
        self._wait = wait

    def result(self, *, timeout_s: float) -> Any:
        """Wait for the outcome, once.

        Raises:
            ReplicaError: The command failed, the replica died, or the deadline passed. Only after
                a missed deadline may the outcome be awaited again.
        """
        return self._wait(timeout_s)


def log_tail(path: Path, lines: int = _LOG_TAIL_LINES) -> str:
    """Return the last lines of a log file, or why there are none."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(text.splitlines()[-lines:])
