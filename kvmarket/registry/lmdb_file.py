"""Opening the registry file: once per process, private to the user, of a version we know, and not truncated."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb

from kvmarket.errors import (
    ConfigError,
    RegistryFullError,
    RegistryProtocolError,
    RegistryUnavailableError,
)
from kvmarket.registry.host import OwnerLocks, lock_holder
from kvmarket.registry.lmdb_reading import Reading, Transaction, translated
from kvmarket.registry.lmdb_users import RegistryUsers
from kvmarket.registry.records import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FILE_NAME = "registry.lmdb"
TURN_NAME = "registry.turn"
USERS_NAME = "registry.users"
BLOCKS_SHARE_MAX = 0.85
"""How much of the file blocks may take. Removing needs room as well, because lmdb copies what it changes."""
WRITE_WAIT_S = 3.0
"""How long a writer waits for the others before it gives up."""
READERS_MAX = 1024
_SORTED = ("blocks", "runs")
_PLAIN = ("meta", "owners", "regions", "namespaces", "retired", "stretches")


@dataclass
class RegistryFile:
    """One open registry file. lmdb allows one open environment per file and process, so it is shared and counted.

    lmdb's own write lock waits without end, for a process that is stopped as well; so writers first take a `turn`, a
    lock on a file of ours that is waited for no longer than `WRITE_WAIT_S`.
    """

    path: Path
    env: lmdb.Environment
    locks: OwnerLocks
    turn: int
    joined: RegistryUsers
    tables: dict[str, Any] = field(default_factory=dict)
    users: int = 0
    writing: threading.Lock = field(default_factory=threading.Lock)
    _counting: threading.Lock = field(default_factory=threading.Lock)
    _active: int = 0
    _awaited: int = 0
    _paused: bool = False
    _identity: tuple[int, int] = (0, 0)
    _name: str = ""

    def __post_init__(self) -> None:
        self._name, self._idle = str(self.path), threading.Condition(self._counting)
        with translated(self.path):
            self._identity = self._on_disk()

    def _on_disk(self) -> tuple[int, int]:
        info = os.stat(self._name)  # noqa: PTH116 - twice per fetch, and five times as fast
        return info.st_dev, info.st_ino

    def require_in_place(self) -> None:
        """Raise `RegistryUnavailableError` when the open file is no longer the one that other processes would open."""
        try:
            same = self._on_disk() == self._identity
        except OSError:
            same = False
        if not same:
            raise RegistryUnavailableError(
                f"{self.path} was removed or replaced while it was in use; restart this process to meet the others"
            )

    def read(self) -> Reading:
        """A read transaction: see `Reading`."""
        return Reading(self)

    @contextlib.contextmanager
    def write(self) -> Iterator[Transaction]:
        """A write transaction: one at a time on this host; committed unless the block raises.

        Raises:
            RegistryUnavailableError: other writers had the turn for all of `WRITE_WAIT_S`, or the file was removed.
        """
        self.require_in_place()
        with self._turn(), translated(self.path):
            txn = self.begin(write=True)
            try:
                with txn:
                    yield txn
            finally:
                self.end()

    @property
    def limit_bytes(self) -> int:
        """How long the file may become."""
        size: int = self.env.info()["map_size"]
        return size

    def require_room(self, txn: Transaction) -> None:
        """Raise `RegistryFullError` unless there is room for blocks, beside what removing some may take."""
        stats = [txn.stat(table) for table in self.tables.values()]
        pages = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        used = pages * stats[0]["psize"]
        if used > BLOCKS_SHARE_MAX * self.limit_bytes:
            raise RegistryFullError(
                f"{self.path} is full: {used} of {self.limit_bytes} bytes; raise KVMARKET_REGISTRY_BYTES"
            )

    def begin(self, *, write: bool) -> Transaction:
        """Open a transaction; `end` must follow when it is over."""
        with self._counting:
            try:
                txn = self.env.begin(write=write, buffers=False)
            except lmdb.MapResizedError:  # another process opened it with a larger limit
                self._grow()
                txn = self.env.begin(write=write, buffers=False)
            self._active += 1
        return txn

    def end(self) -> None:
        """Count a transaction of `begin` as over."""
        with self._counting:
            self._active -= 1
            if self._awaited and not self._active:
                self._idle.notify_all()

    def _grow(self) -> None:
        """Map what others made longer. lmdb moves the map, so no transaction of this process may be open."""
        if not self._wait_until_idle():
            raise RegistryUnavailableError(f"{self.path} grew, and a transaction of this process does not end")
        self.env.set_mapsize(0)

    def _wait_until_idle(self) -> bool:
        self._awaited += 1
        try:
            return self._idle.wait_for(lambda: self._active == 0, WRITE_WAIT_S)
        finally:
            self._awaited -= 1

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        end = time.monotonic() + WRITE_WAIT_S
        if not self.writing.acquire(timeout=WRITE_WAIT_S):
            raise RegistryUnavailableError(f"{self.path}: other threads kept writing for {WRITE_WAIT_S:g} s")
        try:
            pause_s = 50e-6
            while not self._take_turn():
                if time.monotonic() >= end:
                    raise RegistryUnavailableError(f"{self.path}: {self._holder()} for {WRITE_WAIT_S:g} s")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 2e-3)
            try:
                yield
            finally:
                fcntl.lockf(self.turn, fcntl.LOCK_UN)
        finally:
            self.writing.release()

    def _take_turn(self) -> bool:
        if self.turn < 0:
            raise RegistryUnavailableError(f"{self.path} was closed by this process")
        try:
            fcntl.lockf(self.turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows both for "somebody else holds it"
            return False
        return True

    def _holder(self) -> str:
        holder = lock_holder(self.turn)
        return "other processes kept the write lock busy" if holder is None else f"process {holder} held the write lock"

    def close(self) -> None:
        """Close the file, unless a thread is writing and does not end: then it stays open with this process."""
        self.locks.close()
        if self.writing.acquire(timeout=WRITE_WAIT_S):
            try:
                self._close()
            finally:
                self.writing.release()

    def _close(self) -> None:
        self.env.close()
        os.close(self.turn)
        self.turn = -1
        self.joined.close()

    # ---- forks: a child must not use the parent's file, and lmdb lets it open the file anew only when it closed that
    # one. Closing gives up the transactions that are open, for the parent as well: so there must be none.

    def pause(self) -> None:
        """Let no transaction be open from now on, as far as `WRITE_WAIT_S` allows."""
        self._paused = self.writing.acquire(timeout=WRITE_WAIT_S)
        self._idle.acquire()
        self._wait_until_idle()

    def resume(self, *, in_child: bool) -> None:
        """End `pause`; in a child, the file is closed."""
        if in_child and self._paused and self._active == 0:
            self._close()
        self._idle.release()
        if self._paused:
            self.writing.release()


_open_files: dict[tuple[str, int], RegistryFile] = {}
_open_lock = threading.Lock()
_fork_handlers: list[bool] = []


def _before_fork() -> None:
    _open_lock.acquire()
    for file in _open_files.values():
        file.pause()


def _after_fork_in_parent() -> None:
    for file in _open_files.values():
        file.resume(in_child=False)
    _open_lock.release()


def _after_fork_in_child() -> None:
    for file in _open_files.values():
        file.resume(in_child=True)
    _open_files.clear()
    _open_lock.release()


def in_halves(remove: Callable[[Any], int], what: Any) -> int:
    """Remove entries in one transaction, or in smaller ones where the file has no room for that.

    lmdb copies every page that changes, and many entries may be on as many pages.

    Args:
        remove: removes some in a transaction of its own, and returns how many there were.
        what: a sequence or array of entries.

    Raises:
        RegistryFullError: there is no room to remove even one.
    """
    try:
        return remove(what)
    except RegistryFullError:
        half = len(what) // 2
        if not half:
            raise
        return in_halves(remove, what[:half]) + in_halves(remove, what[half:])


def acquire_file(directory: Path, map_bytes: int) -> RegistryFile:
    """Open the registry file in `directory`, making both if they do not exist; pair with `release_file`.

    Raises:
        ConfigError: the directory is not this user's, or others may enter it.
        RegistryProtocolError: the file is damaged, no registry, or of a newer major version.
        RegistryUnavailableError: it cannot be opened or written.
    """
    key = (os.path.realpath(directory), os.getpid())
    with _open_lock:
        if not _fork_handlers:  # at the first opening: an import has no effects
            os.register_at_fork(
                before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
            )
            _fork_handlers.append(True)
        if key not in _open_files:
            _open_files[key] = _open(Path(key[0]), map_bytes)
        _open_files[key].users += 1
        return _open_files[key]


def release_file(file: RegistryFile) -> None:
    """Close the file when its last user in this process is done."""
    with _open_lock:
        file.users -= 1
        if file.users == 0:
            for key in [key for key, value in _open_files.items() if value is file]:
                del _open_files[key]
            file.close()


def _private_directory(directory: Path) -> None:
    with translated(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.stat()
    if info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(
            f"{directory} must belong to uid {os.getuid()} with mode 0700: "
            "whoever writes there decides what this process reads"
        )


def _open(directory: Path, map_bytes: int) -> RegistryFile:
    _private_directory(directory)
    owners = directory / "owners"
    path = directory / FILE_NAME
    with contextlib.ExitStack() as undo:
        with translated(path):
            owners.mkdir(mode=0o700, exist_ok=True)
            turn = os.open(directory / TURN_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            undo.callback(os.close, turn)
            joined = RegistryUsers(directory / USERS_NAME, WRITE_WAIT_S)
            undo.callback(joined.close)
            joined.join([path, directory / f"{FILE_NAME}-lock", *owners.iterdir()])
            env = _environment(path, map_bytes)
            undo.callback(env.close)
            env.reader_check()  # readers that were killed must not pin old pages
            short = _extend_short_file(env, path)
        file = RegistryFile(path, env, OwnerLocks(owners), turn, joined)
        _open_tables(file)
        if short:
            _read_everything(file)
        joined.mark()
        undo.pop_all()
    return file


def _environment(path: Path, map_bytes: int) -> lmdb.Environment:
    return lmdb.open(
        str(path),
        subdir=False,
        map_size=map_bytes,
        max_dbs=len(_SORTED) + len(_PLAIN),
        max_readers=READERS_MAX,
        mode=0o600,
        sync=False,  # soft state: losing it to a power cut costs a few misses
        metasync=False,
        readahead=False,
    )


def _extend_short_file(env: lmdb.Environment, path: Path) -> bool:
    """Make the file as long as its header says, so that a truncated one reads as an error and not as a SIGBUS."""
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if path.stat().st_size >= needed:
        return False
    os.truncate(path, needed)
    return True


def _open_tables(file: RegistryFile) -> None:
    """Open, or make, all tables; check, or enter, the version. lmdb opens tables in write transactions only."""
    with file.write() as txn:
        for name in (*_PLAIN, *_SORTED):
            file.tables[name] = file.env.open_db(name.encode(), txn=txn, dupsort=name in _SORTED)
        data = txn.get(b"version", db=file.tables["meta"])
        if data is None:
            txn.put(b"version", pack("registry", {}), db=file.tables["meta"])
            return
    try:
        unpack("registry", data)
    except RegistryProtocolError as error:
        raise RegistryProtocolError(f"{file.path} was made by another kvmarket: {error}") from error


def _read_everything(file: RegistryFile) -> None:
    with file.read() as txn:
        for table in file.tables.values():
            for _ in txn.cursor(table):
                pass
