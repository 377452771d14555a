"""Two hosts as far as the network goes: network namespaces with addresses of their own, joined by a veth pair."""

import os
import shutil
import subprocess
import time

import pytest
from ucx_owners import PeerUcxOwner, PeerUcxReader

PAGES, PAGE_BYTES = 512, 256 << 10
OWNER_IP, READER_IP = "10.77.41.1", "10.77.41.2"


IP = shutil.which("ip") or ""


def ip(*arguments):
    subprocess.run([IP, *arguments], check=True, capture_output=True, timeout=10)


def wait_until_up(*ends):
    """Wait until links carry packets: the kernel activates them up to a second after they were set up."""
    limit = time.monotonic() + 10
    for name, device in ends:
        state = ""
        while "state UP" not in state:
            assert time.monotonic() < limit, f"{device} does not come up: {state}"
            time.sleep(0.02)
            shown = [IP, "-n", name, "link", "show", device]
            state = subprocess.run(shown, check=True, capture_output=True, text=True, timeout=10).stdout


@pytest.fixture
def hosts():
    """Names of two network namespaces; the owner's end of the wire is `veth-o`, the reader's `veth-r`."""
    if os.geteuid() != 0 or not IP:
        pytest.skip("making network namespaces takes root and the ip command")
    tag = f"kvm{os.getpid()}"
    owner, reader = f"{tag}o", f"{tag}r"
    try:
        ip("netns", "add", owner)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    try:
        ip("netns", "add", reader)
        ip("link", "add", "veth-o", "netns", owner, "type", "veth", "peer", "name", "veth-r", "netns", reader)
        for name, device, address in ((owner, "veth-o", OWNER_IP), (reader, "veth-r", READER_IP)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        wait_until_up((owner, "veth-o"), (reader, "veth-r"))
        yield owner, reader
    finally:
        for name in (owner, reader):
            subprocess.run([IP, "netns", "del", name], check=False, capture_output=True, timeout=10)


@pytest.fixture
def pair(hosts, peers):
    owner_net, reader_net = hosts
    # UCX takes them for one host, for they share the kernel and the IPC namespace; between hosts there is only TCP.
    owner = PeerUcxOwner(peers.spawn(), {"network": owner_net, "UCX_TLS": "tcp"}, addresses=())
    reader = PeerUcxReader(peers.spawn(), {"network": reader_net, "UCX_TLS": "tcp"})
    try:
        lent = owner.lend_pattern(PAGES, PAGE_BYTES)
    except PermissionError as error:
        pytest.skip(f"a process cannot move into a network namespace here: {error}")
    generations = owner.validate(0, list(range(PAGES)))
    return owner, reader, lent, generations


def test_pages_cross_from_one_host_to_the_other(pair):
    _, reader, lent, generations = pair
    assert [address for address, _ in lent.descriptor.endpoints["ucx"]] == [OWNER_IP]
    path = reader.connect(lent)
    assert path == "am(tcp/veth-r)"
    _, pages, refused, error, wrong = reader.read(lent, generations, 20.0)
    assert (pages, refused, error, wrong) == (PAGES, set(), "", [])


def test_a_cut_wire_is_noticed_within_the_heartbeat_and_a_mended_one_carries_again(pair, hosts):
    _, reader, lent, generations = pair
    reader.connect(lent)
    # A slow wire, so that the cut falls into the transfer: 128 MiB at 400 Mb/s take almost three seconds.
    ip("netns", "exec", hosts[0], "tc", "qdisc", "add", "dev", "veth-o", "root", "tbf", "rate", "400mbit", "burst",
       "4mb", "latency", "50ms")  # fmt: skip
    reader.start("read", lent, generations, 20.0)
    time.sleep(0.2)
    ip("-n", hosts[0], "link", "set", "veth-o", "down")
    cut = time.monotonic()
    _, pages, _, error, wrong = reader.result()
    assert error in {"PeerGoneError", "TransferError"}
    assert time.monotonic() - cut < 1.5
    assert wrong == []
    assert pages < PAGES, "the cut came too late to cut anything"
    ip("-n", hosts[0], "link", "set", "veth-o", "up")
    wait_until_up((hosts[0], "veth-o"), (hosts[1], "veth-r"))
    _, pages, refused, error, wrong = reader.read(lent, generations, 20.0)
    assert (pages, refused, error, wrong) == (PAGES, set(), "", [])


def test_an_owner_behind_a_dead_wire_cannot_be_connected_to_and_that_is_said_in_time(pair, hosts):
    _, reader, lent, _ = pair
    ip("-n", hosts[0], "link", "set", "veth-o", "down")
    began = time.monotonic()
    with pytest.raises(Exception, match=OWNER_IP):
        reader.connect(lent)
    assert time.monotonic() - began < 2
