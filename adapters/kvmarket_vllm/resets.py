"""Resets off the engine's thread: a registry whose write lock somebody holds must not stop an engine."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from kvmarket.errors import KVMarketError
from kvmarket.logs import Log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmarket.core import MarketCore

events = Log("vllm.kvmarket")

WAIT_S = 0.2
"""How long the engine waits for one reset; most take well under a millisecond."""
RETRY_S = 1.0
"""How long after a failure one that is still owed is tried again."""


class Resets:
    """Makes all processes of the namespaces forget, one reset at a time. Used from the scheduler's thread only.

    Args:
        count: called for each that reached the registry.
    """

    def __init__(self, count: Callable[[], None] = lambda: None) -> None:
        self._count = count
        self._thread: threading.Thread | None = None
        self._wanted = self._begun = self._made = 0
        self._reached = False
        self._retry_at = 0.0

    @property
    def owed(self) -> bool:
        """True while a reset was asked for and has not reached the registry: nothing may be fetched or offered."""
        return self._made < self._wanted

    def owe(self) -> None:
        """A reset is asked for and cannot be tried yet."""
        self._wanted += 1

    def make(self, cores: Iterable[MarketCore]) -> bool:
        """Bump the epochs; return whether that is done. If not it stays owed, and what was begun goes on by itself."""
        self._wanted += 1  # one that is under way may have been carried out before what this one is about
        end = time.monotonic() + WAIT_S
        if self._settle(WAIT_S):
            self._start(list(cores))
            if not self._settle(max(0.0, end - time.monotonic())):
                events.warning("reset_late", "the reset has not reached the registry yet; until then nothing is shared")
        return not self.owed

    def go_on(self, cores: Iterable[MarketCore]) -> bool:
        """Return whether nothing is owed any more; try what is owed again, now and then. Waits for nobody."""
        if self._settle(0.0) and self.owed and time.monotonic() >= self._retry_at:
            self._start(list(cores))
        return not self.owed

    def _start(self, cores: list[MarketCore]) -> None:
        self._begun, self._reached = self._wanted, False
        self._thread = threading.Thread(target=self._bump, args=(cores,), name="kvmarket-reset", daemon=True)
        self._thread.start()

    def _bump(self, cores: list[MarketCore]) -> None:
        try:
            for core in cores:
                core.bump_epoch()
            self._reached = True
        except KVMarketError as error:
            events.error("reset_failed", "the reset did not reach the registry", error=error)

    def _settle(self, wait_s: float) -> bool:
        """Take the outcome of what was begun; False while it is under way."""
        thread = self._thread
        if thread is None:
            return True
        thread.join(wait_s)
        if thread.is_alive():
            return False
        self._thread = None
        if self._reached:
            self._made = self._begun
            self._count()
        else:
            self._retry_at = time.monotonic() + RETRY_S
        return True

    def close(self) -> None:
        """Wait a moment for one that is under way."""
        self._settle(WAIT_S)
