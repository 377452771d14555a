"""Two hosts as far as the network goes: network namespaces with addresses of their own, joined by a veth pair."""

import os
import subprocess
import sys
import time

import pytest
from ucx_owners import PeerUcxOwner, PeerUcxReader

from kvmarket.testing.networks import ADDRESSES, DEVICES, hosts_or_skip, ip, wait_until_up

PAGES, PAGE_BYTES = 512, 256 << 10
OWNER_DEVICE, READER_DEVICE = DEVICES
OWNER_IP, _ = ADDRESSES


@pytest.fixture
def hosts():
    with hosts_or_skip() as names:
        yield names


@pytest.fixture
def pair(hosts, peers):
    owner_net, reader_net = hosts
    # UCX takes them for one host, for they share the kernel and the IPC namespace; between hosts there is only TCP.
    owner = PeerUcxOwner(peers.spawn(), {"network": owner_net, "UCX_TLS": "tcp"}, addresses=())
    reader = PeerUcxReader(peers.spawn(), {"network": reader_net, "UCX_TLS": "tcp", "options": {"connect_s": 1.0}})
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
    assert path == f"am(tcp/{READER_DEVICE})"
    _, pages, refused, error, wrong = reader.read(lent, generations, 20.0)
    assert (pages, refused, error, wrong) == (PAGES, set(), "", [])


def test_a_cut_wire_is_noticed_within_the_heartbeat_and_a_mended_one_carries_again(pair, hosts):
    _, reader, lent, generations = pair
    reader.connect(lent)
    # A slow wire, so that the cut falls into the transfer: 128 MiB at 400 Mb/s take almost three seconds.
    ip("netns", "exec", hosts[0], "tc", "qdisc", "add", "dev", OWNER_DEVICE, "root", "tbf", "rate", "400mbit", "burst",
       "4mb", "latency", "50ms")  # fmt: skip
    reader.start("read", lent, generations, 20.0)
    time.sleep(0.2)
    ip("-n", hosts[0], "link", "set", OWNER_DEVICE, "down")
    cut = time.monotonic()
    _, pages, _, error, wrong = reader.result()
    assert error in {"PeerGoneError", "TransferError"}
    assert time.monotonic() - cut < 1.5
    assert wrong == []
    assert pages < PAGES, "the cut came too late to cut anything"
    ip("-n", hosts[0], "link", "set", OWNER_DEVICE, "up")
    wait_until_up(hosts)
    _, pages, refused, error, wrong = reader.read(lent, generations, 20.0)
    assert (pages, refused, error, wrong) == (PAGES, set(), "", [])


def test_an_owner_behind_a_dead_wire_cannot_be_connected_to_and_that_is_said_in_time(pair, hosts):
    _, reader, lent, _ = pair
    ip("-n", hosts[0], "link", "set", OWNER_DEVICE, "down")
    began = time.monotonic()
    with pytest.raises(Exception, match=OWNER_IP):
        reader.connect(lent)
    assert time.monotonic() - began < 2
    began = time.monotonic()
    with pytest.raises(Exception, match=r"did not answer a moment ago|does not answer yet"):
        reader.connect(lent)
    assert time.monotonic() - began < 0.3, "the next one does not wait for it again"


def test_the_doctor_tells_how_an_owner_on_the_other_host_is_reached(pair, hosts):
    _, _, lent, _ = pair
    host, port = lent.descriptor.endpoints["ucx"][0]
    environ = {**os.environ, "UCX_TLS": "tcp", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["ip", "netns", "exec", hosts[1], sys.executable, "-m", "kvmarket.cli", "doctor", "--peer"]
    done = subprocess.run(
        [*command, f"{host}:{port}"], env=environ, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert f"UCX lanes: tcp/{READER_DEVICE}; reads are two-sided" in done.stdout
    assert "auto would choose ucx: the peer is on another host" in done.stdout
    ip("-n", hosts[0], "link", "set", OWNER_DEVICE, "down")
    done = subprocess.run(
        [*command, f"{host}:{port}"], env=environ, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"{host}:{port} " in done.stderr
    assert "does not answer" in done.stderr or "cannot be reached" in done.stderr
