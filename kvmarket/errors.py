"""Every error kvmarket raises, in one tree.

A miss is a value (see `kvmarket.report`), never an error. Each class says whose fault it was and its message says what
to do next. Foreign exceptions are translated once, in the backend that met them, and stay attached as ``__cause__``.
"""

from __future__ import annotations


class KVMarketError(Exception):
    """Base of everything kvmarket raises on purpose."""


class ConfigError(KVMarketError, ValueError):
    """A setting is unknown or has a bad value; the message names the setting."""


class InvalidInputError(KVMarketError, ValueError):
    """The caller passed something that cannot be published, fetched or lent; the message names it."""


class MarketClosedError(KVMarketError):
    """The marketplace was closed by this process."""


class ArenaFullError(KVMarketError):
    """There is no room for a block: what the arena holds is pinned or being read; the message says how much of it."""


class DeadlineExceededError(KVMarketError, TimeoutError):
    """An operation that is not a fetch (those miss instead) did not finish before its deadline."""


class MissingExtraError(KVMarketError, ImportError):
    """An optional dependency is not installed.

    Attributes:
        extra: the extra of this package that provides it.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(f"{module} is not installed; install it with: pip install 'kvmarket[{extra}]'")
        self.extra, self._module = extra, module

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self._module, self.extra)


class IncompatibleSpecError(KVMarketError, ValueError):
    """Two KV caches cannot exchange blocks.

    Attributes:
        field: the first field that differs.
        expected: what this side has.
        found: what the other side has.
    """

    def __init__(self, field: str, expected: object, found: object) -> None:
        super().__init__(f"KV cache spec differs in {field}: expected {expected!r}, found {found!r}")
        self.field, self.expected, self.found = field, expected, found

    def __reduce__(self) -> tuple[type[IncompatibleSpecError], tuple[str, object, object]]:
        return type(self), (self.field, self.expected, self.found)


class RegistryError(KVMarketError):
    """The registry could not do what was asked."""


class RegistryUnavailableError(RegistryError, ConnectionError):
    """The registry cannot be reached or written to; it may be back later."""


class RegistryFullError(RegistryUnavailableError):
    """The registry has no room left; the message names the limit."""


class RegistryProtocolError(RegistryError):
    """What the registry holds cannot be understood by this version."""


class NamespaceDeniedError(RegistryError, PermissionError):
    """This process may not read or write that namespace."""


class LeaseExpiredError(RegistryError):
    """This owner's lease ran out, so its records are gone; register again."""


class TransportError(KVMarketError):
    """A transport could not do what was asked.

    Attributes:
        scheme: the transport (``shm``, ``ucx``, ...).
        peer: what is known of the other side, for the log.
    """

    def __init__(self, message: str, *, scheme: str = "", peer: str = "") -> None:
        super().__init__(message)
        self.scheme, self.peer = scheme, peer


class TransportUnavailableError(TransportError):
    """This transport cannot be used here, or cannot reach that peer; the message says why."""


class RegistrationError(TransportError):
    """Memory cannot be lent through this transport."""


class ConnectError(TransportError):
    """A peer that should be reachable could not be reached."""


class PeerGoneError(TransportError):
    """The peer died or restarted: its incarnation is over."""


class TransferError(TransportError):
    """A transfer started and did not complete."""


class TransferTimeoutError(TransferError, TimeoutError):
    """A transfer did not complete before its deadline."""


class IntegrityError(TransferError):
    """Bytes arrived that are not the bytes asked for. They are never adopted."""
