"""The URL of a registry server: where it is, who asks, and the limits of leases, entries and waiting.

    redis://[user:password@]host[:port][/db][?lease_s=6&ttl_s=21600&timeout_s=0.25&entries_max=1000000]

``rediss://`` (or ``valkeys://``) is TLS; ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile`` and the other options of
the client's own URLs may follow the ones named here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

ENTRIES_MAX = 1_000_000
_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}
_PASSWORD = re.compile(r"://[^/@]*@")


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """A parsed registry URL.

    Attributes:
        url: what the client is given: scheme ``redis`` or ``rediss``, without our own options.
        lease_s: an owner that does not renew for this long is dead; it renews at a third of it.
        ttl_s: an entry nobody renews is gone after this; a living owner renews its own at half of it.
        timeout_s: the longest wait for one answer of a look-up; writes wait up to `write_timeout_s`.
        entries_max: entries of one owner in one namespace.
    """

    url: str
    lease_s: float = 6.0
    ttl_s: float = 21_600.0
    timeout_s: float = 0.25
    entries_max: int = ENTRIES_MAX

    @property
    def write_timeout_s(self) -> float:
        """The longest wait for one answer of an announcement: a batch takes the server longer than a look-up."""
        return min(4 * self.timeout_s, self.lease_s / 2)


_LIMITS = {"lease_s": (0.2, 3600.0), "ttl_s": (1.0, 86_400.0 * 30), "timeout_s": (0.005, 10.0), "entries_max": (1, 1e9)}


def is_server_url(text: str) -> bool:
    """Tell whether `text` names a registry server."""
    return text.partition("://")[0] in _SCHEMES and "://" in text


def parse_url(text: str) -> ServerUrl:
    """Parse a registry URL.

    Raises:
        ValueError: no host, or an option out of its limits; the message never shows the password.
    """
    parts = urlsplit(text)
    if not parts.hostname:
        raise ValueError("a registry URL needs a host, as in redis://host:6379")
    _ = parts.port  # raises ValueError when it is no port
    own: dict[str, Any] = {}
    others: list[tuple[str, str]] = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _LIMITS:
            others.append((name, value))
            continue
        low, high = _LIMITS[name]
        try:
            own[name] = float(value)
        except ValueError as error:
            raise ValueError(f"{name} in the registry URL must be a number") from error
        if not math.isfinite(own[name]) or not low <= own[name] <= high:
            raise ValueError(f"{name} in the registry URL must be within [{low:g}, {high:g}]")
    url = urlunsplit((_SCHEMES[parts.scheme], parts.netloc, parts.path, urlencode(others), ""))
    entries_max = int(own.pop("entries_max", ENTRIES_MAX))
    return replace(ServerUrl(url, entries_max=entries_max), **own)


def without_secrets(text: str) -> str:
    """Return a URL with user, password and options hidden; other text as it is."""
    if "://" not in text:
        return text
    return _PASSWORD.sub("://(hidden)@", text.partition("?")[0], count=1)
