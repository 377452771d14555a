"""Work that waits for kernels: each piece is asked about by itself, so that none waits for another's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from kvmarket.completion import KERNELS_S_MAX, POLL_S, POLL_S_MAX, has_ended

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@dataclass(eq=False)
class _Waiting(Generic[T]):
    number: int
    item: T
    ended: Callable[[], bool]
    ask_at: float
    give_up_at: float
    pause_s: float = POLL_S


class Pending(Generic[T]):
    """Items that are not due yet, in order of arrival. For one thread."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting[T]] = []
        self._added = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: T, ended: Callable[[], bool], delay_s: float = 0.0) -> None:
        """Keep `item` until `ended` returns True, which is not asked before `delay_s` from now."""
        ask_at = time.monotonic() + delay_s
        self._added += 1
        self._waiting.append(_Waiting(self._added, item, ended, ask_at, ask_at + KERNELS_S_MAX))

    def all_present(self) -> Callable[[], bool]:
        """Return what tells whether all that wait now have been taken."""
        last = self._added
        return lambda: not self._waiting or self._waiting[0].number > last

    @property
    def wait_s(self) -> float | None:
        """Seconds until something is to be asked about, or None with nothing waiting."""
        if not self._waiting:
            return None
        return max(0.0, min(each.ask_at for each in self._waiting) - time.monotonic())

    def take_ended(self) -> list[tuple[T, bool]]:
        """Return what need not wait any longer, in order, and whether it ended well: not if it failed or took too long.

        Who has not ended is asked again ever more rarely: asking takes time from the engine.
        """
        taken: list[tuple[T, bool]] = []
        for each in list(self._waiting):
            now = time.monotonic()
            if now < each.ask_at:
                continue
            ended = has_ended(each.ended)
            if ended is None and now < each.give_up_at:
                each.ask_at, each.pause_s = now + each.pause_s, min(2 * each.pause_s, POLL_S_MAX)
                continue
            self._waiting.remove(each)
            taken.append((each.item, bool(ended)))
        return taken

    def take_all(self) -> list[T]:
        """Return everything, because nobody is interested any more."""
        taken = [each.item for each in self._waiting]
        self._waiting.clear()
        return taken
