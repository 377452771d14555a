"""Opening the registry file: once per process, private to the user, of a version we know, and not truncated."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb

from kvmarket.errors import ConfigError, RegistryFullError, RegistryProtocolError, RegistryUnavailableError
from kvmarket.registry.host import OwnerLocks
from kvmarket.registry.records import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE_NAME = "registry.lmdb"
READERS_MAX = 1024
_SORTED = ("blocks", "runs")
_PLAIN = ("meta", "owners", "regions", "namespaces", "retired")


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn lmdb's errors into ours, once."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise RegistryFullError(f"{path} is full; raise KVMARKET_REGISTRY_BYTES") from error
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError, lmdb.PageNotFoundError) as error:
        raise RegistryProtocolError(
            f"{path} is damaged or not a registry ({error}); stop the processes that use it and remove it: it is only a cache"
        ) from error
    except (lmdb.Error, OSError) as error:
        raise RegistryUnavailableError(f"{path}: {error}") from error


@dataclass
class RegistryFile:
    """One open registry file. lmdb allows one open environment per file and process, so it is shared and counted."""

    path: Path
    env: lmdb.Environment
    locks: OwnerLocks
    tables: dict[str, object]
    users: int = 0
    writing: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def read(self) -> Iterator[lmdb.Transaction]:
        """A read transaction: a snapshot, taken without a lock."""
        with translated(self.path):
            try:
                txn = self.env.begin(buffers=False)
            except lmdb.MapResizedError:  # another process opened it with a larger limit
                self.env.set_mapsize(0)
                txn = self.env.begin(buffers=False)
            with txn:
                yield txn

    @contextlib.contextmanager
    def write(self) -> Iterator[lmdb.Transaction]:
        """A write transaction: one at a time on this host; committed unless the block raises."""
        with self.writing, translated(self.path):
            try:
                txn = self.env.begin(write=True)
            except lmdb.MapResizedError:
                self.env.set_mapsize(0)
                txn = self.env.begin(write=True)
            with txn:
                yield txn


_open_files: dict[tuple[str, int], RegistryFile] = {}
_open_lock = threading.Lock()


def acquire_file(directory: Path, map_bytes: int) -> RegistryFile:
    """Open the registry file in `directory`, making both if they do not exist; pair with `release_file`.

    Raises:
        ConfigError: the directory is not this user's, or others may enter it.
        RegistryProtocolError: the file is damaged, no registry, or of a newer major version.
        RegistryUnavailableError: it cannot be opened or written.
    """
    key = (os.path.realpath(directory), os.getpid())
    with _open_lock:
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
            file.env.close()


def _private_directory(directory: Path) -> None:
    with translated(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.stat()
    if info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(
            f"{directory} must belong to uid {os.getuid()} with mode 0700: whoever writes there decides what this process reads"
        )


def _open(directory: Path, map_bytes: int) -> RegistryFile:
    _private_directory(directory)
    owners = directory / "owners"
    path = directory / FILE_NAME
    with translated(path):
        owners.mkdir(mode=0o700, exist_ok=True)
        env = lmdb.open(
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
    try:
        with translated(path):
            env.reader_check()  # readers that were killed must not pin old pages
            short = _extend_short_file(env, path)
            tables = {name: env.open_db(name.encode(), dupsort=name in _SORTED) for name in (*_PLAIN, *_SORTED)}
            if short:
                _read_everything(env, tables)
            _check_version(env, tables["meta"], path)
    except BaseException:
        env.close()
        raise
    return RegistryFile(path, env, OwnerLocks(owners), tables)


def _extend_short_file(env: lmdb.Environment, path: Path) -> bool:
    """Make the file as long as its header says, so that a truncated one reads as an error and not as a SIGBUS."""
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if path.stat().st_size >= needed:
        return False
    os.truncate(path, needed)
    return True


def _read_everything(env: lmdb.Environment, tables: dict[str, object]) -> None:
    with env.begin() as txn:
        for table in tables.values():
            for _ in txn.cursor(table):
                pass


def _check_version(env: lmdb.Environment, meta: object, path: Path) -> None:
    with env.begin(write=True) as txn:
        data = txn.get(b"version", db=meta)
        if data is None:
            txn.put(b"version", pack("registry", {}), db=meta)
            return
    try:
        unpack("registry", data)
    except RegistryProtocolError as error:
        raise RegistryProtocolError(f"{path} was made by another kvmarket: {error}") from error
