"""UCX's own settings that kvmarket chooses where the user has not, and why.

They are handed to the UCX context; the process's environment is not touched. What the user set in the environment
(``UCX_...``) always wins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

DEFAULTS: dict[str, str] = {
    # Shared memory and CMA take part in connections that detect a dead peer only with these two.
    "MM_ERROR_HANDLING": "y",
    "CMA_MEMORY_INVALIDATE": "y",
    # ucxx restricts rendezvous to one rail and stages fragments in GPU memory: much slower from host memory.
    "MAX_RNDV_RAILS": "2",
    "RNDV_FRAG_MEM_TYPE": "host",
    "TCP_TX_SEG_SIZE": "1M",
    "TCP_RX_SEG_SIZE": "1M",
    # A peer whose host vanished is noticed by UCX itself, also while nothing is being read.
    "KEEPALIVE_INTERVAL": "1s",
    # Without it reads of a peer's GPU memory are emulated in software.
    "CUDA_IPC_ENABLE_GET_ZCOPY": "on",
}
SHARED_MEMORY = frozenset({"cma", "posix", "sysv", "xpmem", "knem"})
ONE_SIDED = frozenset({"cma", "xpmem", "knem"})
REQUIREMENTS = ("", "rdma", "shm", "one_sided", "no_host_bounce")


def ucx_settings(environ: Mapping[str, str], *, ipv6: bool = False) -> dict[str, str]:
    """Return the settings to apply (without the ``UCX_`` prefix): ours less what `environ` already names.

    With `ipv6` lanes have IPv6 addresses also where a device has both kinds, see `kvmarket.transport.ucx_listen`.
    """
    ours = DEFAULTS | ({"TCP_AF_PRIO": "inet6,inet"} if ipv6 else {})
    return {name: value for name, value in ours.items() if f"UCX_{name}" not in environ}


def is_rdma(transport: str) -> bool:
    """Tell whether a lane's transport is a network card's own."""
    return transport.partition("_")[0] in {"rc", "dc", "ud", "gga", "srd"}


def reads_one_sided(lanes: tuple[tuple[str, str], ...]) -> bool:
    """Tell whether one-sided reads on these lanes need no CPU of the peer's (over TCP they are emulated by it)."""
    return any(name in ONE_SIDED or (is_rdma(name) and not name.startswith("ud")) for name, _ in lanes)


def lanes_text(lanes: tuple[tuple[str, str], ...]) -> str:
    """Return the lanes for reports; a lane without a device only sets connections up and is left out."""
    return "+".join(sorted({f"{name}/{device}" for name, device in lanes if device})) or "none"


def missing_requirement(require: str, lanes: tuple[tuple[str, str], ...]) -> str | None:
    """Return why `lanes` do not fulfil a requirement, or None when they do."""
    have = {name for name, device in lanes if device}
    if require == "rdma" and not any(map(is_rdma, have)):
        return (
            f"require=rdma, but the connection uses {lanes_text(lanes)}: either this UCX has no verbs (the wheels have "
            "none; set RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true with a UCX that does), or there is no active RDMA "
            "device on both hosts (see ibv_devinfo), or UCX_TLS / UCX_NET_DEVICES exclude it"
        )
    if require == "shm" and not have & SHARED_MEMORY:
        return (
            f"require=shm, but the connection uses {lanes_text(lanes)}: the peer is on another host, or in other IPC "
            "or PID namespaces (share them between the containers), or UCX_TLS excludes shared memory"
        )
    if require == "one_sided" and not reads_one_sided(lanes):
        return (
            f"require=one_sided, but the connection uses {lanes_text(lanes)}: one-sided reads need RDMA, or CMA with "
            "ptrace access on one host"
        )
    return None
