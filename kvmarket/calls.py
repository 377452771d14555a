"""Work on threads that asyncio waits for: within deadlines, and never leaving a caller's memory in use behind."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from kvmarket.errors import DeadlineExceededError
from kvmarket.waiting import drain, retrieve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from kvmarket.deadline import Deadline

T = TypeVar("T")


class Calls:
    """The threads of one marketplace and the calls that run on them. For one event loop.

    Args:
        concurrency: reading threads, and calls of `read` that run at once; more wait.
        require_open: raises where no more calls are taken.

    Attributes:
        readers: threads that read.
        writer: the thread that publishes; one, so that what it does is in order.
    """

    def __init__(self, concurrency: int, require_open: Callable[[], None]) -> None:
        self.readers = ThreadPoolExecutor(concurrency, "kvmarket-read")
        self.writer = ThreadPoolExecutor(1, "kvmarket-publish")
        self._require_open = require_open
        self._slots = asyncio.Semaphore(concurrency)
        self._running: set[asyncio.Future[Any]] = set()

    async def end(self) -> None:
        """Wait for the calls that run."""
        if self._running:
            await asyncio.wait(set(self._running))

    def shut_down(self) -> None:
        """End the threads."""
        self.readers.shutdown(wait=True)
        self.writer.shutdown(wait=True)

    async def write(self, work: Callable[[], T], limit: Deadline, *, borrowed: bool = False) -> T:
        """Run `work` on the publishing thread; see `run`."""
        return await self.run(self.writer, work, limit, borrowed=borrowed)

    async def read(self, work: Callable[[], T], limit: Deadline) -> T:
        """Run `work`, which fills a caller's memory, on a reading thread; raises `DeadlineExceededError`."""
        try:
            if self._slots.locked():
                async with asyncio.timeout(limit.remaining_s):
                    await self._slots.acquire()
            else:
                await self._slots.acquire()  # does not wait
        except TimeoutError as error:
            raise DeadlineExceededError("too many fetches were running") from error
        try:
            return await self.run(self.readers, work, limit, borrowed=True)
        finally:
            self._slots.release()

    @contextlib.asynccontextmanager
    async def begun(self) -> AsyncIterator[None]:
        """Count what the event loop does itself as a call of `read`; not where calls are `full`."""
        await self._slots.acquire()  # does not wait where `full` is false
        ended = asyncio.get_running_loop().create_future()
        self._running.add(ended)
        try:
            yield
        finally:
            self._slots.release()
            self._running.discard(ended)
            ended.set_result(None)

    async def go_on(self, work: Callable[[], T], limit: Deadline) -> T:
        """Have a reading thread end what fills a caller's memory already, within `begun`. See `run`."""
        return await self.run(self.readers, work, limit, borrowed=True, begun=True)

    @property
    def full(self) -> bool:
        """True when as many calls of `read` and `begun` run as may run at once."""
        return self._slots.locked()

    async def run(
        self,
        pool: ThreadPoolExecutor,
        work: Callable[[], T],
        limit: Deadline,
        *,
        borrowed: bool = False,
        begun: bool = False,
    ) -> T:
        """Run `work` on a thread of `pool`.

        Args:
            pool: where.
            work: what to call.
            limit: raise `DeadlineExceededError` when it passes. Work that has not begun by then never will.
            borrowed: `work` touches the caller's memory. Once it has begun it is waited for, whatever happens; it must
                end soon after `limit` does, which a cancellation of the caller brings forward.
            begun: `work` goes on with what touches that memory already: it is waited for in any case, and runs although
                no more calls are taken.
        """
        if not begun:
            self._require_open()
        job = pool.submit(work)
        future = asyncio.wrap_future(job)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        try:
            await wait_for(future, limit, give_up=lambda: not begun and (job.cancel() or not borrowed))
        except asyncio.CancelledError:
            limit.cancel()
            if begun or not job.cancel():
                await drain(future)
            raise
        return future.result()


async def wait_for(future: asyncio.Future[Any], limit: Deadline, give_up: Callable[[], bool] = lambda: True) -> None:
    """Wait for `future`; raise its error, or `DeadlineExceededError` when `limit` passes and `give_up` agrees."""
    future.add_done_callback(retrieve)
    await asyncio.wait({future}, timeout=limit.remaining_s)
    if not future.done() and not give_up():
        await asyncio.wait({future})
    if not future.done():
        raise DeadlineExceededError("not done before the deadline: the registry or the threads are busy")
    future.result()
