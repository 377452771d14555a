"""A second thread for large reads, on another core than the thread it helps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Helper:
    """One thread that runs one piece of work at a time. Thread-safe.

    A kernel that sees a busy machine wakes a thread on the core of whoever woke it, and with both on one core for some
    milliseconds the read is over before they are parted. So the helper is told before each piece of work to stay away
    from the core that asks; if no other is free it does not begin, and a piece that has not begun can be cancelled.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "kvmarket-help", initializer=self._begin)
        self._cores = os.sched_getaffinity(0)
        self._current_core = getattr(ctypes.CDLL(None), "sched_getcpu", None)  # `os` has it from Python 3.13 on
        self._thread = self._process = 0  # known once it has begun; a forked child has no such thread
        self._avoided = -1

    @property
    def useful(self) -> bool:
        """False on one core, where a second thread only costs."""
        return len(self._cores) > 1

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Have `work` done, now or after what it does for others."""
        if self._current_core is not None and self._process == os.getpid():
            self._avoid(self._current_core())
        return self._pool.submit(work)

    def _begin(self) -> None:
        self._thread, self._process = threading.get_native_id(), os.getpid()

    def _avoid(self, core: int) -> None:
        if core != self._avoided and self._cores - {core}:
            with contextlib.suppress(OSError):  # a sandbox may not allow it
                os.sched_setaffinity(self._thread, self._cores - {core})
                self._avoided = core

    def close(self) -> None:
        """End the thread; waits for the work it has begun."""
        self._pool.shutdown(wait=True)
