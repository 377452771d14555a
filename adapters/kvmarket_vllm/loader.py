"""Reading peers' blocks into blocks that vLLM has allocated but neither hashes nor schedules before they are reported.

Those blocks are the staging area: what is read there is proven (generation before and after, digest, epoch, liveness)
before vLLM learns of it, and what is not proven is reported as not loaded, which vLLM recomputes.
"""

from __future__ import annotations

import queue
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.deadline import Deadline
from kvmarket.errors import KVMarketError
from kvmarket.logs import Log, where

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmarket.core import MarketCore
    from kvmarket.outcome import Outcome
    from kvmarket.region import PagedMemory
    from kvmarket.registry import LookupResult
    from kvmarket_vllm.messages import Load, Rank
    from kvmarket_vllm.stats import Deltas

events = Log("vllm.kvmarket")

INLINE_BYTES_MAX = {"host": 64 << 20, "cuda": 1 << 30}
"""By kind of memory: loads up to this size run on the engine's thread when it has nothing else to do. A thread hop
would take longer."""
IDLE_WAIT_S = 0.01
"""How long an otherwise idle step waits for a load on the thread before it is polled again."""
LOADS_MAX = 1024


class Loader:
    """Runs loads, one at a time, in order.

    Args:
        core: the market to read from.
        pages: the KV cache.
        rank: this worker's.
        deltas: counters.
        ordered: returns `pages` as they are once the work that the engine has launched so far has ended: on a card,
            kernels of requests that are over may still write to blocks that a load is to fill. Called on the thread
            that calls `start`. None: nothing runs behind the engine's back.
    """

    def __init__(
        self,
        core: MarketCore,
        pages: PagedMemory,
        rank: Rank,
        deltas: Deltas,
        ordered: Callable[[], PagedMemory] | None = None,
    ) -> None:
        self._core, self._pages, self._rank, self._deltas = core, pages, rank, deltas
        self._ordered = ordered or (lambda: pages)
        self._queue: queue.Queue[tuple[Load, PagedMemory, Deadline] | None] = queue.Queue(LOADS_MAX)
        self._changed = threading.Condition()
        self._running = 0
        self._finished: set[str] = set()
        self._digests: dict[str, list[bytes]] = {}
        self._invalid: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="kvmarket-load", daemon=True)
        self._thread.start()

    def start(self, load: Load, *, inline: bool) -> None:
        """Run a load: at once if `inline` and small and nothing is queued, else on the thread."""
        deadline = Deadline(self._core.config.fetch_deadline_s)
        pages = self._ordered()
        with self._changed:
            alone = self._running == 0
            self._running += 1
        if inline and alone and len(load.block_ids) * pages.layout.page_bytes <= INLINE_BYTES_MAX[pages.kind]:
            self._load(load, pages, deadline)
            return
        try:
            self._queue.put_nowait((load, pages, deadline))
        except queue.Full:
            self._report(load, 0, [])

    def take_finished(self, *, wait: bool) -> tuple[set[str], set[int]]:
        """Return finished request ids, each once, and the blocks that were not loaded."""
        with self._changed:
            if wait and self._running and not self._finished:
                self._changed.wait(IDLE_WAIT_S)
            finished, self._finished = self._finished, set()
            invalid, self._invalid = self._invalid, set()
        return finished, invalid

    def take_digests(self, request_id: str) -> list[bytes]:
        """Return the digests that a finished request's blocks were compared with, once; none if that is not certain."""
        return self._digests.pop(request_id, [])

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            self._load(*item)

    def _load(self, load: Load, pages: PagedMemory, deadline: Deadline) -> None:
        began = time.perf_counter()
        found = load.found[self._rank]
        blocks, digests = 0, list[bytes]()
        try:
            targets = np.array(load.block_ids, np.int64)
            if found.blocks > len(targets):  # ranks may have found different lengths; all load the shortest
                records = found.records[found.records["block"] < len(targets)]
                found = replace(found, blocks=len(targets), records=records)
            outcome = self._core.fetcher.read(found, pages, targets, deadline)
            blocks, digests = outcome.blocks, self._compared(found, outcome)
            for transfer in outcome.transfers:
                self._deltas.add_labelled("tier_bytes", transfer.tier, transfer.nbytes)
            if blocks < len(targets):
                events.info(
                    "loaded_less", "not all blocks were loaded", loaded=blocks, of=len(targets), why=outcome.detail
                )
        except KVMarketError as error:
            events.warning("load_failed", "a load failed and is recomputed", error=error)
        except Exception as error:  # noqa: BLE001 - the engine waits for this request: it must hear of it
            events.error("load_broke", "a load failed and is recomputed", error=repr(error), at=where(error))
            self._deltas.add(errors=1)
        self._deltas.add(load_seconds=time.perf_counter() - began)
        self._report(load, blocks, digests)

    def _compared(self, wanted: LookupResult, outcome: Outcome) -> list[bytes]:
        """Return the digest of every block, if each was compared with the only one that it is announced with."""
        certain = self._pages.kind == "cuda" and self._core.fetcher.verify == "full"
        if not certain or not outcome.blocks == outcome.blocks_verified == wanted.blocks == len(wanted.records):
            return []
        digests: list[bytes] = wanted.records["digest"].tolist()
        return digests

    def _report(self, load: Load, blocks: int, digests: list[bytes]) -> None:
        failed = load.block_ids[blocks:]
        nbytes = blocks * self._pages.layout.page_bytes
        tokens = blocks * self._core.namespace.spec.block_size
        self._deltas.add(loaded_bytes=nbytes, load_failures=int(bool(failed)))
        if not any(self._rank):  # the others load their parts of the same tokens
            self._deltas.add(loads=1, loaded_tokens=tokens)
        with self._changed:
            self._running -= 1
            self._finished.add(load.request_id)
            if digests:
                self._digests[load.request_id] = digests
            self._invalid.update(failed)
            self._changed.notify_all()

    def close(self) -> None:
        """Finish what is queued, within seconds."""
        with suppress(queue.Full):
            self._queue.put(None, timeout=1.0)
        self._thread.join(1.0)
