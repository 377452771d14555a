"""What UCX can do on this machine, found out by asking it and by trying it; for ``kvmarket doctor``."""

from __future__ import annotations

import ctypes as c
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvmarket.deadline import Deadline
from kvmarket.identity import OwnerInfo
from kvmarket.transport.ucx import UcxTransport
from kvmarket.transport.ucx_api import version
from kvmarket.transport.ucx_settings import ONE_SIDED, is_rdma, lanes_text, reads_one_sided

if TYPE_CHECKING:
    from collections.abc import Mapping

TRY_S = 5.0
_SYSTEM_LIBRARY = "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY"
_COMPONENT_NAME = 1 << 0
_COMPONENT_NAME_BYTES = 16


@dataclass(frozen=True, slots=True)
class UcxFacts:
    """What was found.

    Attributes:
        version: of the UCX that is loaded.
        library: its path.
        components: what it was built with and finds usable: ``tcp``, ``cma``, ``ib``, ...
        rdma_devices: device and port -> state, as the kernel says.
        settings: what kvmarket sets, without the ``UCX_`` prefix.
        user_settings: ``UCX_...`` of the environment, which win.
        lanes: what a connection from this process to this process uses.
        prefers_system: the user asked for the system's UCX rather than the wheel's.
    """

    version: str
    library: str
    components: tuple[str, ...]
    rdma_devices: Mapping[str, str]
    settings: Mapping[str, str]
    user_settings: Mapping[str, str] = field(default_factory=dict)
    lanes: tuple[tuple[str, str], ...] = ()
    prefers_system: bool = False

    def lines(self) -> list[str]:
        """What people want to know, one fact a line."""
        how = "one-sided" if reads_one_sided(self.lanes) else "two-sided"
        devices = ", ".join(f"{name} {state}" for name, state in self.rdma_devices.items())
        return [
            f"UCX {self.version} from {self.library}, with {' '.join(self.components)}",
            f"connected to itself by {lanes_text(self.lanes)}; reads on this host are {how}",
            f"RDMA devices: {devices or 'none'}",
            f"set by kvmarket: {_assignments(self.settings) or 'nothing'}",
            f"set by you: {_assignments(self.user_settings) or 'nothing'}",
        ]

    def advice(self) -> list[str]:
        """What could be better, and how; empty when nothing could."""
        said = self._between_hosts(self.lanes)
        if self.prefers_system and "site-packages" in self.library:
            said.append(
                f"{_SYSTEM_LIBRARY} is set, but the wheel's UCX was loaded: no libucp.so was found by that name"
            )
        return said + _within_host(self.lanes)

    def advice_towards(self, lanes: tuple[tuple[str, str], ...], *, same_host: bool) -> list[str]:
        """What could be better on the way to one peer, connected by `lanes`; empty when nothing could."""
        if same_host:
            return _within_host(lanes)
        said = self._between_hosts(lanes)
        return [f"{text} (the other host needs the same)" for text in said]

    def _between_hosts(self, lanes: tuple[tuple[str, str], ...]) -> list[str]:
        active = [name for name, state in self.rdma_devices.items() if state == "ACTIVE"]
        verbs = "ib" in self.components
        if active and not verbs:
            change = f"install a UCX 1.19 or newer that has, and set {_SYSTEM_LIBRARY}=true"
            return [f"{', '.join(active)} could carry reads between hosts, but this UCX has no verbs: {change}"]
        if verbs and not active:
            return ["this UCX has verbs, but no RDMA device is active: other hosts are read over TCP"]
        if not verbs:
            return ["other hosts are read over TCP: this machine has no RDMA device, and this UCX no verbs"]
        if not any(is_rdma(name) for name, _ in lanes):
            return ["RDMA is there but not used: look at UCX_TLS and UCX_NET_DEVICES"]
        return []


def _within_host(lanes: tuple[tuple[str, str], ...]) -> list[str]:
    if any(name in ONE_SIDED for name, _ in lanes):
        return []
    why = "UCX_TLS excludes it, or ptrace access is denied; KVMARKET_TRANSPORT=shm does not need it"
    return [f"processes of this host do not read each other's memory through UCX (no CMA lane): {why}"]


def gather(environ: Mapping[str, str]) -> UcxFacts:
    """Start UCX, ask it and connect it to itself.

    Raises:
        MissingExtraError, TransportUnavailableError: UCX does not start.
    """
    environ = dict(environ)  # as it is before ucxx adds to it
    owner = OwnerInfo(0, os.urandom(16), os.getpid(), 0, "", "here")
    server, reader = UcxTransport(environ, addresses=("127.0.0.1",)), UcxTransport(environ)
    try:
        lanes = reader.peer(owner, server.serve(owner.incarnation), Deadline(TRY_S)).lanes
        return facts_of(environ, reader.settings, lanes)
    finally:
        reader.close()
        server.close()


def facts_of(environ: Mapping[str, str], settings: Mapping[str, str], lanes: tuple[tuple[str, str], ...]) -> UcxFacts:
    """Ask UCX, which must be loaded, about everything but `lanes`; `environ` is as it was before ucxx was loaded."""
    return UcxFacts(
        version=version(),
        library=_library(),
        components=components(),
        rdma_devices=rdma_devices(),
        settings=dict(settings),
        user_settings={name: environ[name] for name in sorted(environ) if name.startswith("UCX_")},
        lanes=lanes,
        prefers_system=environ.get(_SYSTEM_LIBRARY, "false").lower() not in {"false", "0", "no", ""},
    )


class _ComponentAttributes(c.Structure):
    _fields_ = (
        ("field_mask", c.c_uint64),
        ("name", c.c_char * _COMPONENT_NAME_BYTES),
        ("md_resource_count", c.c_uint),
        ("md_resources", c.c_void_p),
        ("flags", c.c_uint64),
        ("md_vfs_name", c.c_char * 64),
    )


def components() -> tuple[str, ...]:
    """Ask UCX what it has to move bytes with; ucxx must be loaded."""
    library = c.CDLL("libuct.so.0")
    library.uct_component_query.argtypes = (c.c_void_p, c.c_void_p)
    library.uct_release_component_list.argtypes = (c.c_void_p,)
    listed, count = c.POINTER(c.c_void_p)(), c.c_uint()
    if library.uct_query_components(c.byref(listed), c.byref(count)):
        return ()
    found = []
    for index in range(count.value):
        attributes = _ComponentAttributes(field_mask=_COMPONENT_NAME)
        if library.uct_component_query(listed[index], c.byref(attributes)) == 0:
            found.append(attributes.name.decode())
    library.uct_release_component_list(listed)
    return tuple(found)


def rdma_devices(directory: Path = Path("/sys/class/infiniband")) -> dict[str, str]:
    """Return the kernel's RDMA devices: ``device:port`` -> state (``ACTIVE``, ``DOWN``, ...)."""
    found = {}
    for state in sorted(directory.glob("*/ports/*/state")):
        port, device = state.parent.name, state.parents[2].name
        found[f"{device}:{port}"] = state.read_text().partition(":")[2].strip()
    return found


def _library() -> str:
    """Return the path of the libucp that this process uses."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/libucp.so" in line:
            return line.split(maxsplit=5)[5]
    return "an unknown place"


def _assignments(settings: Mapping[str, str]) -> str:
    return " ".join(f"{name if name.startswith('UCX_') else f'UCX_{name}'}={value}" for name, value in settings.items())
