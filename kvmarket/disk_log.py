"""Blocks in files: an append-only log of segments that is bounded, checksummed, and right after any crash.

A segment is a header of 4 KiB and records of one size: a header of 256 bytes and a page. Every header carries a
checksum over itself and the log's identity, and every record the xxh3_128 of its page, so what was written in part, by
another version, for another namespace or before the namespace was told to forget is never taken for a block. Nothing
is synced: the checksums say what arrived. When the log is full its oldest segment goes; what was read of it since it
was written is written again.
"""

from __future__ import annotations

import os
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import xxhash

from kvmarket.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import numpy as np

FORMAT = 1
SEGMENT_HEADER_BYTES = 4096
RECORD_HEADER_BYTES = 256
SEGMENT_BYTES_MAX = 256 << 20
SEGMENTS = 16
"""The log is cut into about this many segments: with one, all goes at once."""
KEY_BYTES_MAX = 80
_SEGMENT = struct.Struct("<8s16s16s")
_SEGMENT_MAGIC = b"KVMSEG\x00" + bytes([FORMAT])
_RECORD = struct.Struct(f"<4sBBHQQ16s{KEY_BYTES_MAX}s{KEY_BYTES_MAX}s")
_RECORD_MAGIC = b"KVMR"
_GONE = 1
"""In a record's flags: the block was withdrawn; no page follows."""


