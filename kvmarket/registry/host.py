"""Which process is this, and does that other one still run: owners' locks that die with their process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import threading
from pathlib import Path

from kvmarket.errors import RegistryUnavailableError
from kvmarket.identity import OwnerInfo

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_QUERY = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
PROBES_MAX = 64
"""Lock files of other owners that are kept open: who is asked for with every fetch is asked with one system call."""


def boot_id() -> str:
    """Return the identity of the running kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> int:
    """Return the identity of this process's PID namespace."""
    return Path("/proc/self/ns/pid").stat().st_ino


def this_process(owner: int, incarnation: bytes) -> OwnerInfo:
    """Describe this process as owner number `owner`."""
    return OwnerInfo(owner, incarnation, os.getpid(), pid_namespace(), boot_id(), socket.gethostname())


def lock_holder(fd: int) -> int | None:
    """Return the process that holds a lock on an open file, or None; 0 for one of another PID namespace.

    Locks of this very process do not count.
    """
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, _QUERY))
    return int(pid) if kind != fcntl.F_UNLCK else None


class OwnerLocks:
    """One lock file per owner in `directory`. The kernel drops the lock when the process dies, however it dies.

    POSIX record locks are used because a forked child does not inherit them: a child that outlives its parent does not
    keep the parent alive. Their one trap, that closing any descriptor of the file drops the lock, is avoided by never
    opening the lock file of an owner of this very process.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mutex = threading.Lock()
        self._held: dict[int, tuple[int, int]] = {}
        self._probes: dict[int, int] = {}

    def _path(self, owner: int) -> Path:
        return self._directory / f"{owner}.lock"

    def acquire(self, owner: int) -> None:
        """Hold the lock of `owner` until `release` or the end of this process."""
        path = self._path(owner)
        draft = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
        fd = -1
        try:
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.rename(path)  # appears locked: nobody ever sees a live owner's file unlocked
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise RegistryUnavailableError(f"cannot lock {path}: {error}") from error
        with self._mutex:
            self._held[owner] = (os.getpid(), fd)

    def release(self, owner: int) -> None:
        """Drop the lock and its file. Idempotent."""
        with self._mutex:
            pid, fd = self._held.pop(owner, (0, -1))
        if fd >= 0 and pid == os.getpid():
            self.forget(owner)
            os.close(fd)

    def forget(self, owner: int) -> None:
        """Remove the file of an owner that is gone."""
        with contextlib.suppress(FileNotFoundError):
            self._path(owner).unlink()

    def alive(self, owner: int) -> bool:
        """Tell whether the process that holds `owner`'s lock still runs. Takes no lock itself.

        Raises:
            RegistryUnavailableError: it cannot be told, e.g. without a free file descriptor. That is no proof of death.
        """
        with self._mutex:  # nothing here waits, and no other thread may close a probe while it is asked
            held = self._held.get(owner)
            if held is not None and held[0] == os.getpid():
                return True
            try:
                return self._locked(owner)
            except FileNotFoundError:
                return False
            except OSError as error:
                raise RegistryUnavailableError(f"cannot tell whether owner {owner} is alive: {error}") from error

    def _locked(self, owner: int) -> bool:
        """Ask the lock file that was open already, and where that is not locked, the one that has its name now."""
        fd = self._probes.get(owner, -1)
        if fd >= 0:
            if lock_holder(fd) is not None:
                return True
            os.close(self._probes.pop(owner))
        fd = os.open(f"{self._directory}/{owner}.lock", os.O_RDWR | os.O_CLOEXEC)  # asked often: without pathlib
        locked = False
        try:
            locked = lock_holder(fd) is not None
        finally:
            if not locked:
                os.close(fd)
        if locked:
            while len(self._probes) >= PROBES_MAX:
                os.close(self._probes.pop(next(iter(self._probes))))
            self._probes[owner] = fd
        return locked

    def close(self) -> None:
        """Close the files of other owners that are kept open; not in a forked child."""
        with self._mutex:
            while self._probes:
                os.close(self._probes.popitem()[1])

    def owners_on_disk(self) -> list[int]:
        """Return the owners that have a lock file."""
        return [int(path.stem) for path in self._directory.glob("*.lock") if path.stem.isdigit()]

    def remove_drafts(self) -> None:
        """Remove files that a process killed inside `acquire` left behind."""
        for path in self._directory.glob("*.tmp"):
            _owner, pid, *_ = (*path.name.split("."), "")
            if pid.isdigit() and not Path(f"/proc/{pid}").exists():
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
