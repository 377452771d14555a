"""IPv6: an owner listens on its addresses, announces those that others can use, and is read through them."""

import os

import numpy as np
import pytest
from ucx_owners import PeerUcxOwner, PeerUcxReader, UcxReader

from kvmarket.errors import TransportUnavailableError
from kvmarket.testing.networks import DEVICES, hosts_or_skip, ip
from kvmarket.transport.ucx import UcxTransport
from kvmarket.transport.ucx_listen import host_addresses, is_ipv6, uses_ipv6
from kvmarket.transport.ucx_settings import ucx_settings

PAGES, PAGE_BYTES = 64, 64 << 10
NO_TEMPORARY = """\
00000000000000000000000000000001 01 80 10 80       lo
fe8000000000000000fc00fffe000001 04 40 20 80     eth0
fd000000000000000000000000000002 04 40 00 82     eth0
fd0000000000000000000000000000aa 04 40 00 01     eth0
fd0000000000000000000000000000bb 04 40 00 20     eth0
fd0000000000000000000000000000cc 04 40 00 40     eth0
"""
has_ipv6 = pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="this host has no IPv6")  # noqa: PTH110


@pytest.mark.without_ucxx
def test_announced_are_addresses_that_other_hosts_can_use(tmp_path):
    table = tmp_path / "if_inet6"
    table.write_text(NO_TEMPORARY)
    assert host_addresses(ipv6=True, table=table) == ("fd00::2",)
    assert host_addresses(ipv6=True, table=tmp_path / "none") == ("::1",)
    assert not any(map(is_ipv6, host_addresses(ipv6=False)))


@pytest.mark.without_ucxx
def test_one_kind_of_addresses_is_used_and_the_user_decides_which():
    assert not uses_ipv6({}, ("10.0.0.1",))
    assert not uses_ipv6({}, ("10.0.0.1", "fd00::1"))
    assert uses_ipv6({}, ("fd00::1",))
    assert uses_ipv6({"UCX_TCP_AF_PRIO": "inet6,inet"}, ("10.0.0.1",))
    assert not uses_ipv6({"UCX_TCP_AF_PRIO": "inet,inet6"}, ("fd00::1",))
    assert ucx_settings({}, ipv6=True)["TCP_AF_PRIO"] == "inet6,inet"
    assert "TCP_AF_PRIO" not in ucx_settings({})


@has_ipv6
@pytest.mark.parametrize("lanes", ["tcp", "all"])
def test_pages_are_read_from_an_owner_that_only_has_ipv6(peers, monkeypatch, lanes):
    environ = {"UCX_TLS": lanes}
    monkeypatch.setenv("UCX_TLS", lanes)
    owner = PeerUcxOwner(peers.spawn(), environ, addresses=("::1",))
    lent = owner.lend_pattern(PAGES, PAGE_BYTES)
    generations = owner.validate(0, list(range(PAGES)))
    ((address, port),) = lent.descriptor.endpoints["ucx"]
    assert address == "::1"
    assert port
    reader = UcxReader(addresses=("::1",))
    try:
        assert reader.connect(lent).startswith("am(tcp" if lanes == "tcp" else "cma(")
        _, pages, refused, error, wrong = reader.read(lent, generations, 20.0)
        assert (pages, refused, error, wrong) == (PAGES, set(), "", [])
    finally:
        reader.transport.close()


@has_ipv6
def test_connections_over_the_other_kind_of_addresses_are_refused_before_ucx_sees_them(peers):
    """On a device of both kinds UCX overwrites memory when it takes one."""
    owner = PeerUcxOwner(peers.spawn(), addresses=("::1", "127.0.0.1"))
    lent = owner.lend_pattern(PAGES, PAGE_BYTES)
    ((address, port),) = lent.descriptor.endpoints["ucx"]
    assert address == "127.0.0.1"
    assert not listening(port)
    reader = UcxReader(addresses=("::1",))
    try:
        with pytest.raises(TransportUnavailableError, match="it has IPv4, and UCX uses IPv6 here"):
            reader.connect(lent)
    finally:
        reader.transport.close()


@has_ipv6
def test_an_owner_that_stops_serving_does_not_listen_any_more():
    transport = UcxTransport(os.environ, addresses=("::1",))
    try:
        ((_, port),) = transport.serve(bytes(16))
        assert listening(port)
        transport.stop_serving()
        assert not listening(port)
    finally:
        transport.close()


def listening(port):
    """Tell whether anybody listens on a port over IPv6, as the kernel says."""
    with open("/proc/net/tcp6") as table:  # noqa: PTH123 - not a file on any disk
        sockets = [line.split() for line in table.readlines()[1:]]
    return any(fields[1].endswith(f":{port:04X}") and fields[3] == "0A" for fields in sockets)


@has_ipv6
def test_hosts_that_share_only_ipv6_reach_each_other(peers):
    with hosts_or_skip() as names:
        for number, (name, device) in enumerate(zip(names, DEVICES, strict=True), 1):
            ip("-n", name, "-6", "addr", "add", f"fd00:77::{number}/64", "dev", device, "nodad")
            ip("-n", name, "-4", "addr", "flush", "dev", device)
        owner = PeerUcxOwner(peers.spawn(), {"network": names[0], "UCX_TLS": "tcp"}, addresses=())
        reader = PeerUcxReader(peers.spawn(), {"network": names[1], "UCX_TLS": "tcp"})
        try:
            lent = owner.lend_pattern(PAGES, PAGE_BYTES)
        except PermissionError as error:
            pytest.skip(f"a process cannot move into a network namespace here: {error}")
        assert [address for address, _ in lent.descriptor.endpoints["ucx"]] == ["fd00:77::1"]
        generations = owner.validate(0, list(range(PAGES)))
        assert reader.connect(lent) == f"am(tcp/{DEVICES[1]})"
        _, pages, refused, error, wrong = reader.read(lent, np.asarray(generations), 20.0)
        assert (pages, refused, error, wrong) == (PAGES, set(), "", [])
