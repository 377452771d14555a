"""Network addresses as users write them: ``HOST:PORT`` or ``[IPv6]:PORT``."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[^:/\s\[\]]+)):(?P<port>[0-9]{1,5})")
_PORTS = 1 << 16


def parse_address(text: str) -> tuple[str, int] | None:
    """Return the host and port of ``HOST:PORT`` or ``[IPv6]:PORT``, or None for what is neither."""
    match = _ADDRESS.fullmatch(text)
    if match is None or int(match["port"]) >= _PORTS:
        return None
    return match["v6"] or match["host"], int(match["port"])


def listening_address(text: str) -> tuple[str, int]:
    """Return host and port of ``PORT`` (of the loopback address), ``HOST:PORT`` or ``[IPv6]:PORT``.

    Raises:
        ValueError: it is neither.
    """
    address = parse_address(f"127.0.0.1:{text}" if ":" not in text else text)
    if address is None:
        raise ValueError("must be PORT, HOST:PORT or [IPv6]:PORT")
    return address
