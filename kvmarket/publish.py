"""Publishing pages in place: generations at once, digests and the registry off the caller's path.

`offer` makes pages readable and returns; a thread computes digests and announces. `retract` makes pages unreadable and
returns; the same thread withdraws their records. A page is never announced under a generation that it no longer has.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.backlog import Backlog
from kvmarket.completion import completion
from kvmarket.errors import (
    DeadlineExceededError,
    KVMarketError,
    MarketClosedError,
    RegistryFullError,
    RegistryUnavailableError,
)
from kvmarket.logs import Log
from kvmarket.pending import Pending
from kvmarket.publish_job import Job, digests_of
from kvmarket.region.generations import readable
from kvmarket.registry.records import RECORD, make_records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.deadline import Deadline
    from kvmarket.identity import Namespace, OwnerInfo
    from kvmarket.metrics import Metrics
    from kvmarket.region.region import LentRegion
    from kvmarket.registry import Registry

events = Log(__name__)

BATCH_PAGES = 256
"""Pages announced per registry transaction."""
QUEUE_MAX = 1024
"""Batches waiting for the announcing thread; more are dropped and counted, they are only lost hits."""


def _always() -> bool:
    return True


class Publisher:
    """Publishes the pages of one lent region. Thread-safe; `offer` and `retract` never block and never do I/O."""

    def __init__(
        self,
        namespace: Namespace,
        registry: Registry,
        owner: OwnerInfo,
        region: LentRegion,
        metrics: Metrics,
        *,
        with_digests: bool,
    ) -> None:
        self._digest = namespace.digest
        self._registry, self._owner, self._region, self._metrics = registry, owner, region, metrics
        self._with_digests = with_digests
        self._announced: tuple[np.ndarray, np.ndarray] | None = None
        self._epoch = registry.epoch(self._digest)
        self._lock = threading.Lock()
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._queue: queue.Queue[Job | None] = queue.Queue(QUEUE_MAX)
        self._closed = False
        self._failed_before = False
        self._backlog: Backlog[Job] = Backlog()
        self._pending: Pending[Job] = Pending()
        self._thread = threading.Thread(target=self._run, name="kvmarket-announce", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> dict[str, int]:
        """How much waits for the announcing thread and for the registry, in batches, and what is offered, in blocks."""
        return {
            "announce_queue": self._queue.qsize() + len(self._pending),
            "announce_backlog": len(self._backlog),
            "offered_blocks": len(self._page_of),
        }

    def page_of(self, key: bytes) -> int | None:
        """Return the page under which a block is offered, or None."""
        with self._lock:
            return self._page_of.get(key)

    @property
    def epoch(self) -> int:
        """The namespace's epoch as far as this publisher has noticed it."""
        return self._epoch

    def remember_digests(self) -> None:
        """Keep the digests of announced pages, for `digests_of`. Call it before anything is offered."""
        pages = self._region.layout.num_pages
        self._announced = np.zeros(pages, np.uint64), np.zeros(pages, RECORD["digest"])

    def digests_of(self, pages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) V16 digests that `pages` were announced with, and (n,) bool: which of them still hold."""
        if self._announced is None:
            return np.zeros(len(pages), RECORD["digest"]), np.zeros(len(pages), bool)
        generations, digests = self._announced
        return digests[pages], readable(self._region.generations.values, pages, generations[pages])

    def offer(
        self,
        keys: Sequence[bytes],
        pages: Sequence[int],
        *,
        wait: bool = False,
        after: Any = None,
        delay_s: float = 0.0,
        digests: Sequence[bytes] | None = None,
    ) -> Future[int] | None:
        """Make `pages` readable as the blocks `keys`; their bytes must be final. Announced soon after.

        What waits for kernels or for its time is not waited for by what was offered later.

        Args:
            keys: registry keys, see `kvmarket.registry.block_keys`; blocks that are offered already are left alone.
            pages: the page of each.
            wait: return a future of the number of blocks announced; it cannot be cancelled.
            after: the bytes are final once this has passed (see `kvmarket.completion`): a CUDA event behind the kernels
                that fill the pages, or their stream. The pages become readable then, unless they are retracted first.
            delay_s: with `after`: not before this many seconds from now.
            digests: of the pages, where they are known. Readers refuse a page whose bytes have another.
        """
        ended = None if after is None else completion(after)
        done: Future[int] | None = None
        if wait:
            done = Future()
            done.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                raise MarketClosedError("this marketplace is closed")
            numbers, table = self._region.page_numbers(pages), self._region.generations  # refuses before it is entered
            fresh = self._enter(dict(zip(keys, pages, strict=True)))
            whole = len(fresh) == len(numbers)
            numbers = numbers if whole else self._region.page_numbers(list(fresh.values()))
            generations = table.validate(numbers) if ended is None else table.reserve(numbers)
            job = Job(list(fresh), numbers, generations, done, ended, delay_s)
            if digests is not None:
                job.digests = list(digests if whole else map(dict(zip(keys, digests, strict=True)).__getitem__, fresh))
            self._put(job)
        return done

    def _enter(self, offered: dict[bytes, int]) -> dict[bytes, int]:
        """Note which page is which block, but for those that are offered already; return the others. Lock held."""
        if not self._page_of.keys().isdisjoint(offered):
            offered = {key: page for key, page in offered.items() if key not in self._page_of}
        by_page = dict(zip(offered.values(), offered, strict=True))
        if len(by_page) == len(offered) and self._key_of.keys().isdisjoint(by_page):  # as ever in an engine
            self._key_of |= by_page
            self._page_of |= offered
            return offered
        for key, page in offered.items():
            previous = self._key_of.get(page)
            if previous is not None:
                del self._page_of[previous]
            self._key_of[page], self._page_of[key] = key, page
        return offered

    def _take_back(self, job: Job) -> None:
        """Make pages whose announcement failed unreadable again, so that their blocks can be offered once more."""
        if job.generations is None:
            return
        current = self._region.generations.values[job.pages] == job.generations
        self._drop(job.pages[current])

    def retract(self, pages: Sequence[int], *, delay_s: float = 0.0) -> None:
        """Make `pages` unreadable before they are overwritten or freed. Pages that were not offered are fine.

        Args:
            pages: unreadable when this returns.
            delay_s: their records are withdrawn so many seconds later, unless they are offered again: that takes this
                process's time, and whoever finds a record meanwhile sees that it is stale.
        """
        with self._lock:
            numbers = self._region.page_numbers(pages)
            keys = self._drop(numbers)
            if keys and not self._closed:
                self._put(Job(keys, numbers, None, after=_always if delay_s else None, delay_s=delay_s))

    def forget_all(self, epoch: int | None = None) -> None:
        """Make every page unreadable and drop what was offered; `epoch` is the namespace's from now on."""
        with self._lock:
            self._drop_all()
            self._epoch = self._epoch if epoch is None else epoch
        if epoch is None:  # read when the pages are unreadable already: it may fail
            self._epoch = self._current_epoch()

    def _current_epoch(self) -> int:
        try:
            return self._registry.epoch(self._digest)
        except RegistryUnavailableError:
            if self._registry.local:
                raise
            return self._registry.epoch_hint(self._digest)  # an older one is refused when something is announced

    def notice_epoch(self) -> bool:
        """Forget all if another process bumped the epoch, as far as is known without waiting; return whether it did."""
        if self._registry.epoch_hint(self._digest) == self._epoch:
            return False
        self._metrics.add(epochs_observed=1)
        self.forget_all()
        return True

    def _drop(self, pages: np.ndarray) -> list[bytes]:
        """Make pages unreadable and return the keys that they were offered as. The lock is held."""
        self._region.generations.invalidate(pages)
        keys = [*filter(None, map(self._key_of.pop, pages.tolist(), repeat(None)))]  # a prompt's worth at once
        deque(map(self._page_of.pop, keys), maxlen=0)
        return keys

    def _drop_all(self) -> None:
        self._region.generations.invalidate(np.fromiter(self._key_of, np.int64, len(self._key_of)))
        self._key_of.clear()
        self._page_of.clear()

    def flush(self, deadline: Deadline) -> None:
        """Wait until everything offered so far is announced. Raises `DeadlineExceededError`."""
        future = self.offer([], [], wait=True)
        try:
            if future is not None:
                future.result(deadline.remaining_s)
        except TimeoutError as error:
            raise DeadlineExceededError("the registry did not take the announcements in time") from error

    def close(self) -> None:
        """Make every page unreadable and stop the thread. Waits at most a second for a write that is under way."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._drop_all()
        while True:
            try:
                self._queue.put_nowait(None)
                break
            except queue.Full:
                self._fail_oldest()
        self._thread.join(1.0)

    def _fail_oldest(self) -> None:
        try:
            job = self._queue.get_nowait()
        except queue.Empty:
            return
        if job is not None and job.done is not None:
            job.done.set_exception(MarketClosedError("this marketplace was closed"))

    def _put(self, job: Job) -> None:
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            self._metrics.add(announcements_dropped=len(job.keys))
            self._take_back(job)
            if job.done is not None:
                job.done.set_exception(DeadlineExceededError("too many announcements are waiting for the registry"))

    # ---- the announcing thread

    def _run(self) -> None:
        stop = False
        while not stop:
            jobs, stop = self._collect()
            ended = [(job, False) for job in self._pending.take_all()] if stop else self._pending.take_ended()
            for job, well in ended:
                if job.generations is not None:
                    self._settle(job, ended=well)
                jobs.append(job)
            self._work(jobs)
            if not stop and self._backlog.wait_s == 0:
                self._try_again()

    def _collect(self) -> tuple[list[Job], bool]:
        """Return jobs that are ready, about a batch of them, and whether to stop; those that are not are put aside.

        Waits for the first no longer than until something else is due.
        """
        jobs: list[Job] = []
        pages = 0
        due = [wait_s for wait_s in (self._backlog.wait_s, self._pending.wait_s) if wait_s is not None]
        wait_s = min(due, default=None)
        while pages < BATCH_PAGES:
            if len(self._pending) >= QUEUE_MAX and not self._closed:  # once closed, all that came is answered
                time.sleep(0.0 if jobs else wait_s or 0.0)
                return jobs, False
            try:
                job = self._queue.get(timeout=wait_s)
            except queue.Empty:
                break
            if job is None:
                return jobs, True
            wait_s = 0.0
            if job.done is not None and not job.keys and self._pending:  # who flushes waits for all before it
                job.after = self._pending.all_present()
            if job.after is not None:
                self._pending.add(job, job.after, job.delay_s)
            else:
                jobs.append(job)
                pages += len(job.keys)
        return jobs, False

    def _try_again(self) -> None:
        """Announce what the registry could not take, if it is back."""
        waiting = self._backlog.take()
        try:
            self._registry.epoch(self._digest)  # costs less than finding out with all digests computed
        except KVMarketError:
            for job in waiting:
                self._backlog.add(job)
            return
        for job in waiting:
            self._work([job])

    def _settle(self, job: Job, *, ended: bool) -> None:
        """Make those pages of `job` readable that are final now and that nobody retracted or offered anew."""
        with self._lock:
            if not ended:
                self._take_back(job)
            reserved = self._region.generations.values[job.pages] == job.generations
            pages, held = job.pages.tolist(), [*map(self._page_of.get, job.keys)]  # engines wait for this lock
            rows = [row for row in np.flatnonzero(reserved).tolist() if held[row] == pages[row]]
            if len(rows) < len(pages):
                job.keep(rows)
            job.generations = self._region.generations.validate(job.pages)

    def _work(self, jobs: list[Job]) -> None:
        """Do jobs in order; consecutive ones of one kind share a transaction."""
        start = 0
        for end in range(1, len(jobs) + 1):
            if end < len(jobs) and (jobs[end].generations is None) == (jobs[start].generations is None):
                continue
            group = jobs[start:end]
            start = end
            try:
                announced = self._withdraw(group) if group[0].generations is None else self._announce(group)
                self._failed_before = False
                self._backlog.worked()
            except KVMarketError as error:
                self._failed(group, error)
                continue
            for job in group:
                if job.done is not None:
                    job.done.set_result(announced)

    def _failed(self, jobs: list[Job], error: KVMarketError) -> None:
        """Keep for later what nobody waits for, if the registry is only away; take the rest back."""
        if not self._failed_before:
            events.warning("not_announced", "blocks are not announced", error=error)
        self._failed_before = True
        away = isinstance(error, RegistryUnavailableError) and not isinstance(error, RegistryFullError)
        for job in jobs:
            if away and job.generations is not None and job.done is None and self._backlog.add(job):
                self._metrics.add(announcements_postponed=len(job.keys))
                continue
            self._metrics.add(announcements_failed=len(job.keys))
            with self._lock:
                self._take_back(job)
            if job.done is not None:
                job.done.set_exception(error)

    def _announce(self, jobs: list[Job]) -> int:
        keys = [key for job in jobs for key in job.keys]
        if not keys:
            return 0
        epoch = self._epoch  # before the generations are looked at: who changes it invalidates them first
        pages = np.concatenate([job.pages for job in jobs])
        generations = np.concatenate([job.generations for job in jobs if job.generations is not None])
        digests = digests_of(jobs, self._region.pages) if self._with_digests else None
        # A page that changed while its digest was computed has another generation by now: leave it out.
        current = np.flatnonzero(self._region.generations.values[pages] == generations)
        keys = [keys[i] for i in current]
        if digests is not None:
            digests = [digests[i] for i in current]
        records = make_records(self._owner.owner, self._region.region_id, pages[current], generations[current], digests)
        if not keys:
            return 0
        began = time.perf_counter()
        current_epoch = self._registry.announce(self._digest, epoch, keys, records)
        if self._metrics.timed:
            self._metrics.observe("announce_seconds", time.perf_counter() - began)
        if not current_epoch:
            self._metrics.add(epochs_observed=1)
            with self._lock:
                overtaken = self._epoch == epoch  # else this process bumped it, and what it offered since then is good
                if overtaken:
                    self._drop_all()
            if overtaken:
                self._epoch = self._registry.epoch(self._digest)
            return 0
        if self._announced is not None and digests is not None:
            self._announced[1][records["page"]] = records["digest"]
            self._announced[0][records["page"]] = records["generation"]
        self._metrics.add(blocks_announced=len(keys))
        return len(keys)

    def _withdraw(self, jobs: list[Job]) -> int:
        keys = []
        with self._lock:  # a block offered again since then keeps its newer record
            keys = [key for job in jobs for key in job.keys if key not in self._page_of]
        removed = self._registry.withdraw(self._digest, self._owner.owner, keys) if keys else 0
        self._metrics.add(blocks_withdrawn=removed)
        return removed
