"""Who has a registry file open: the first of them makes it anew.

With nobody left, a registry names only blocks of the dead, and whatever happened to the file meanwhile, such as a crash
half-way through a write or a full disk, must not reach lmdb, which aborts the process on a damaged page.
"""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING

from kvmarket.errors import RegistryProtocolError, RegistryUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FORMAT = 1
"""Major version of the registry file."""
_MARK = b"kvmarket registry "
_MARK_MAX = 64


class RegistryUsers:
    """This process as one of the users of a registry, by a shared lock on a file that outlives them all.

    The lock belongs to the open file and so dies with the process. A forked child closes its copy, see
    `kvmarket.registry.lmdb_file`.

    Args:
        path: the lock file; it also says which format the registry has.
        wait_s: how long to wait for another process that is making the registry anew.
    """

    def __init__(self, path: Path, wait_s: float) -> None:
        self.path, self._wait_s = path, wait_s
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._ours = self._is_ours()
        except BaseException:
            self.close()
            raise

    def join(self, stale: Iterable[Path]) -> None:
        """Become a user; the files `stale` are removed first if nobody else is one, and this was a registry of ours.

        Raises:
            RegistryUnavailableError: another process kept the exclusive lock for `wait_s`.
        """
        if self._ours and self._lock(fcntl.LOCK_EX):
            for path in stale:
                path.unlink(missing_ok=True)
        # To share it, the kernel gives the lock up first. Another process may make the registry anew in between; it is
        # opened by nobody before this lock is held.
        end = time.monotonic() + self._wait_s
        while not self._lock(fcntl.LOCK_SH):
            if time.monotonic() >= end:
                raise RegistryUnavailableError(f"{self.path}: another process has been starting for {self._wait_s:g} s")
            time.sleep(0.001)

    def mark(self) -> None:
        """Note that the registry is one of ours, of this format."""
        if not self._ours:
            os.pwrite(self._fd, _MARK + b"%d\n" % FORMAT, 0)

    def _is_ours(self) -> bool:
        text = os.pread(self._fd, _MARK_MAX, 0)
        if not text.startswith(_MARK):
            return False
        version = text.removeprefix(_MARK).strip()
        if version != b"%d" % FORMAT:
            raise RegistryProtocolError(
                f"{self.path.parent} was made by another kvmarket: version {version.decode(errors='replace')} of the "
                f"registry, where this one knows {FORMAT}; use another KVMARKET_RUNTIME_DIR, or remove it"
            )
        return True

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Leave. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
