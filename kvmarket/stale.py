"""Records that turned out to be stale are removed from the registry: later, off the reader's way, and not too often."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING

from kvmarket.errors import RegistryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.metrics import Metrics
    from kvmarket.registry import Registry
    from kvmarket.registry.records import BlockRecords

WAITING_MAX = 32
RECORDS_MAX = 64
"""Records removed at once; who meets the others removes them."""
PAUSE_S = 0.05
STOP_WAIT_S = 1.0


class StaleRecords:
    """Removes from one namespace what readers found stale. Thread-safe.

    Owners withdraw what they overwrite themselves: this is for what they could not. A record is removed only where it
    is still the one that was met.
    """

    def __init__(self, registry: Registry, digest: bytes, metrics: Metrics) -> None:
        self._registry, self._digest, self._metrics = registry, digest, metrics
        self._queue: queue.Queue[tuple[Sequence[bytes], BlockRecords] | None] = queue.Queue(WAITING_MAX)
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def met(self, keys: Sequence[bytes], records: BlockRecords) -> None:
        """Have records removed soon; forget it where too many wait already. Never waits.

        Args:
            keys: what was looked up.
            records: those that their owner refuses.
        """
        if not keys or not len(records) or self._closed.is_set():
            return
        try:
            self._queue.put_nowait((keys, records[:RECORDS_MAX].copy()))
        except queue.Full:
            return
        with self._lock:
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._run, name="kvmarket-stale", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None and not self._closed.is_set():
            with contextlib.suppress(RegistryError):  # the next who meets them tries again
                self._metrics.add(stale_records_removed=self._registry.discard(self._digest, *item))
            self._closed.wait(PAUSE_S)

    def close(self) -> None:
        """Stop; what waits is forgotten. Idempotent."""
        self._closed.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            with contextlib.suppress(queue.Full):  # then it wakes up anyway
                self._queue.put_nowait(None)
            thread.join(STOP_WAIT_S)
