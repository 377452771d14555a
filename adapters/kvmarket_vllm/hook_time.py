"""What the connector costs the engine: the time that one role's hooks take of the engine's thread."""

from __future__ import annotations

import time
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmarket_vllm.stats import Deltas, MarketStats

T = TypeVar("T")
Hook = TypeVar("Hook", bound="Callable[..., Any]")

TELL_S = 1.0
"""Steps in which nothing else happened tell their time together, this often: telling costs more than such a step."""


class HookTime:
    """Steps and seconds of one role, since its start. Used from the engine's thread only.

    Attributes:
        steps: engine steps that the role took part in.
        seconds: spent in its hooks in all, loads that run on the engine's thread included, and those hooks left out
            that saw at once that they had nothing to do.
    """

    def __init__(self, role: str) -> None:
        self.role, self.steps, self.seconds = role, 0, 0.0
        self._told = (0, 0.0)
        self._tell_at = 0.0

    def take(self, deltas: Deltas) -> MarketStats | None:
        """Take `deltas` and the time that came since the last time: if there are any, or a second is over."""
        now = time.monotonic()
        if not deltas.pending and now < self._tell_at:
            return None
        steps, seconds = self.steps - self._told[0], self.seconds - self._told[1]
        self._told, self._tell_at = (self.steps, self.seconds), now + TELL_S
        if steps:
            deltas.add_labelled("hook_steps", self.role, steps)
            deltas.add_labelled("hook_seconds", self.role, seconds)
        return deltas.take()

    def call(self, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call what a hook has to do, and count the time it takes, also when it fails."""
        began = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - began


def timed(hook: Hook) -> Hook:
    """Count the time that a connector's method takes in its `hook_time`."""

    @wraps(hook)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.hook_time.call(hook, self, *args, **kwargs)

    return cast("Hook", counted)
