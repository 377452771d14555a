"""Look-ups in a registry that is not local, off the engine's thread: its scheduler asks until they are done."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Generic, TypeVar

from kvmarket.errors import DeadlineExceededError, KVMarketError
from kvmarket.logs import Log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

events = Log("vllm.kvmarket")

T = TypeVar("T")

WAIT_S = 0.003
"""How long the scheduler waits for an answer the first time: most are there in a tenth of it, and it saves a pass."""
WAITING_MAX = 256
"""Look-ups waiting for the thread; who comes later misses."""
GIVE_UP_S = 2.0
"""After this the engine computes the prompt itself."""


class _Asked(Generic[T]):
    def __init__(self, keys: Sequence[bytes], work: Callable[[], T]) -> None:
        self.first, self.last, self.work = keys[0], keys[-1], work
        self.done = threading.Event()
        self.answer: T | None = None
        self.began = time.monotonic()


class Lookups(Generic[T]):
    """At most one look-up per request, done in order by one thread. Used from the scheduler's thread only.

    How long one takes is bounded by the registry's own timeouts; beyond `GIVE_UP_S` nobody waits for it.
    """

    def __init__(self) -> None:
        self._asked: dict[str, _Asked[T]] = {}
        self._queue: queue.Queue[_Asked[T] | None] = queue.Queue(WAITING_MAX)
        self._thread: threading.Thread | None = None

    def ask(self, request_id: str, keys: Sequence[bytes], work: Callable[[], T]) -> T | None:
        """Return the answer for these keys, once, or None while it is not there: ask again.

        Args:
            request_id: whose prompt; asking for other keys of the same request begins anew.
            keys: the block keys asked for, at least one.
            work: does the look-up; runs on another thread.

        Raises:
            DeadlineExceededError: too many are waiting, it takes too long, or it failed. Nothing is known then.
        """
        asked = self._asked.get(request_id)
        wait_s = 0.0
        if asked is None or (asked.first, asked.last) != (keys[0], keys[-1]):
            asked, wait_s = _Asked(keys, work), WAIT_S
            self._put(asked)
            self._asked[request_id] = asked
        done = asked.done.wait(wait_s)
        if not done and time.monotonic() - asked.began < GIVE_UP_S:
            return None
        del self._asked[request_id]
        if asked.answer is None:
            raise DeadlineExceededError("the registry did not answer" if not done else "the look-up failed")
        return asked.answer

    def _put(self, asked: _Asked[T]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvmarket-lookup", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(asked)
        except queue.Full as error:
            raise DeadlineExceededError(f"{WAITING_MAX} look-ups are waiting for the registry") from error

    def _run(self) -> None:
        while (asked := self._queue.get()) is not None:
            try:
                asked.answer = asked.work()
            except KVMarketError as error:
                events.warning("lookup_failed", "a look-up failed", error=error)
            finally:
                asked.done.set()

    def forget(self, request_id: str) -> None:
        """Drop what was asked for a request that is over."""
        self._asked.pop(request_id, None)

    def close(self, timeout_s: float = 1.0) -> None:
        """Stop the thread after the look-up that is under way."""
        if self._thread is None:
            return
        while True:
            try:
                self._queue.put_nowait(None)
                break
            except queue.Full:
                self._queue.get_nowait()
        self._thread.join(timeout_s)
