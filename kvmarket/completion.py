"""Has that work on the GPU ended? One question for events and streams of torch and cupy, without importing either."""

from __future__ import annotations

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


def has_ended(after: Callable[[], bool]) -> bool | None:
    """Ask whether kernels have ended: True, None while they run, False when they failed.

    Args:
        after: what `completion` returned.
    """
    try:
        return True if after() else None
    except RuntimeError as error:  # what torch and cupy make of CUDA's errors
        events.warning("kernels_failed", "blocks are not announced, their kernels failed", error=error)
        return False
