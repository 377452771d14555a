"""Run commands so that a person sees what goes on: lasting lines, a heartbeat, the real error at the end."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

BEAT_TTY_S = 1.0
BEAT_LOG_S = 8.0
TAIL_LINES = 25
NOISE = (
    "is ignored: it is neither a file nor a directory",  # local package folders that lack this one package
    "[notice]",
    "Ignoring invalid distribution",  # leftovers of an interrupted removal, which a repair takes away
)


class SetupError(Exception):
    """Something that the person who ran the set-up can act on; the message says how."""


class StepFailedError(SetupError):
    """A command failed or ran out of time.

    Attributes:
        output: the lines that it printed, noise left out.
    """

    def __init__(self, message: str, output: Sequence[str]) -> None:
        super().__init__(message)
        self.output = list(output)


class Console:
    """Progress lines: a status line that is rewritten on a terminal, a heartbeat line elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._tty = self._stream.isatty()
        self.beat_s = BEAT_TTY_S if self._tty else BEAT_LOG_S

    def line(self, text: str) -> None:
        """Print a lasting line."""
        print(("\r\x1b[K" if self._tty else "") + text, file=self._stream, flush=True)

    def beat(self, seconds: float, doing: str) -> None:
        """Print a line that, on a terminal, the next one replaces."""
        text = f"      {seconds:4.0f} s  {doing[:100]}"
        if self._tty:
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[K" + text[:width], end="", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)


def clean_environ(environ: dict[str, str]) -> dict[str, str]:
    """Copy an environment without what makes pip see or change packages outside its own .venv."""
    stray = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_REQUIRE_VIRTUALENV"}
    kept = {name: value for name, value in environ.items() if name not in stray}
    return kept | {"PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@dataclass
class Runner:
    """Runs commands with a heartbeat and a deadline, and logs all that they print.

    Attributes:
        console: where progress goes.
        log: file that every line is appended to.
        cwd: directory that commands run in.
        limit_s: the longest that one command may take.
        keep_fds: descriptors that commands inherit; a lock among them stays held by one that outlives us.
    """

    console: Console
    log: Path
    cwd: Path
    limit_s: float
    keep_fds: tuple[int, ...] = ()
    environ: dict[str, str] = field(default_factory=lambda: clean_environ(dict(os.environ)))

    def run(self, what: str, command: Sequence[str | Path], describe: Callable[[str], str] = str) -> list[str]:
        """Run one command to its end.

        Args:
            what: its name in errors.
            command: program and arguments.
            describe: turns the last line it printed into what a heartbeat says.

        Returns:
            The lines that it printed, noise left out.

        Raises:
            StepFailedError: it failed, or was stopped because it ran past `limit_s`.
        """
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=self.cwd,
            env=self.environ,
            pass_fds=self.keep_fds,
        )
        try:
            output = self._follow(process, what, describe)
        except BaseException:  # an interrupt too must not leave a pip behind that goes on by itself
            stop(process)
            raise
        if process.returncode:
            raise StepFailedError(f"{what} failed (exit status {process.returncode})", output)
        return output

    def _follow(self, process: subprocess.Popen[str], what: str, describe: Callable[[str], str]) -> list[str]:
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=pump, args=(process.stdout, lines), daemon=True).start()
        output: list[str] = []
        began = time.monotonic()
        next_beat = began + self.console.beat_s
        with self.log.open("a") as log:
            while (now := time.monotonic()) - began <= self.limit_s:
                if now >= next_beat:
                    self.console.beat(now - began, describe(output[-1].strip()) if output else "starting")
                    next_beat = now + self.console.beat_s
                try:
                    text = lines.get(timeout=next_beat - now)
                except queue.Empty:
                    continue
                if text is None:
                    process.wait(timeout=30)
                    return output
                if text.strip() and not any(noise in text for noise in NOISE):
                    output.append(text.rstrip())
                    print(output[-1], file=log, flush=True)
        raise StepFailedError(f"{what} was stopped: it took longer than {self.limit_s:.0f} s", output)


def pump(stream: TextIO, lines: queue.SimpleQueue[str | None]) -> None:
    """Hand on what a process prints, line by line, then close the stream and hand on None."""
    with stream:
        for text in stream:
            lines.put(text)
    lines.put(None)


def stop(process: subprocess.Popen[str]) -> None:
    """Stop a child; pip may need a moment to put back what it was replacing."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=10)


def explain(error: SetupError, log: Path) -> list[str]:
    """Say what went wrong: the last lines of the command that failed, then our own words."""
    lines = []
    if isinstance(error, StepFailedError):
        lines += [f"  | {text}" for text in error.output[-TAIL_LINES:]]
        if any("No space left on device" in text for text in error.output):
            lines.append("setup: the disk is full (pip also writes to TMPDIR and to its cache)")
        lines.append(f"setup: all that was printed is in {os.path.relpath(log)}")
    return [*lines, f"setup: {error}"]
