"""The disk tier: published copies are written behind to a log of this process, and read back after they were evicted.

One thread opens the log and writes; what it does not get to write is not there, and nobody waits for it. Reads run on
a thread of the caller's, straight into its pages. A disk that fails switches the tier off, with one line in the log.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmarket.digest import page_digests
from kvmarket.disk_log import DiskLog, StoredBlock
from kvmarket.disk_place import Place, namespace_directory, prune, read_epoch
from kvmarket.errors import KVMarketError, RegistryError, RegistryUnavailableError
from kvmarket.logs import Log
from kvmarket.region.generations import memory_fence
from kvmarket.region.pages import PagedMemory, copy_pages
from kvmarket.report import TransferReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmarket.core import MarketCore
    from kvmarket.deadline import Deadline
    from kvmarket.region.region import LentRegion

events = Log(__name__)

QUEUE_MAX = 4096
"""Blocks that wait to be written; more are dropped and counted."""
RETRY_S = 2.0
"""How often the registry is asked for the epoch while it is away: without it, what the log holds may be too old."""
FLUSH_S_MAX = 2.0
"""How long closing waits for what is still to be written."""
PROMOTED_BATCH = 16


@dataclass(frozen=True, slots=True)
class _Write:
    key: bytes
    parent: bytes | None
    page: int
    generation: int
    epoch: int
    expires: int


class DiskTier:
    """The log of one marketplace. Thread-safe.

    Args:
        core: the marketplace; ``disk_bytes`` and ``disk_dir`` are its settings.
    """

    def __init__(self, core: MarketCore) -> None:
        self._core, self._metrics, self._namespace = core, core.metrics, core.namespace
        self._page_bytes = core.namespace.spec.page_bytes
        self._log: DiskLog | None = None
        self._place: Place | None = None
        self._epoch = self._log_epoch = 0
        self._off, self._pid = False, os.getpid()
        self._opened, self._closing = threading.Event(), threading.Event()
        self._queue: queue.Queue[_Write | Callable[[DiskLog], None] | None] = queue.Queue(QUEUE_MAX)
        self._region: LentRegion | None = None
        self._scratch = np.empty((1, self._page_bytes), np.uint8)
        self._thread = threading.Thread(target=self._run, name="kvmarket-disk", daemon=True)
        self._thread.start()

    # ---- reading

    def wait_opened(self, deadline: Deadline) -> None:
        """Wait until the log has been opened, or cannot be, or the deadline passes."""
        self._opened.wait(deadline.remaining_s)

    @property
    def opened(self) -> bool:
        """True once the log has been opened, or cannot be."""
        return self._opened.is_set()

    def run(self, keys: Sequence[bytes], epoch: int) -> int:
        """Return how many leading blocks of `keys` could be read in the namespace's epoch `epoch`. Does no I/O."""
        log = self._log
        if log is None or self._off or not keys:
            return 0
        self.notice(epoch)
        return log.run(keys, time.time()) if self._log_epoch == self._epoch == epoch else 0

    def read(
        self, keys: Sequence[bytes], epoch: int, local: PagedMemory, pages: np.ndarray, deadline: Deadline
    ) -> TransferReport:
        """Read blocks into `pages` of `local`, which is host memory, and prove them; the report counts leading ones.

        Everything read is checked against the digest that was written with it, and the epoch is asked for at the end.
        """
        began = time.perf_counter()
        log, good = self._log, 0
        try:
            if log is not None and not self._off and self._log_epoch == epoch:
                for key, page in zip(keys, pages.tolist(), strict=True):
                    if deadline.expired or not log.read(key, local.views(page)):
                        break
                    good += 1
                self._count_damage(log)
            if good and self._core.registry.epoch(self._namespace.digest) != epoch:
                good = 0
        except RegistryError:
            good = 0
        except OSError as error:
            self._fail("read", error)
            good = 0
        if good:
            self._metrics.add_labelled("tier_blocks", "tier", "disk", good)
        seconds = time.perf_counter() - began
        return TransferReport("disk", "preadv", good, good * self._page_bytes, seconds, seconds, tier="disk")

    def _count_damage(self, log: DiskLog) -> None:
        damaged, log.damaged = log.damaged, 0
        if damaged:
            self._metrics.add(disk_blocks_damaged=damaged)
            events.warning(
                "disk_damaged", "blocks on disk were not what was written, and are not served", blocks=damaged
            )

    # ---- writing

    def lend(self, region: LentRegion) -> None:
        """Say where the pages are that `write` names."""
        self._region = region

    def write(
        self, keys: Sequence[bytes], parents: Sequence[bytes | None], pages: Sequence[int], epoch: int, ttl_s: float = 0
    ) -> None:
        """Have published pages of the region written behind, unless they change before. Does no I/O."""
        region, log = self._region, self._log
        if region is None or self._off:
            return
        self.notice(epoch)
        expires = int(time.time() + ttl_s) + 1 if ttl_s else 0
        generations = region.generations.values[list(pages)].tolist()
        for key, parent, page, generation in zip(keys, parents, pages, generations, strict=True):
            if generation & 1 or (log is not None and key in log):
                continue
            try:
                self._queue.put_nowait(_Write(key, parent, page, generation, epoch, expires))
            except queue.Full:
                self._metrics.add(disk_blocks_dropped=1)

    def withdraw(self, keys: Sequence[bytes]) -> None:
        """Remove blocks: at once from what is read, soon from the files."""
        wanted = list(keys)

        def remove(log: DiskLog) -> None:
            log.forget(wanted)

        self._put(remove)

    def notice(self, epoch: int) -> None:
        """Remove everything if the namespace is in another epoch by now; `epoch` is what somebody took it to be.

        What is written from then on is not read after a restart: nobody can say then which weights computed it.
        """
        if epoch != self._epoch and (hint := self._core.epoch_hint()) and hint != self._epoch:
            self._epoch = hint
            self._put(lambda _: None)  # wakes the thread, which clears the log before it does anything else

    def _put(self, work: Callable[[DiskLog], None]) -> None:
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            events.debug("disk_busy", "the disk's thread has much to do")

    def promote(self, take: Callable[[Sequence[StoredBlock], PagedMemory, int], int], count: int) -> None:
        """Once the log is open, hand up to `count` of its newest blocks to `take`, with their pages and the epoch."""

        def work(log: DiskLog) -> None:
            blocks = [block for block in log.newest(count) if not block.expires]
            for start in range(0, len(blocks), PROMOTED_BATCH):
                if self._closing.is_set():
                    return
                batch = blocks[start : start + PROMOTED_BATCH]
                pages = np.empty((len(batch), self._page_bytes), np.uint8)
                good = [row for row, block in enumerate(batch) if log.read(block.key, [pages[row]])]
                taken = take([batch[row] for row in good], PagedMemory.packed(pages[good]), self._log_epoch)
                self._metrics.add(disk_blocks_promoted=taken)
            self._count_damage(log)

        self._put(work)

    # ---- the thread

    def _run(self) -> None:
        try:
            while not self._closing.is_set() and not self._open():
                self._opened.set()  # nobody waits for a registry that is away
                self._closing.wait(RETRY_S)
        except (OSError, KVMarketError, ValueError) as error:
            self._fail("opened", error)
        self._opened.set()
        while (job := self._queue.get()) is not None:
            log = self._log
            if log is None or self._off:
                continue
            try:
                if self._log_epoch != self._epoch:
                    epoch = self._epoch
                    log.clear(os.urandom(16))
                    self._log_epoch = epoch
                if isinstance(job, _Write):
                    self._write(log, job)
                else:
                    job(log)
                self._metrics.level(disk_bytes=log.nbytes, disk_blocks=len(log))
            except (OSError, KVMarketError) as error:
                self._fail("written to", error)

    def _open(self) -> bool:
        """Open the log; False while the registry cannot say which epoch it is."""
        config, space = self._core.config, self._namespace
        try:
            epoch = self._core.registry.epoch(space.digest)  # before the token: who bumps renews the token first
        except RegistryUnavailableError:
            return False
        directory = namespace_directory(config.disk_directory, space)
        self._place = Place(directory)
        token = read_epoch(directory)
        prune(config.disk_directory, self._place.path, config.disk_bytes)
        parts = [token, space.digest, space.spec.fingerprint, config.verify.encode()]
        if not self._core.registry.local:  # its epochs outlive processes, and others than this host's may bump them
            parts.append(epoch.to_bytes(8, "big"))
        identity = hashlib.sha256(b"kvmarket.disk.1" + b"".join(parts)).digest()[:16]
        log = DiskLog(self._place.path, config.disk_bytes, self._page_bytes, identity)
        self._count_damage(log)
        self._metrics.level(disk_bytes=log.nbytes, disk_blocks=len(log))
        self._log_epoch = epoch
        self._epoch = self._epoch or epoch
        self._log = log
        return True

    def _write(self, log: DiskLog, job: _Write) -> None:
        region = self._region
        if region is None or job.epoch != self._log_epoch or job.key in log:
            return
        values, page = region.generations.values, np.array([job.page], np.int64)
        local = PagedMemory.packed(self._scratch)
        copy_pages(region.pages, page, local, np.zeros(1, np.int64))
        memory_fence()  # the generation is looked at after the bytes
        if int(values[job.page]) != job.generation:  # evicted meanwhile, and maybe torn: it was never written
            self._metrics.add(disk_blocks_missed=1)
            return
        (digest,) = page_digests(local, np.zeros(1, np.int64))
        log.append(StoredBlock(job.key, job.parent, digest, job.expires), self._scratch[0])
        self._metrics.add(disk_blocks_written=1)

    def _fail(self, what: str, error: Exception) -> None:
        """Switch the tier off."""
        self._metrics.add(disk_errors=1)
        if not self._off:
            events.warning("disk_off", "the disk tier is off", could_not_be=what, error=error)
        self._off = True

    def flush(self, deadline: Deadline) -> bool:
        """Wait until everything asked for so far is written; False when the deadline passes first."""
        done = threading.Event()
        try:
            self._queue.put(lambda _: done.set(), timeout=deadline.remaining_s)
        except queue.Full:
            return False
        return done.wait(deadline.remaining_s)

    def close(self) -> None:
        """Write what waits, within seconds, and end. Call it before the region's pages are unreadable. Idempotent."""
        if self._closing.is_set() or self._pid != os.getpid():  # in a forked child all of it is the parent's
            return
        end = time.monotonic() + FLUSH_S_MAX
        while self._queue.qsize() and not self._off and self._log is not None and time.monotonic() < end:
            time.sleep(0.001)
        self._closing.set()
        self._off = True  # what still waits is passed over
        self._queue.put(None)
        self._thread.join()
        if self._log is not None:
            self._log.close()
        if self._place is not None:
            self._place.close()
