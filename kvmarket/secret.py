"""The secret of a tenant: where it comes from, and what is derived from it. It is never shown, stored or sent.

Who lacks it can compute neither the namespace nor any block's key in it, not even from the block's tokens.
"""

from __future__ import annotations

import hmac
import os
import stat
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from kvmarket.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

BYTES_MIN, BYTES_MAX = 16, 4096
KEY_BYTES = 32
_TAG_BYTES = 8
_OTHERS = stat.S_IRWXO | stat.S_IWGRP
"""What a secret's file must not allow. Its group may read it, as mounted secrets of containers need."""


class Secret:
    """A tenant's secret, `BYTES_MIN` to `BYTES_MAX` bytes, or none (which is false).

    It has no readable form: it prints as hidden, and pickling it is an error.

    Args:
        value: text (taken as UTF-8) or bytes; empty for none.

    Raises:
        ConfigError: too short to be one, or too long. The message does not contain it.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str | bytes = b"") -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        if data and not BYTES_MIN <= len(data) <= BYTES_MAX:
            raise ConfigError(
                f"a secret has {BYTES_MIN} to {BYTES_MAX} bytes, this one has {len(data)}; "
                "make one with: openssl rand -hex 32"
            )
        self._value = data

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a secret from a file of this user (or root) that others cannot read; a line end after it is left out.

        Raises:
            ConfigError: it cannot be read, or somebody else can; the message says which.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not make us wait
            try:
                _require_private(path, os.fstat(fd))
                data = os.read(fd, BYTES_MAX + 3)
            finally:
                os.close(fd)
        except OSError as error:
            raise ConfigError(f"KVMARKET_SECRET_FILE {path} cannot be read: {error.strerror}") from error
        try:
            secret = cls(data.removesuffix(b"\n").removesuffix(b"\r"))
        except ConfigError as error:
            raise ConfigError(f"KVMARKET_SECRET_FILE {path}: {error}") from error
        if not secret:
            raise ConfigError(f"KVMARKET_SECRET_FILE {path} is empty")
        return secret

    def __bool__(self) -> bool:
        return bool(self._value)

    def __repr__(self) -> str:
        return "Secret(hidden)" if self._value else "Secret()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        return hash(self.derive(b"hash"))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[type[Secret], tuple[()]]:
        if self._value:
            raise TypeError("a secret is not pickled; give the other process KVMARKET_SECRET_FILE")
        return Secret, ()

    def derive(self, purpose: bytes, data: bytes = b"") -> bytes:
        """Return `KEY_BYTES` that only who has the secret can compute, others for every purpose and data."""
        return hmac.digest(self._value, b"kvmarket." + purpose + b"\0" + data, "sha256")

    @property
    def tag(self) -> str:
        """A short one-way name: equal where the secret is, and safe to store. Empty without a secret."""
        return self.derive(b"tag")[:_TAG_BYTES].hex() if self._value else ""


def _require_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"KVMARKET_SECRET_FILE {path} is not a regular file")
    if status.st_uid not in {os.geteuid(), 0}:
        raise ConfigError(f"KVMARKET_SECRET_FILE {path} belongs to user {status.st_uid}, not to this one or root")
    if status.st_mode & _OTHERS:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"KVMARKET_SECRET_FILE {path} has mode {mode:04o}: others can use it; chmod 600 it")


class Sealer:
    """Block hashes as the registry may hold them: without the key nobody can compute one, nor the next from the last.

    Args:
        key: `KEY_BYTES`, or empty, which leaves hashes as they are.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes = b"") -> None:
        self._key = key

    def __bool__(self) -> bool:
        return bool(self._key)

    def __repr__(self) -> str:
        return "Sealer(hidden)" if self._key else "Sealer()"

    def __reduce__(self) -> tuple[type[Sealer], tuple[()]]:
        if self._key:
            raise TypeError("what a secret was made into is not pickled either")
        return Sealer, ()

    def __call__(self, block_hash: bytes) -> bytes:
        """Return the sealed hash, `KEY_BYTES` long; with an empty key the hash itself."""
        return blake2b(block_hash, key=self._key, digest_size=KEY_BYTES).digest() if self._key else block_hash
