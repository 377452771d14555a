"""Host memory that other processes can map, and that vanishes with the process that made it.

Memory is a sealed ``memfd``: it has no name to leak, no size limit of /dev/shm, and cannot be truncated under a reader.
A peer of the same user opens it through ``/proc/<pid>/fd/<fd>`` and checks that it is the file it was told about.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvmarket.errors import InvalidInputError, PeerGoneError, RegistrationError, TransportUnavailableError
from kvmarket.region.mapping import HUGE_PAGE, allow_huge_pages, map_shared, populate

POPULATE_BYTES_MAX = 64 << 30
"""Larger memories are entered into the page table as they are touched, not ahead."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class MemoryAddress:
    """How a peer finds a piece of shared memory: process, descriptor, and the file's identity to check it by."""

    pid: int
    fd: int
    inode: int
    nbytes: int

    def as_list(self) -> list[int]:
        """The wire form."""
        return [self.pid, self.fd, self.inode, self.nbytes]


class SharedMemory:
    """A sealed memfd of this process, mapped read-write; close it when nobody reads it any more.

    Attributes:
        array: its bytes, (nbytes,) uint8.
    """

    def __init__(self, nbytes: int, label: str = "region") -> None:
        if nbytes < 1:
            raise InvalidInputError(f"shared memory needs at least one byte, not {nbytes}")
        fd = os.memfd_create(f"kvmarket:{label}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            self.array: np.ndarray = map_shared(fd, nbytes, writable=True)
        except OSError as error:
            os.close(fd)
            raise RegistrationError(f"cannot make {nbytes} bytes of shared memory: {error}") from error
        allow_huge_pages(self.array)
        self._fd, self._nbytes, self._inode, self._pid = fd, nbytes, os.fstat(fd).st_ino, os.getpid()

    @property
    def address(self) -> MemoryAddress:
        """What a peer needs to map this memory."""
        return MemoryAddress(self._pid, self._fd, self._inode, self._nbytes)

    def contains(self, pointer: int, nbytes: int) -> int | None:
        """Return the offset of [pointer, pointer + nbytes) in this memory, or None when it is elsewhere."""
        offset = pointer - self.array.ctypes.data
        return offset if offset >= 0 and offset + nbytes <= self._nbytes else None

    def populate(self) -> None:
        """Have the kernel provide every page now, on a thread, so that no later write pays for it."""
        _populate_on_thread(self.array, write=True)

    def close(self) -> None:
        """Give the descriptor back. Bytes stay mapped while any array still refers to them. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def map_peer_memory(address: MemoryAddress) -> np.ndarray:
    """Map a peer's shared memory read-only and return it as (nbytes,) uint8.

    Raises:
        PeerGoneError: the process is no longer there, or its descriptor is another file by now.
        TransportUnavailableError: this process may not look into that one.
    """
    path = f"/proc/{address.pid}/fd/{address.fd}"
    peer = f"pid {address.pid}"
    try:
        if not os.readlink(path).startswith("/memfd:kvmarket:"):  # noqa: PTH115 - a magic link: text, not a path
            raise PeerGoneError(f"{path} is not kvmarket's memory", scheme="shm", peer=peer)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise PeerGoneError(f"process {address.pid} is gone", scheme="shm", peer=peer) from error
    except PermissionError as error:
        why = f"not allowed to open {path}: both processes must run as one user, with ptrace read access"
        raise TransportUnavailableError(why, scheme="shm", peer=peer) from error
    except OSError as error:
        raise TransportUnavailableError(f"cannot open {path}: {error}", scheme="shm", peer=peer) from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_ino != address.inode or info.st_size != address.nbytes:
            raise PeerGoneError(f"{path} is another file by now", scheme="shm", peer=peer)
        array = map_shared(fd, address.nbytes, writable=False)
        _populate_on_thread(array, write=False)
        return array
    except OSError as error:  # no memory or no descriptors left here
        raise TransportUnavailableError(f"cannot map {path}: {error}", scheme="shm", peer=peer) from error
    finally:
        os.close(fd)


def _populate_on_thread(array: np.ndarray, *, write: bool) -> None:
    """Provide the pages of a mapping without keeping anybody waiting."""
    if len(array) <= POPULATE_BYTES_MAX:
        threading.Thread(
            target=populate, args=(array,), kwargs={"write": write}, name="kvmarket-populate", daemon=True
        ).start()


def private_huge_pages(nbytes: int) -> np.ndarray:
    """Return (nbytes,) uint8 of private memory on huge pages, touched so that the first copy into it is a fast one."""
    size = -(-nbytes // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    array: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(mapping, np.uint8)
    start = -array.ctypes.data % HUGE_PAGE
    array = array[start : start + nbytes]
    array[:: mmap.PAGESIZE] = 0
    return array
