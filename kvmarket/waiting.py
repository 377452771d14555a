"""Waiting for futures that outlive whoever waits for them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any


def retrieve(future: asyncio.Future[Any]) -> None:
    """Look at the result, so that asyncio does not report the error of a future that nobody waits for any more."""
    if not future.cancelled():
        future.exception()


async def drain(future: asyncio.Future[Any]) -> None:
    """Wait for a future to end whatever happens, further cancellations included."""
    while not future.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({future})