@dataclass(slots=True, eq=False)
class _Segment:
    number: int
    path: Path
    fd: int
    records: int = 0
    nbytes: int = SEGMENT_HEADER_BYTES
    readers: int = 0
    retired: bool = False
    keys: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block of the log, without its bytes.

    Attributes:
        key: its registry key.
        parent: that of the block before it, or None.
        digest: xxh3_128 of its page.
        expires: when it must not be served any more, in seconds since the Unix epoch; 0: never.
    """

    key: bytes
    parent: bytes | None
    digest: bytes
    expires: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    block: StoredBlock
    segment: _Segment
    row: int
    used: bool = False


class DiskLog:
    """The log in one directory, which nobody else may use meanwhile. One thread writes, any thread reads.

    Args:
        directory: where; made if it is not there. What does not belong to this log's identity is removed from it.
        bytes_max: largest size of all files together.
        page_bytes: size of a page.
        identity: 16 bytes that say whose blocks these are; the blocks of another identity are not seen.

    Raises:
        InvalidInputError: `bytes_max` holds fewer than two segments of one page.
        OSError: the directory cannot be used.
    """

    def __init__(self, directory: Path, bytes_max: int, page_bytes: int, identity: bytes) -> None:
        self._directory, self._bytes_max, self._page_bytes, self._identity = directory, bytes_max, page_bytes, identity
        self._record_bytes = RECORD_HEADER_BYTES + page_bytes
        wanted = min(bytes_max // SEGMENTS, SEGMENT_BYTES_MAX) - SEGMENT_HEADER_BYTES
        self._records_max = max(1, wanted // self._record_bytes)
        self._segment_bytes = SEGMENT_HEADER_BYTES + self._records_max * self._record_bytes
        if bytes_max < 2 * self._segment_bytes:
            raise InvalidInputError(f"a disk tier of {bytes_max} bytes is too small; raise KVMARKET_DISK_BYTES")
        self._lock = threading.Lock()
        self._segments: list[_Segment] = []
        self._index: dict[bytes, _Entry] = {}
        self._open: _Segment | None = None
        self._next = 1
        self.damaged = 0
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._scan()

    # ---- opening

    def _scan(self) -> None:
        """Build the index from the headers of what is there."""
        found = sorted((int(path.stem), path) for path in self._directory.glob("*.seg") if path.stem.isdecimal())
        for number, path in found:
            self._next = number + 1
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            size = os.fstat(fd).st_size
            if os.pread(fd, _SEGMENT.size, 0) != self._segment_header():
                os.close(fd)
                path.unlink()
                continue
            whole = max(0, size - SEGMENT_HEADER_BYTES - RECORD_HEADER_BYTES + self._record_bytes)
            segment = _Segment(number, path, fd, min(whole // self._record_bytes, self._records_max), size)
            self._segments.append(segment)
            for row in range(segment.records):
                self._scan_record(segment, row)
        while self.nbytes > self._bytes_max:
            self._retire(self._segments[0])

    def _scan_record(self, segment: _Segment, row: int) -> None:
        read = self._parse(os.pread(segment.fd, RECORD_HEADER_BYTES, self._offset(row)))
        if read is None:
            self.damaged += 1
            return
        block, gone = read
        if gone:
            self._index.pop(block.key, None)
        elif self._offset(row) + self._record_bytes <= segment.nbytes:
            self._enter(block, segment, row)

    def _segment_header(self) -> bytes:
        begin = _SEGMENT_MAGIC + self._identity
        return begin + xxhash.xxh3_128_digest(begin)

    def _offset(self, row: int) -> int:
        return SEGMENT_HEADER_BYTES + row * self._record_bytes

    def _header(self, block: StoredBlock, flags: int = 0) -> bytes:
        parent = block.parent or b""
        sizes = len(block.key), len(parent)
        packed = _RECORD.pack(
            _RECORD_MAGIC, flags, *sizes, self._page_bytes, block.expires, block.digest, block.key, parent
        )
        return (packed + xxhash.xxh3_128_digest(self._identity + packed)).ljust(RECORD_HEADER_BYTES, b"\0")

    def _parse(self, header: bytes | bytearray) -> tuple[StoredBlock, bool] | None:
        """Return what a record's header says, and whether the block is gone; None for anything but a whole header."""
        packed = bytes(header[: _RECORD.size])
        if len(packed) < _RECORD.size or xxhash.xxh3_128_digest(self._identity + packed) != header[_RECORD.size :][:16]:
            return None
        magic, flags, key_size, parent_size, page_bytes, expires, digest, key, parent = _RECORD.unpack(packed)
        if magic != _RECORD_MAGIC or page_bytes != self._page_bytes:
            return None
        return StoredBlock(key[:key_size], parent[:parent_size] or None, digest, expires), bool(flags & _GONE)

    # ---- what is there

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(segment.nbytes for segment in self._segments)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    def run(self, keys: Sequence[bytes], now: float) -> int:
        """Return how many leading blocks of `keys` are there and have not expired. `now`: seconds since the epoch."""
        with self._lock:
            for count, key in enumerate(keys):
                entry = self._index.get(key)
                if entry is None or (entry.block.expires and entry.block.expires <= now):
                    return count
        return len(keys)

    def newest(self, count: int) -> list[StoredBlock]:
        """Return the blocks written last, the oldest of them first."""
        with self._lock:
            return [entry.block for entry in list(self._index.values())[-count:]] if count > 0 else []

    def read(self, key: bytes, into: Sequence[np.ndarray]) -> bool:
        """Read a block's page; False when it is not there, or its bytes are not those that were written.

        Args:
            key: which block.
            into: writable uint8 pieces of memory, `page_bytes` in all; undefined after False.

        Raises:
            OSError: the disk failed.
        """
        with self._lock:
            entry = self._index.get(key)
            if entry is None:
                return False
            entry.segment.readers += 1
        try:
            good = self._read(entry, into)
        finally:
            with self._lock:
                entry.segment.readers -= 1
                self._close_retired(entry.segment)
        with self._lock:
            if good:
                entry.used = True
            elif self._index.get(key) is entry:
                self.damaged += 1
                del self._index[key]
        return good

    def _read(self, entry: _Entry, into: Sequence[np.ndarray]) -> bool:
        header = bytearray(RECORD_HEADER_BYTES)
        size = os.preadv(entry.segment.fd, [header, *(piece.data for piece in into)], self._offset(entry.row))
        if size != self._record_bytes or self._parse(header) != (entry.block, False):
            return False
        digest = xxhash.xxh3_128()
        for piece in into:
            digest.update(piece.data)
        return bool(digest.digest() == entry.block.digest)

    # ---- writing: by one thread

    def append(self, block: StoredBlock, page: np.ndarray) -> None:
        """Write a block that is not there. `page`: (page_bytes,) uint8, whose xxh3_128 is `block.digest`.

        Raises:
            InvalidInputError: a key is too long.
            OSError: it could not be written; the log stays as it was.
        """
        if max(len(block.key), len(block.parent or b"")) > KEY_BYTES_MAX:
            raise InvalidInputError(f"a block key of {len(block.key)} bytes is longer than {KEY_BYTES_MAX}")
        segment = self._segment_to_write()
        row = self._write(segment, self._header(block), page)
        with self._lock:
            self._enter(block, segment, row)

    def _enter(self, block: StoredBlock, segment: _Segment, row: int) -> None:
        self._index.pop(block.key, None)  # so that the order of the index is that of the writing
        self._index[block.key] = _Entry(block, segment, row)
        segment.keys.append(block.key)

    def _entries(self, segment: _Segment) -> list[_Entry]:
        """Return the blocks that a segment holds. The lock is held."""
        found = (self._index.get(key) for key in dict.fromkeys(segment.keys))
        return [entry for entry in found if entry is not None and entry.segment is segment]

    def forget(self, keys: Iterable[bytes]) -> int:
        """Remove blocks, for good; return how many there were. Raises OSError."""
        with self._lock:
            gone = [self._index.pop(key) for key in keys if key in self._index]
        for entry in gone:
            self._write(self._segment_to_write(), self._header(entry.block, _GONE))
        return len(gone)

    def clear(self, identity: bytes) -> None:
        """Remove everything, and go on under another identity. Raises OSError."""
        with self._lock:
            self._index.clear()
            self._identity = identity
        for segment in list(self._segments):
            self._retire(segment)

    def _write(self, segment: _Segment, header: bytes, page: np.ndarray | None = None) -> int:
        row = segment.records
        pieces: list[bytes | memoryview] = [header] if page is None else [header, page.data]
        if os.pwritev(segment.fd, pieces, self._offset(row)) != sum(map(len, pieces)):
            raise OSError("the disk took a part of a record only")
        segment.records = row + 1
        segment.nbytes = self._offset(row + 1)
        return row

    def _segment_to_write(self) -> _Segment:
        if self._open is not None and self._open.records < self._records_max:
            return self._open
        again: list[tuple[StoredBlock, np.ndarray]] = []
        while self._segments and self.nbytes + self._segment_bytes > self._bytes_max:
            again += self._read_again(self._segments[0], self._records_max // 2 - len(again))
            self._retire(self._segments[0])
        self._open = self._new_segment()
        for block, page in again:
            self.append(block, page)
        return self._segment_to_write()

    def _read_again(self, segment: _Segment, count: int) -> list[tuple[StoredBlock, np.ndarray]]:
        """Return up to `count` blocks of a segment that were read since they were written."""
        import numpy as np

        with self._lock:
            used = [entry for entry in self._entries(segment) if entry.used]
        found: list[tuple[StoredBlock, np.ndarray]] = []
        for entry in used[: max(0, count)]:
            page = np.empty(self._page_bytes, np.uint8)
            if self._read(entry, [page]):
                found.append((entry.block, page))
        return found

    def _new_segment(self) -> _Segment:
        path = self._directory / f"{self._next}.seg"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._next += 1
        try:
            os.pwrite(fd, self._segment_header().ljust(SEGMENT_HEADER_BYTES, b"\0"), 0)
        except OSError:
            os.close(fd)
            path.unlink()
            raise
        segment = _Segment(self._next - 1, path, fd)
        with self._lock:
            self._segments.append(segment)
        return segment

    def _retire(self, segment: _Segment) -> None:
        with self._lock:
            self._segments.remove(segment)
            for entry in self._entries(segment):
                del self._index[entry.block.key]
            if self._open is segment:
                self._open = None
            segment.retired = True
            self._close_retired(segment)
        segment.path.unlink(missing_ok=True)

    def _close_retired(self, segment: _Segment) -> None:
        """Close a file that nobody reads any more: its number may be another file's afterwards. The lock is held."""
        if segment.retired and not segment.readers and segment.fd >= 0:
            os.close(segment.fd)
            segment.fd = -1

    def close(self) -> None:
        """Close the files. Idempotent; reads that are under way end first."""
        with self._lock:
            self._index.clear()
            for segment in self._segments:
                segment.retired = True
                self._close_retired(segment)
            self._segments.clear()
            self._open = None
