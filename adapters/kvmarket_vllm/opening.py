"""Opening a market off the engine's thread: a registry that does not answer must not stop an engine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from kvmarket.errors import KVMarketError

logger = logging.getLogger("vllm.kvmarket")

T = TypeVar("T")

OPEN_WAIT_S = 2.0
"""How long an engine waits for its market once; after that it goes on, and uses the market when it is there."""


class Opening(Generic[T]):
    """Something being made on a thread; `get` returns it, or None while it is not there or has failed."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._made: T | None = None
        self._thread = threading.Thread(target=self._run, args=(make,), name="kvmarket-open", daemon=True)
        self._thread.start()
        self._thread.join(OPEN_WAIT_S)
        if self._thread.is_alive():
            logger.warning("kvmarket: the registry does not answer; this replica goes on alone until it does")

    def _run(self, make: Callable[[], T]) -> None:
        try:
            self._made = make()
        except KVMarketError as error:
            logger.error("kvmarket is off for this replica: %s", error)  # noqa: TRY400 - the message says it all

    def get(self) -> T | None:
        """Return it if it is there. Never waits."""
        return self._made

    @property
    def failed(self) -> bool:
        """True when there will never be anything to get."""
        return self._made is None and not self._thread.is_alive()

    def finish(self, timeout_s: float) -> T | None:
        """Wait for the outcome, for shutting down."""
        self._thread.join(timeout_s)
        return self._made
