"""One 64-bit counter per page, in shared memory: what makes reading a peer's live memory safe.

A page is readable while its generation is even and non-zero. Its owner makes the generation odd *before* it overwrites
or frees the page, and even again, and larger, when the page holds published bytes. A reader compares the generation
with the announced one before and after its copy: a seqlock.
"""

from __future__ import annotations

import os
import threading

import numpy as np

from kvmarket.errors import PeerGoneError
from kvmarket.region.memory import MemoryAddress, SharedMemory, map_peer_memory

_MAGIC = b"KVMGEN\x00\x01"
_HEADER_BYTES = 4096
PROBE_BYTES = 64
INCARNATION_BYTES = 16
_ODD = np.uint64(1)
VALUES_OFFSET = _HEADER_BYTES
"""Where the counters start in a table; before them is `table_header`."""


def table_header(incarnation: bytes, num_pages: int, probe: bytes) -> bytes:
    """Return the first bytes of a table: a reader that finds them has reached the incarnation and region it meant."""
    identity = _MAGIC + incarnation + num_pages.to_bytes(8, "little")
    return identity.ljust(64, b"\0") + probe


def memory_fence() -> None:
    """Order every load and store before this call before every one after it.

    x86 keeps loads in order and stores in order by itself, so the compiler barrier of the call would do; weaker
    machines need a fence. Releasing one lock and acquiring it again is one in every memory model CPython runs on.
    """
    lock = threading.Lock()
    with lock:
        pass
    with lock:
        pass


class GenerationTable:
    """The owner's side. Thread-safe for callers that do not touch one page from two threads at a time."""

    def __init__(self, num_pages: int, incarnation: bytes) -> None:
        self.memory = SharedMemory(_HEADER_BYTES + 8 * num_pages, "generations")
        self.probe = os.urandom(PROBE_BYTES)
        header = table_header(incarnation, num_pages, self.probe)
        self.memory.array[: len(header)] = np.frombuffer(header, np.uint8)
        self.values: np.ndarray = self.memory.array[_HEADER_BYTES:].view(np.uint64)

    def invalidate(self, pages: np.ndarray) -> None:
        """Make `pages` unreadable. Must return before their bytes change."""
        self.values[pages] |= np.uint64(1)
        memory_fence()

    def validate(self, pages: np.ndarray) -> np.ndarray:
        """Make `pages` readable, under new generations that are returned. Their bytes must be final."""
        memory_fence()
        fresh: np.ndarray = (self.values[pages] | np.uint64(1)) + np.uint64(1)
        self.values[pages] = fresh
        return fresh

    def reserve(self, pages: np.ndarray) -> np.ndarray:
        """Make `pages` unreadable, under new (odd) generations that are returned and stay until somebody acts."""
        fresh: np.ndarray = (self.values[pages] | np.uint64(1)) + np.uint64(2)
        self.values[pages] = fresh
        memory_fence()
        return fresh

    def close(self) -> None:
        """Make every page unreadable and give the memory back."""
        self.values |= np.uint64(1)
        memory_fence()
        self.memory.close()


class PeerGenerations:
    """The reader's side: a peer's table, mapped read-only and checked to be the incarnation asked for."""

    def __init__(self, address: MemoryAddress, incarnation: bytes, num_pages: int, probe: bytes) -> None:
        memory = map_peer_memory(address)
        expected = _MAGIC + incarnation + num_pages.to_bytes(8, "little")
        if len(memory) != _HEADER_BYTES + 8 * num_pages or memory[: len(expected)].tobytes() != expected:
            raise PeerGoneError(
                "the generation table belongs to another incarnation", scheme="shm", peer=f"pid {address.pid}"
            )
        if memory[64 : 64 + PROBE_BYTES].tobytes() != probe:
            raise PeerGoneError(
                "the probe read other bytes than the owner announced", scheme="shm", peer=f"pid {address.pid}"
            )
        self.values: np.ndarray = memory[_HEADER_BYTES:].view(np.uint64)


def readable(values: np.ndarray, pages: np.ndarray, generations: np.ndarray) -> np.ndarray:
    """Return a (n,) bool array: which `pages` are, right now, at the announced `generations` and readable.

    Pages that the table does not have are not readable: a registry holds hints, and hints may be nonsense.
    """
    known = None
    if len(pages) and int(pages.astype(np.uint64, copy=False).max()) >= len(values):  # negative ones become large
        known = (pages >= 0) & (pages < len(values))
        pages = np.where(known, pages, 0)
    fresh: np.ndarray = values[pages] == generations
    fresh &= generations & _ODD == 0
    fresh &= generations != 0
    return fresh if known is None else fresh & known
