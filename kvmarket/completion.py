"""Has that work on the GPU ended? One question for events and streams of torch and cupy, without importing either."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmarket.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable


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
