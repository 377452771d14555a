"""The messages of the UCX transport: msgpack arrays, versioned, size-limited, decoded into checked values or refused.

A conversation: the reader says HELLO with the versions it speaks and the incarnation it expects; the owner answers
WELCOME with the highest common version, or REFUSED with its reason. Then, per region, DESCRIBE -> REGION (probe bytes
and, for one-sided reads, keys), and per group of pages READ -> (one data message), TRAILER. PING -> PONG tells slow
from stopped.

Version 2 has no TRAILER after a data message that says itself that its pages were whole: short ones do.

From version 3 on an owner with a secret answers HELLO with CHALLENGE, the reader sends PROOF, and the owner, once that
is right, PROVEN (its own proof) and then WELCOME; see `kvmarket.transport.ucx_proof`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import msgpack
import numpy as np

from kvmarket.transport.ucx_proof import NONCE_BYTES, PROOF_BYTES

VERSION_MIN, VERSION_MAX = 1, 3
VERSION_WHOLE = 2
"""From this version on a data message may be the end of its read."""
VERSION_PROOF = 3
"""From this version on a reader can prove that it has a secret."""
MESSAGE_BYTES_MAX = 1 << 20
"""Longer control messages are refused unread."""
PAGES_MAX = 16384
"""Pages of one read request."""
TEXT_MAX = 1024
KEYS_MAX = 4096
_KEY_BYTES_MAX, _KEY_FIELDS = 4096, 3
_U63 = 1 << 63


class WireError(ValueError):
    """Bytes that are not a message of this protocol. The connection they came through is of no more use."""


@dataclass(frozen=True, slots=True)
class Hello:
    """A reader's first message."""

    kind: ClassVar[int] = 1
    version_min: int
    version_max: int
    incarnation: bytes

    def check(self) -> None:
        _integer(self.version_min, 1 << 16)
        _integer(self.version_max, 1 << 16)
        _data(self.incarnation, 16, 16)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The owner speaks `version` from now on."""

    kind: ClassVar[int] = 2
    version: int

    def check(self) -> None:
        _integer(self.version, 1 << 16)


@dataclass(frozen=True, slots=True)
class Refused:
    """The owner will not serve, for a reason that `text` tells people.

    `code` is one of ``version``, ``incarnation``, ``secret``, ``region``, ``keys``, ``read``, ``busy`` and ``cuda``.
    `transfer` names the read that is refused, 0 for the whole connection.
    """

    kind: ClassVar[int] = 3
    code: str
    text: str
    transfer: int = 0

    def check(self) -> None:
        _text(self.code)
        _text(self.text)
        _integer(self.transfer, _U63)


@dataclass(frozen=True, slots=True)
class Describe:
    """Ask for a region's probe bytes and, with `keys`, for what one-sided reads need."""

    kind: ClassVar[int] = 4
    transfer: int
    region: int
    keys: bool

    def check(self) -> None:
        _integer(self.transfer, _U63)
        _integer(self.region, 1 << 16)
        if type(self.keys) is not bool:
            raise WireError("keys must be a boolean")


