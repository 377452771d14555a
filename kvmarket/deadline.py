"""One deadline for one operation, handed down to everything it calls, and the flag that ends it early."""

from __future__ import annotations

import time

from kvmarket.errors import InvalidInputError

SECONDS_MAX = 86_400.0


class Deadline:
    """A point in time on the monotonic clock that may also be cancelled. Thread-safe.

    Args:
        seconds: from now, within [0, `SECONDS_MAX`].

    Raises:
        InvalidInputError: `seconds` is not such a number; not a number and infinity would never pass.
    """

    __slots__ = ("_at", "_cancelled")

    def __init__(self, seconds: float) -> None:
        try:
            valid = 0 <= seconds <= SECONDS_MAX
        except TypeError:
            valid = False
        if not valid:
            raise InvalidInputError(f"a deadline must be within [0, {SECONDS_MAX:g}] seconds, not {seconds!r}")
        self._at = time.monotonic() + seconds
        self._cancelled = False  # set once, by one store, and looked at: nobody waits for it

    def cancel(self) -> None:
        """Make it expire now."""
        self._cancelled = True

    @property
    def expired(self) -> bool:
        """True once the time has passed or `cancel` was called."""
        return self._cancelled or time.monotonic() >= self._at

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return 0.0 if self._cancelled else max(0.0, self._at - time.monotonic())
