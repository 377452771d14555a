"""Listening on IPv6, which ucxx's own listener does not, and the addresses that an owner announces.

A process uses one kind of addresses. UCX gives each network device one address for its lanes, IPv4 where it has both
kinds, and a connection made over the other kind fails, or worse: with UCX 1.21 on a device of both kinds an owner that
took a connection over IPv6 overwrote its own heap. So what listens, connects and is announced is of the kind of lanes.
"""

from __future__ import annotations

import ctypes as c
import ipaddress
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from kvmarket.transport import ucx_api as api

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

IPV6_TABLE = Path("/proc/net/if_inet6")
_SOCK_ADDR, _CONN_HANDLER = 1 << 0, 1 << 2
_STORAGE_BYTES = 128
_ConnCallback = c.CFUNCTYPE(None, c.c_void_p, c.c_void_p)
_IFA_UNUSABLE = 0x01 | 0x08 | 0x20 | 0x40
"""Flags of IPv6 addresses that are temporary, another host's as well, on their way out, or not yet in use."""


class _SockaddrIn6(c.Structure):
    _fields_ = (
        ("family", c.c_uint16),
        ("port", c.c_uint16),
        ("flowinfo", c.c_uint32),
        ("address", c.c_uint8 * 16),
        ("scope", c.c_uint32),
    )


class _ListenerParams(c.Structure):
    """``ucp_listener_params_t``."""

    _fields_ = (
        ("field_mask", c.c_uint64),
        ("address", c.c_void_p),
        ("address_bytes", c.c_uint32),
        ("accept_callback", c.c_void_p),
        ("accept_argument", c.c_void_p),
        ("conn_callback", _ConnCallback),
        ("conn_argument", c.c_void_p),
    )


class _ListenerAttr(c.Structure):
    """``ucp_listener_attr_t``."""

    _fields_ = (("field_mask", c.c_uint64), ("address", c.c_uint8 * _STORAGE_BYTES))


class Listener6:
    """Listens on a free port of every IPv6 address of this host; made and closed with the driver's turn.

    Args:
        worker: handle of the UCX worker that listens.
        on_request: given each connection request, from within the worker's progress.

    Attributes:
        port: which port it is.

    Raises:
        UcxError: this host has no IPv6.
    """

    def __init__(self, worker: int, on_request: Callable[[int], None]) -> None:
        library = api.libucp()
        library.ucp_listener_create.argtypes = (c.c_void_p, c.POINTER(_ListenerParams), c.POINTER(c.c_void_p))
        library.ucp_listener_query.argtypes = (c.c_void_p, c.POINTER(_ListenerAttr))
        library.ucp_listener_destroy.argtypes, library.ucp_listener_destroy.restype = (c.c_void_p,), None
        self._callback = _ConnCallback(lambda request, _: on_request(request))
        any_address = _SockaddrIn6(family=socket.AF_INET6)
        params = _ListenerParams(_SOCK_ADDR | _CONN_HANDLER, c.addressof(any_address), c.sizeof(any_address))
        params.conn_callback = self._callback
        self._handle = c.c_void_p()
        status = library.ucp_listener_create(worker, c.byref(params), c.byref(self._handle))
        api.check("ucp_listener_create on IPv6", status)
        attributes = _ListenerAttr(field_mask=_SOCK_ADDR)
        api.check("ucp_listener_query", library.ucp_listener_query(self._handle, c.byref(attributes)))
        self.port = int.from_bytes(bytes(attributes.address[2:4]), "big")

    def close(self) -> None:
        """Take no more connections. Idempotent."""
        if self._handle.value:
            api.libucp().ucp_listener_destroy(self._handle)
            self._handle = c.c_void_p()


def is_ipv6(address: str) -> bool:
    """Tell the kind of a numeric address."""
    return ipaddress.ip_address(address).version == 6  # noqa: PLR2004 - its name


def uses_ipv6(environ: Mapping[str, str], addresses: tuple[str, ...]) -> bool:
    """Tell the kind of addresses for a process, IPv4 unless one of these says otherwise.

    They are: the user's choice of lanes; the addresses to announce, if all are IPv6; a host that has nothing else.
    """
    chosen = environ.get("UCX_TCP_AF_PRIO")
    if chosen is not None:
        return chosen.strip().startswith("inet6")
    if addresses:
        return all(map(is_ipv6, addresses))
    return not _beyond(_ipv4_addresses()) and bool(_beyond(_ipv6_addresses(IPV6_TABLE)))


def host_addresses(*, ipv6: bool, table: Path = IPV6_TABLE) -> tuple[str, ...]:
    """Return the addresses of one kind of this host's interfaces; loopback only when there is no other.

    IPv6 addresses are those that other hosts can use as they are: neither link-local nor about to vanish.
    """
    if ipv6:
        return _beyond(_ipv6_addresses(table)) or ("::1",)
    return _beyond(_ipv4_addresses()) or ("127.0.0.1",)


def _beyond(addresses: list[str]) -> tuple[str, ...]:
    return tuple(address for address in addresses if not ipaddress.ip_address(address).is_loopback)


def _ipv4_addresses() -> list[str]:
    import fcntl
    import struct

    found: list[str] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue  # an interface without an IPv4 address
            found.append(socket.inet_ntoa(answer[20:24]))
    return found


def _ipv6_addresses(table: Path) -> list[str]:
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return []  # no IPv6 here
    found: list[str] = []
    for line in lines:
        digits, _index, _prefix, scope, flags, _name = line.split()
        if int(scope, 16) == 0 and not int(flags, 16) & _IFA_UNUSABLE:
            found.append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found
