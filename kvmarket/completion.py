"""Has that work on the GPU ended? One question for events and streams of torch and cupy, without importing either."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from kvmarket.errors import InvalidInputError
from kvmarket.logs import Log

if TYPE_CHECKING:
    from collections.abc import Callable

events = Log(__name__)

KERNELS_S_MAX = 60.0
"""Pages whose kernels have not ended by then are not published."""
POLL_S, POLL_S_MAX = 0.0001, 0.002
"""Whether kernels have ended is asked this often at first, and ever more rarely: asking takes time from the engine."""


def completion(after: Any) -> Callable[[], bool]:
    """Return a function that tells whether `after` has passed, without waiting.

    Args:
        after: a recorded event of torch or cupy; a stream of either, which means the work that it holds now; or a
            function that returns True once the work has ended.

    Raises:
        InvalidInputError: it is none of these.
    """
    if hasattr(after, "record_event"):  # torch's stream
        return completion(after.record_event())
    if hasattr(after, "launch_host_func"):  # cupy's stream
        return completion(after.record())
    if hasattr(after, "query"):  # torch's event
        return lambda: bool(after.query())
    if hasattr(after, "done") and hasattr(after, "synchronize"):  # cupy's event
        return lambda: bool(after.done)
    if callable(after):
        return lambda: bool(after())
    raise InvalidInputError(f"expected a CUDA event or stream of torch or cupy, not {type(after).__name__}")


def has_ended(after: Callable[[], bool], given_up: Callable[[], bool]) -> bool:
    """Wait for kernels; False when they do not end in time, fail, or nobody is interested any more.

    Args:
        after: what `completion` returned.
        given_up: True once nobody is interested.
    """
    limit, pause = time.monotonic() + KERNELS_S_MAX, POLL_S
    try:
        while not after():
            if given_up() or time.monotonic() > limit:
                return False
            time.sleep(pause)
            pause = min(2 * pause, POLL_S_MAX)
    except RuntimeError as error:  # what torch and cupy make of CUDA's errors
        events.warning("kernels_failed", "blocks are not announced, their kernels failed", error=error)
        return False
    return True
