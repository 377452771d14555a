"""A thread that does something at regular beats, sooner when woken, until it is stopped."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvmarket.logs import Log

if TYPE_CHECKING:
    from collections.abc import Callable

events = Log(__name__)

STOP_WAIT_S = 5.0


class Keeper:
    """Beats at least every `interval_s`. Thread-safe.

    Args:
        beat: returns 0, or the seconds until the next attempt after one that failed.
        interval_s: seconds between beats.

    Attributes:
        beats: how many there were.
    """

    def __init__(self, beat: Callable[[], float], interval_s: float) -> None:
        self._beat, self._interval_s = beat, interval_s
        self._lock = threading.Lock()
        self._woken, self._stopped = threading.Event(), False
        self._thread: threading.Thread | None = None
        self.beats = 0

    def start(self) -> None:
        """Start the thread if it does not run. It never runs in a forked child that did not ask for it."""
        with self._lock:
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="kvmarket-lease", daemon=True)
                self._thread.start()

    def leaves_it_to_caller(self) -> bool:
        """Tell whether the calling thread is the keeper's, or there is no keeper that would do it."""
        thread = self._thread
        return thread is None or not thread.is_alive() or thread is threading.current_thread()

    def wake(self) -> None:
        """Beat soon."""
        self._woken.set()

    def _run(self) -> None:
        pause, failing = self._interval_s, False
        while not self._stopped:
            self._woken.wait(pause)
            self._woken.clear()
            if self._stopped:
                return
            self.beats += 1
            retry_s = self._beat()
            if bool(retry_s) != failing:
                failing = bool(retry_s)
                if failing:
                    events.warning("server_away", "the registry server is away; it is asked again and again")
                else:
                    events.warning("server_back", "the registry server is back")
            pause = min(retry_s or self._interval_s, self._interval_s)

    def stop(self) -> None:
        """Stop, and wait for a beat that is under way. Idempotent."""
        with self._lock:
            self._stopped = True
            thread = self._thread
        self._woken.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(STOP_WAIT_S)
