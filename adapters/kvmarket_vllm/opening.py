"""Opening a market off the engine's thread: a registry that does not answer must not stop an engine."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from kvmarket.errors import KVMarketError, RegistryUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("vllm.kvmarket")

T = TypeVar("T")

OPEN_WAIT_S = 2.0
"""How long an engine waits for its market once; after that it goes on, and uses the market when it is there."""
RETRY_S = 5.0
"""How long after a failure that may pass it is tried again."""


class Opening(Generic[T]):
    """Something being made on a thread; `get` returns it, or None while it is not there."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._made: T | None = None
        self._tried, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name="kvmarket-open", daemon=True)
        self._thread.start()
        if not self._tried.wait(OPEN_WAIT_S):
            logger.warning("kvmarket: the registry does not answer; this replica goes on alone until it does")

    def _run(self, make: Callable[[], T]) -> None:
        while not self._stop.is_set():
            try:
                self._made = make()
                return
            except RegistryUnavailableError as error:
                if not self._tried.is_set():
                    logger.error("kvmarket is off for this replica until this passes: %s", error)  # noqa: TRY400
            except KVMarketError as error:
                logger.error("kvmarket is off for this replica: %s", error)  # noqa: TRY400 - the message says it all
                return
            finally:
                self._tried.set()
            self._stop.wait(RETRY_S)

    def get(self) -> T | None:
        """Return it if it is there. Never waits."""
        return self._made

    @property
    def failed(self) -> bool:
        """True when it was tried and there is nothing to get."""
        return self._tried.is_set() and self._made is None

    def finish(self, timeout_s: float) -> T | None:
        """Try no more, and wait for the outcome of what is under way, for shutting down."""
        self._stop.set()
        self._thread.join(timeout_s)
        return self._made
