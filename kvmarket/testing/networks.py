"""Separate hosts as far as the network goes: network namespaces with addresses of their own, joined by a veth pair.

Takes root and the ``ip`` command; Linux only.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CLONE_NEWNET, _CLONE_NEWNS, _MS_REC, _MS_SLAVE, _MNT_DETACH = 0x40000000, 0x00020000, 0x4000, 0x80000, 2
_COMMAND_S = 10.0
UP_S = 10.0
SWITCHED, SWITCHED_DEVICE = "10.77.42", "veth-s"

DEVICES = ("veth-o", "veth-r")
ADDRESSES = ("10.77.41.1", "10.77.41.2")


class NetworksUnavailableError(RuntimeError):
    """Namespaces cannot be made here; the message says why."""


def ip(*arguments: str) -> str:
    """Run ``ip`` and return what it printed.

    Raises:
        NetworksUnavailableError: it is not installed, or it failed.
    """
    command = shutil.which("ip")
    if command is None or os.geteuid() != 0:
        raise NetworksUnavailableError("making network namespaces takes root and the ip command")
    try:
        done = subprocess.run(  # noqa: S603 - our own arguments
            [command, *arguments], check=True, capture_output=True, text=True, timeout=_COMMAND_S
        )
    except subprocess.CalledProcessError as error:
        raise NetworksUnavailableError(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from error
    return done.stdout


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Make two namespaces whose `DEVICES` with `ADDRESSES` are the ends of one wire, and yield their names.

    Raises:
        NetworksUnavailableError: this machine does not allow it.
    """
    names = (f"kvm{os.getpid()}o", f"kvm{os.getpid()}r")
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        here, there = DEVICES
        ip("link", "add", here, "netns", names[0], "type", "veth", "peer", "name", there, "netns", names[1])
        for name, device, address in zip(names, DEVICES, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        wait_until_up(names)
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


@contextmanager
def switched_hosts(count: int) -> Iterator[tuple[list[str], str]]:
    """Make namespaces on one switch and yield their names, and the address of this host there.

    Raises:
        NetworksUnavailableError: this machine does not allow it.
    """
    names = [f"kvm{os.getpid()}s{number}" for number in range(count)]
    switch, made = f"kvmsw{os.getpid()}", []
    try:
        ip("link", "add", switch, "type", "bridge")
        made.append(("link", "del", switch))
        ip("addr", "add", f"{SWITCHED}.254/24", "dev", switch)
        ip("link", "set", switch, "up")
        for number, name in enumerate(names):
            ip("netns", "add", name)
            made.append(("netns", "del", name))
            port = f"kvm{os.getpid()}p{number}"
            ip("link", "add", SWITCHED_DEVICE, "netns", name, "type", "veth", "peer", "name", port)
            ip("link", "set", port, "master", switch, "up")
            ip("-n", name, "addr", "add", f"{SWITCHED}.{number + 1}/24", "dev", SWITCHED_DEVICE)
            ip("-n", name, "link", "set", SWITCHED_DEVICE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        wait_until_up(names, [SWITCHED_DEVICE] * count)
        yield names, f"{SWITCHED}.254"
    finally:
        for command in reversed(made):
            ip(*command)


@contextmanager
def hosts_or_skip() -> Iterator[tuple[str, str]]:
    """`two_hosts` for a fixture: its tests are skipped, with the reason, where the machine does not allow it."""
    import pytest

    try:
        with two_hosts() as names:
            yield names
    except NetworksUnavailableError as error:
        pytest.skip(str(error))


def wait_until_up(names: Sequence[str], devices: Sequence[str] = DEVICES) -> None:
    """Wait until the wire carries packets: the kernel activates it up to a second after its ends were set up."""
    limit = time.monotonic() + UP_S
    for name, device in zip(names, devices, strict=True):
        while "state UP" not in (state := ip("-n", name, "link", "show", device)):
            if time.monotonic() > limit:
                raise NetworksUnavailableError(f"{device} does not come up: {state}")
            time.sleep(0.02)


def enter_network(name: str) -> None:
    """Move this process, which must have one thread, into a named network namespace, as ``ip netns exec`` does.

    Programs look for devices in /sys/class/net, which shows the namespace it was mounted in: it is mounted anew.

    Raises:
        OSError: the kernel does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def must(result: int, what: str) -> None:
        if result:
            code = ctypes.get_errno()
            raise OSError(code, f"{what}: {os.strerror(code)}")

    fd = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        must(libc.setns(fd, _CLONE_NEWNET), f"setns {name}")
    finally:
        os.close(fd)
    must(libc.unshare(_CLONE_NEWNS), "unshare mounts")
    must(libc.mount(b"", b"/", b"none", _MS_SLAVE | _MS_REC, None), "mount --make-rslave /")
    libc.umount2(b"/sys", _MNT_DETACH)
    must(libc.mount(name.encode(), b"/sys", b"sysfs", 0, None), "mount /sys")