@dataclass(frozen=True, slots=True)
class Region:
    """Answer to `Describe`: with keys, (address, bytes, packed key) of the memories and of the generation table."""

    kind: ClassVar[int] = 5
    transfer: int
    probe: bytes
    memories: list[tuple[int, int, bytes]]
    table: list[tuple[int, int, bytes]]

    def check(self) -> None:
        _integer(self.transfer, _U63)
        _data(self.probe, 0, 4096)
        for keys in (self.memories, self.table):
            _short_list(keys, KEYS_MAX)
            for key in keys:
                _short_list(key, _KEY_FIELDS)
                if len(key) != _KEY_FIELDS:
                    raise WireError("a key must have three fields")
                _integer(key[0], 1 << 64)
                _integer(key[1], 1 << 63)
                _data(key[2], 0, _KEY_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Read:
    """Ask for pages: `pages` is (n,) little-endian uint32, `generations` (n,) little-endian uint64."""

    kind: ClassVar[int] = 6
    transfer: int
    region: int
    pages: bytes
    generations: bytes

    def check(self) -> None:
        _integer(self.transfer, _U63)
        _integer(self.region, 1 << 16)
        _data(self.pages, 4, 4 * PAGES_MAX)
        _data(self.generations, 8, 8 * PAGES_MAX)
        if len(self.pages) % 4 or len(self.generations) != 2 * len(self.pages):
            raise WireError("a read must name one generation per page")

    @classmethod
    def of(cls, transfer: int, region: int, pages: np.ndarray, generations: np.ndarray) -> Read:
        """Build one from (n,) page numbers and (n,) generations."""
        return cls(transfer, region, pages.astype("<u4").tobytes(), generations.astype("<u8").tobytes())

    @property
    def page_numbers(self) -> np.ndarray:
        """(n,) int64."""
        return np.frombuffer(self.pages, "<u4").astype(np.int64)

    @property
    def page_generations(self) -> np.ndarray:
        """(n,) uint64."""
        return np.frombuffer(self.generations, "<u8").astype(np.uint64)


@dataclass(frozen=True, slots=True)
class Trailer:
    """The end of a read: indices of pages that were stale (then no data was sent) or torn while they travelled."""

    kind: ClassVar[int] = 7
    transfer: int
    stale: list[int]
    torn: list[int]

    def check(self) -> None:
        _integer(self.transfer, _U63)
        for indices in (self.stale, self.torn):
            _short_list(indices, PAGES_MAX)
            for index in indices:
                _integer(index, PAGES_MAX)


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there?"""

    kind: ClassVar[int] = 8

    def check(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True, slots=True)
class Pong:
    """Yes."""

    kind: ClassVar[int] = 9

    def check(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """The owner has a secret: prove that you have it, too."""

    kind: ClassVar[int] = 10
    nonce: bytes

    def check(self) -> None:
        _data(self.nonce, NONCE_BYTES, NONCE_BYTES)


@dataclass(frozen=True, slots=True)
class Proof:
    """The reader's answer, and what the owner has to answer."""

    kind: ClassVar[int] = 11
    nonce: bytes
    proof: bytes

    def check(self) -> None:
        _data(self.nonce, NONCE_BYTES, NONCE_BYTES)
        _data(self.proof, PROOF_BYTES, PROOF_BYTES)


@dataclass(frozen=True, slots=True)
class Proven:
    """The reader's proof was right; here is the owner's."""

    kind: ClassVar[int] = 12
    proof: bytes

    def check(self) -> None:
        _data(self.proof, PROOF_BYTES, PROOF_BYTES)


Message = Hello | Welcome | Refused | Describe | Region | Read | Trailer | Ping | Pong | Challenge | Proof | Proven
_CLASSES = (Hello, Welcome, Refused, Describe, Region, Read, Trailer, Ping, Pong, Challenge, Proof, Proven)
_KINDS: dict[int, type[Any]] = {cls.kind: cls for cls in _CLASSES}


def encode(message: Message) -> bytes:
    """Return the wire form."""
    values = [getattr(message, item.name) for item in fields(message)]
    packed: bytes = msgpack.packb([message.kind, *values], use_bin_type=True)
    return packed


def decode(data: bytes) -> Message:
    """Read a message; fields after the known ones, of a later version, are ignored.

    Raises:
        WireError: anything else than a message of this protocol.
    """
    if len(data) > MESSAGE_BYTES_MAX:
        raise WireError(f"a message of {len(data)} bytes is longer than {MESSAGE_BYTES_MAX}")
    try:
        wire = msgpack.unpackb(data)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"not msgpack: {error}") from error
    except RecursionError as error:
        raise WireError("nested too deeply") from error
    if not isinstance(wire, list) or not wire or type(wire[0]) is not int:
        raise WireError("not a message")
    cls = _KINDS.get(wire[0])
    if cls is None:
        raise WireError(f"unknown message kind {wire[0]}")
    count = len(fields(cls))
    if len(wire) <= count:
        raise WireError(f"a {cls.__name__} has {count} fields, not {len(wire) - 1}")
    message: Message = cls(*wire[1 : count + 1])
    message.check()
    return message


def common_version(hello: Hello) -> int | None:
    """Return the highest version both sides speak, or None."""
    version = min(hello.version_max, VERSION_MAX)
    return version if version >= max(hello.version_min, VERSION_MIN) else None


DATA_HEADER_BYTES = 8


_WHOLE = 1 << 63


def encode_data_header(transfer: int, *, whole: bool = False) -> bytes:
    """Header of the one message that carries the bytes of a read; `whole` says that no trailer follows."""
    return (transfer | (_WHOLE if whole else 0)).to_bytes(DATA_HEADER_BYTES, "little")


def decode_data_header(header: bytes) -> tuple[int, bool] | None:
    """Return the read a data message belongs to, and `whole`; None when the header is not one."""
    if len(header) != DATA_HEADER_BYTES:
        return None
    value = int.from_bytes(header, "little")
    return value & ~_WHOLE, bool(value & _WHOLE)


def _short_list(value: object, limit: int) -> None:
    if not isinstance(value, list | tuple) or len(value) > limit:
        raise WireError(f"expected a list of at most {limit}")


def _integer(value: object, limit: int) -> None:
    if type(value) is not int or not 0 <= value < limit:
        raise WireError(f"{str(value)[:64]!r} is not an integer in [0, {limit})")


def _data(value: object, low: int, high: int) -> None:
    if not isinstance(value, bytes) or not low <= len(value) <= high:
        raise WireError(f"expected {low} to {high} bytes")


def _text(value: object) -> None:
    if not isinstance(value, str) or len(value) > TEXT_MAX:
        raise WireError("expected a short text")
