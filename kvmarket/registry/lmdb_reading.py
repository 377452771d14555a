"""Reading the embedded registry's file, and lmdb's errors in our words."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NoReturn

import lmdb

from kvmarket.errors import RegistryError, RegistryFullError, RegistryProtocolError, RegistryUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from kvmarket.registry.lmdb_file import RegistryFile

Transaction = Any
"""An `lmdb.Transaction`. The stubs say ``bytes | memoryview`` for all data; without buffers, as here, it is bytes."""
Cursor = Any
"""An `lmdb.Cursor`, untyped for the same reason."""

_DAMAGE = (
    lmdb.InvalidError,
    lmdb.CorruptedError,
    lmdb.VersionMismatchError,
    lmdb.PageNotFoundError,
    lmdb.IncompatibleError,
)


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn lmdb's errors into ours, once."""
    try:
        yield
    except (lmdb.Error, OSError) as error:
        raise_ours(path, error)


def raise_ours(path: Path, error: BaseException) -> NoReturn:
    """Raise our error for one of lmdb's or the system's, and any other as it is."""
    if isinstance(error, RegistryError):  # some of ours are OSErrors, too
        raise error
    if isinstance(error, lmdb.MapFullError):
        raise RegistryFullError(f"{path} is full; raise KVMARKET_REGISTRY_BYTES") from error
    if isinstance(error, _DAMAGE):
        raise RegistryProtocolError(
            f"{path} is damaged or not a registry ({error}); "
            "stop the processes that use it and remove it: it is only a cache"
        ) from error
    if isinstance(error, (lmdb.Error, OSError)):
        raise RegistryUnavailableError(f"{path}: {error}") from error
    raise error


class Reading:
    """A read transaction: a snapshot, taken without a lock that other processes know of. Enter it once.

    A class, because generators as context managers cost several times what lmdb does, and a fetch reads twice.
    """

    __slots__ = ("_file", "txn")

    def __init__(self, file: RegistryFile) -> None:
        self._file = file

    def __enter__(self) -> Transaction:
        file = self._file
        file.require_in_place()
        try:
            self.txn = file.begin(write=False)
        except (lmdb.Error, OSError) as error:
            raise_ours(file.path, error)
        return self.txn

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.txn.abort()
        self._file.end()
        if error is not None and isinstance(error, (lmdb.Error, OSError)):
            raise_ours(self._file.path, error)
