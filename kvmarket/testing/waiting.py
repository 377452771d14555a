"""Waiting in tests for what another process or thread does, and not for ever."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

LIMIT_S = 20.0
POLL_S = 0.05


def until(check: Callable[[], T], what: str, limit_s: float = LIMIT_S) -> T:
    """Call `check` until it returns something true, and return that.

    Raises:
        AssertionError: it did not within `limit_s`; the message says what was waited for.
    """
    end = time.monotonic() + limit_s
    while not (found := check()):
        assert time.monotonic() < end, f"not within {limit_s} s: {what}"
        time.sleep(POLL_S)
    return found
