"""Where a process's disk tier lies: a directory of its own that one process at a time holds, and the namespace's epoch.

<root>/<tag of the namespace>/epoch        16 random bytes; others when the namespace was told to forget
<root>/<tag of the namespace>/<n>/lock     held by the process that uses this log
<root>/<tag of the namespace>/<n>/*.seg    its segments
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from kvmarket.identity import Namespace

PLACES_MAX = 64
"""Processes of one namespace that may have a log under one root at a time."""
EPOCH_BYTES = 16
_PLACE = re.compile(r"[0-9a-f]{32}/[0-9]+")


def namespace_directory(root: Path, namespace: Namespace) -> Path:
    """Return the directory of a namespace; its name does not give the namespace's digest away."""
    return root / hashlib.sha256(b"kvmarket.disk.1" + namespace.digest).hexdigest()[:32]


def read_epoch(directory: Path) -> bytes:
    """Return what a namespace's logs must have been written under to be served; makes it when there is none yet."""
    path = directory / "epoch"
    with suppress(FileNotFoundError):
        if len(found := path.read_bytes()) == EPOCH_BYTES:
            return found
    return renew_epoch(directory)


def renew_epoch(directory: Path) -> bytes:
    """Make every log of a namespace worthless to whoever opens it later. Raises OSError."""
    epoch = os.urandom(EPOCH_BYTES)
    draft = directory / f"epoch.{os.getpid()}.{epoch.hex()}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, epoch)
        os.fsync(fd)  # the one thing here that a power cut must not undo
    finally:
        os.close(fd)
    draft.rename(directory / "epoch")
    _sync(directory)
    return epoch


def forget_on_disk(root: Path, namespace: Namespace) -> None:
    """Renew the epoch of a namespace that has logs under `root`. Raises OSError."""
    directory = namespace_directory(root, namespace)
    if directory.is_dir():
        renew_epoch(directory)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Place:
    """A directory for one log, held until `close` or the end of this process.

    Args:
        directory: of the namespace; made if it is not there.

    Raises:
        OSError: it cannot be used, or `PLACES_MAX` others use theirs.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.stat()
        if info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise PermissionError(f"{directory} belongs to another user, or others may write to it")
        for number in range(PLACES_MAX):
            path = directory / str(number)
            path.mkdir(mode=0o700, exist_ok=True)
            fd = _lock(path)
            if fd is not None:
                self.path, self._fd = path, fd
                return
        raise OSError(f"{PLACES_MAX} processes have a log in {directory} already")

    def close(self) -> None:
        """Let another process have it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _lock(place: Path) -> int | None:
    fd = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def prune(root: Path, keep: Path, bytes_max: int) -> int:
    """Remove logs under `root` that nobody holds, the oldest first, until they have at most `bytes_max`; `keep` stays.

    Returns how many were removed. Models come and go; what is left of them must not fill the disk.
    """
    left: list[tuple[float, int, Path]] = []
    for place in root.glob("*/*/"):
        if not _PLACE.fullmatch(f"{place.parent.name}/{place.name}") or place == keep:
            continue
        sizes = [(item.stat().st_mtime, item.stat().st_size) for item in place.glob("*.seg")]
        if sizes:
            left.append((max(when for when, _ in sizes), sum(nbytes for _, nbytes in sizes), place))
    total, removed = sum(nbytes for _, nbytes, _ in left), 0
    for _, nbytes, place in sorted(left):
        if total <= bytes_max:
            break
        fd = _lock(place)
        if fd is not None:
            for path in place.glob("*.seg"):
                path.unlink(missing_ok=True)
            os.close(fd)
            removed += 1
        total -= nbytes  # what somebody holds is bounded by its holder
    return removed
