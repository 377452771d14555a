"""The log of kvmarket: lines with fields, each kind at most so many times a minute.

What peers and servers do can make the same line again and again; the first few say it, the next one that is due says
how many were left out. Lines go to Python's `logging` under the module's name; where they end is the application's.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PER_MINUTE = 6
"""Lines of one kind within `WINDOW_S`."""
WINDOW_S = 60.0
KINDS_MAX = 256
"""Kinds told apart in one log; they are written in the code, so only a mistake makes more."""
FIELD_CHARS_MAX = 300
WHERE_FRAMES = 4
FORMATS = ("text", "json")


class Limiter:
    """Which lines are due. Thread-safe; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._kinds: dict[str, tuple[float, int, int]] = {}  # since when, how many since then, how many left out

    def admits(self, kind: str) -> int | None:
        """Return how many lines of this kind were left out before this one, or None where this one is, too."""
        now = self._clock()
        with self._lock:
            if kind not in self._kinds and len(self._kinds) >= KINDS_MAX:
                kind = ""
            since, count, left_out = self._kinds.get(kind, (now, 0, 0))
            if now - since >= WINDOW_S:
                since, count = now, 0
            if count >= PER_MINUTE:
                self._kinds[kind] = (since, count, left_out + 1)
                return None
            self._kinds[kind] = (since, count + 1, 0)
            return left_out


class _Format:
    """How all lines of this process are written; one for the process, as `logging` itself is."""

    name = "text"


def set_format(name: str) -> None:
    """Write lines as ``text`` with ``key=value`` after it, or as ``json``, one object a line."""
    _Format.name = name


class Log:
    """Lines of one module.

    Args:
        name: of the logger of `logging`.
        limiter: for tests with a clock of their own.
    """

    def __init__(self, name: str, limiter: Limiter | None = None) -> None:
        self._logger, self._limiter = logging.getLogger(name), limiter or Limiter()

    def debug(self, kind: str, message: str, **fields: object) -> None:
        """Write a line for who looks for a fault; costs next to nothing while nobody does."""
        self._write(logging.DEBUG, kind, message, fields)

    def info(self, kind: str, message: str, **fields: object) -> None:
        """Write a line that is no reason to worry."""
        self._write(logging.INFO, kind, message, fields)

    def warning(self, kind: str, message: str, **fields: object) -> None:
        """Write a line about something that costs hits.

        Args:
            kind: a short name of what happened, written in the code: the limit is per kind.
            message: a sentence for people, the same for every line of the kind.
            fields: what differs from line to line.
        """
        self._write(logging.WARNING, kind, message, fields)

    def error(self, kind: str, message: str, **fields: object) -> None:
        """Write a line about something that does not work."""
        self._write(logging.ERROR, kind, message, fields)

    def _write(self, level: int, kind: str, message: str, fields: dict[str, object]) -> None:
        if not self._logger.isEnabledFor(level):
            return
        left_out = self._limiter.admits(kind)
        if left_out is None:
            return
        if left_out:
            fields["left_out"] = left_out
        self._logger.log(level, "%s", line(kind, message, fields), stacklevel=3)


def line(kind: str, message: str, fields: dict[str, object]) -> str:
    """Return one line: the text cannot break it or look like other fields, whoever it comes from."""
    if _Format.name == "json":
        plain = {name: value if isinstance(value, int | float) else _short(value) for name, value in fields.items()}
        return json.dumps({"event": f"kvmarket.{kind}", "message": message, **plain})
    return " ".join([f"kvmarket: {message}", *(f"{name}={_quoted(value)}" for name, value in fields.items())])


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= FIELD_CHARS_MAX else text[:FIELD_CHARS_MAX] + "..."


def _quoted(value: object) -> str:
    text = _short(value)
    plain = text.isprintable() and not any(char in text for char in ' "=')
    return text if plain and text else json.dumps(text, ensure_ascii=not text.isprintable())


def where(error: BaseException) -> str:
    """Return where an error that nobody expected was raised: the innermost frames, as ``file:line``."""
    frames = traceback.extract_tb(error.__traceback__)[-WHERE_FRAMES:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
