"""What `kvmarket doctor` says of UCX: what is here, how each owner would be reached, and what to change."""

import asyncio
import importlib.util
import os
import socket
import subprocess
import sys
import time

import pytest
from ucx_owners import PeerUcxOwner

from kvmarket import MarketConfig, Marketplace, diagnosis
from kvmarket.testing.samples import SPEC, sample_kv, sample_tokens
from kvmarket.transport import ucx_facts
from kvmarket.transport.ucx_facts import UcxFacts

SHARED = (("cma", "memory"), ("tcp", "lo"))


def facts(components=("tcp", "cma"), devices=None, lanes=SHARED, library="/opt/ucx/libucp.so.0", **more):
    return UcxFacts("1.21.0", library, components, devices or {}, {}, lanes=lanes, **more)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (facts(), "read over TCP: this machine has no RDMA device, and this UCX no verbs"),
        (facts(devices={"mlx5_0:1": "ACTIVE"}), "mlx5_0:1 could carry reads between hosts, but this UCX has no verbs"),
        (facts(("tcp", "cma", "ib"), {"mlx5_0:1": "DOWN"}), "no RDMA device is active"),
        (facts(("tcp", "cma", "ib"), {"mlx5_0:1": "ACTIVE"}), "RDMA is there but not used"),
        (facts(lanes=(("tcp", "lo"),)), "no CMA lane"),
        (facts(library="/x/site-packages/libucp.so", prefers_system=True), "the wheel's UCX was loaded"),
    ],
)
def test_advice_says_what_is_missing_and_what_to_do(found, wanted):
    assert wanted in "\n".join(found.advice())


def test_where_nothing_can_be_better_there_is_no_advice():
    best = facts(("tcp", "cma", "ib"), {"mlx5_0:1": "ACTIVE"}, (*SHARED, ("rc_mlx5", "mlx5_0:1")))
    assert best.advice() == []


def test_devices_are_read_from_the_kernel(tmp_path):
    for device, state in (("mlx5_0", "4: ACTIVE"), ("rxe0", "1: DOWN")):
        port = tmp_path / device / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
    assert ucx_facts.rdma_devices(tmp_path) == {"mlx5_0:1": "ACTIVE", "rxe0:1": "DOWN"}
    assert ucx_facts.rdma_devices(tmp_path / "absent") == {}


def test_the_facts_are_what_ucx_itself_says():
    found = ucx_facts.gather({"UCX_TCP_TX_SEG_SIZE": "2M"})
    assert {"tcp", "cma"} <= set(found.components)
    assert os.path.exists(found.library)  # noqa: PTH110 - a name that the kernel gave
    assert found.settings["MM_ERROR_HANDLING"] == "y"
    assert found.user_settings == {"UCX_TCP_TX_SEG_SIZE": "2M"}
    assert "TCP_TX_SEG_SIZE" not in found.settings
    assert any("connected to itself by cma/memory" in line for line in found.lines())


@pytest.mark.without_ucxx
def test_without_ucxx_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (said,) = diagnosis.check_ucx(MarketConfig(), {})
    assert "kvmarket[ucx]" in said


async def test_the_command_shows_every_way_to_a_live_owner(tmp_path):
    tmp_path.chmod(0o700)
    config = MarketConfig(runtime_dir=str(tmp_path), transport="ucx", arena_bytes=4 << 20, registry_bytes=16 << 20)
    async with Marketplace("model", SPEC, config=config) as market:
        tokens = sample_tokens(1, 4)
        await market.publish(tokens, sample_kv(tokens))
        command = [sys.executable, "-m", "kvmarket.cli", "doctor"]
        environ = {**os.environ, "KVMARKET_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        environ = {name: value for name, value in environ.items() if not name.startswith("UCX_")}
        done = await asyncio.to_thread(
            subprocess.run, command, env=environ, check=True, capture_output=True, text=True, timeout=60
        )
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "set by you: nothing" in lines
    assert "WARN" not in done.stdout
    assert "inproc no: the owner is another process" in lines
    assert "shm yes: mmap(memfd)" in lines
    assert any(line.startswith("ucx yes: cma(cma/memory") for line in lines)
    assert any("region 0" in line and "by shm" in line for line in lines), "auto takes shared memory on one host"


def doctor_peer(peer, tmp_path, **environ):
    """Run the command; return its exit status, its lines with single spaces, its errors, and its seconds."""
    command = [sys.executable, "-m", "kvmarket.cli", "doctor", "--peer", str(peer)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    own |= {"KVMARKET_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), **environ}
    began = time.monotonic()
    done = subprocess.run(command, env=own, check=False, capture_output=True, text=True, timeout=90)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    return done.returncode, lines, done.stderr, time.monotonic() - began


@pytest.fixture
def listening(peers):
    """An owner in a process of its own, and the port it listens at."""
    owner = PeerUcxOwner(peers.spawn())
    lent = owner.lend_pattern(4, 4096)
    return owner, lent.descriptor.endpoints["ucx"][0][1]


def test_a_peer_by_its_address_is_connected_to_though_it_is_a_stranger(listening, tmp_path):
    owner, port = listening
    status, lines, errors, _ = doctor_peer(f"127.0.0.1:{port}", tmp_path)
    said = "\n".join(lines)
    assert status == 0, errors
    assert f"an owner answers at 127.0.0.1:{port} after" in said
    assert "then with a round trip of" in said
    assert "UCX lanes: cma/memory+" in said
    assert "reads are one-sided" in said
    assert "it does not serve strangers (another incarnation listens here)" in said
    assert "auto would choose shm: it is on this host" in said
    assert "to change" not in said
    limit = time.monotonic() + 10
    while owner.sessions() and time.monotonic() < limit:
        time.sleep(0.05)
    assert owner.sessions() == 0, "the doctor left its connection there"


def test_lanes_towards_a_peer_are_the_ones_of_the_connection_and_requirements_are_judged(listening, tmp_path):
    _, port = listening
    status, lines, errors, _ = doctor_peer(f"localhost:{port}", tmp_path, UCX_TLS="tcp", KVMARKET_UCX_REQUIRE="rdma")
    said = "\n".join(lines)
    assert status == 0, errors
    assert "UCX lanes: tcp/" in said
    assert "reads are two-sided" in said
    assert "UCX found no shared memory with it" in said
    assert "refused by KVMARKET_UCX_REQUIRE: require=rdma, but the connection uses tcp/" in said
    assert "to change: processes of this host do not read each other's memory through UCX (no CMA lane)" in said


def test_where_nothing_listens_that_is_the_error(tmp_path):
    with socket.socket() as bound:  # taken, so that nobody else listens there, and not listening
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        status, _, errors, seconds = doctor_peer(f"127.0.0.1:{port}", tmp_path)
    assert status == 1
    assert f"127.0.0.1:{port} refuses connections: nothing listens there" in errors
    assert "Traceback" not in errors
    assert seconds < 60


def test_what_is_no_owner_is_told_from_one_within_the_limit(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        status, _, errors, seconds = doctor_peer(f"127.0.0.1:{port}", tmp_path)
    assert status == 1
    assert f"127.0.0.1:{port} takes connections but is no kvmarket owner, or one that is stopped" in errors
    assert seconds < 60


@pytest.mark.parametrize("peer", ["no-such-host.invalid:7000", "127.0.0.1:0", "7", "a b"])
def test_peers_that_cannot_be_are_named(peer, tmp_path):
    tmp_path.chmod(0o700)
    status, _, errors, _ = doctor_peer(peer, tmp_path)
    assert status == 1
    assert (
        "unknown host 'no-such-host.invalid'" if "invalid" in peer else "nor a live owner; live owners: none"
    ) in errors


def owner_config(tmp_path, **changes):
    tmp_path.chmod(0o700)
    return MarketConfig(
        runtime_dir=str(tmp_path), transport="ucx", arena_bytes=4 << 20, registry_bytes=16 << 20,
        ucx_addresses="127.0.0.1", **changes,
    )  # fmt: skip


async def doctor_of_an_owner(config, tmp_path, **environ):
    """Run the command on a marketplace of this process that has published something."""
    async with Marketplace("model", SPEC, config=config) as market:
        tokens = sample_tokens(1, 4)
        await market.publish(tokens, sample_kv(tokens))
        name = f"{socket.gethostname()}/pid {os.getpid()}"
        return await asyncio.to_thread(doctor_peer, name, tmp_path, KVMARKET_TRANSPORT="ucx", **environ)


async def test_an_owner_with_a_secret_is_reached_by_who_has_it(tmp_path):
    config = owner_config(tmp_path, secret="s" * 32)
    status, lines, errors, _ = await doctor_of_an_owner(config, tmp_path, KVMARKET_SECRET="s" * 32)
    assert status == 0, errors
    assert "it serves only readers that prove to have its secret" in lines
    assert any(line.startswith("ucx yes: cma(cma/memory") for line in lines)
    _, lines, _, _ = await doctor_of_an_owner(config, tmp_path, KVMARKET_SECRET="t" * 32)
    assert any(line.startswith("ucx no:") and "another secret" in line for line in lines), lines


async def test_an_owner_of_the_registry_is_looked_at_by_every_way(tmp_path):
    status, lines, errors, _ = await doctor_of_an_owner(owner_config(tmp_path), tmp_path)
    said = "\n".join(lines)
    assert status == 0, errors
    assert "shm yes: mmap(memfd)" in lines
    assert "ucx yes: cma(cma/memory" in said
    assert "auto would choose shm, mmap(memfd): not reached by inproc" in said
    assert "but KVMARKET_TRANSPORT=ucx is set: only that is used" in said
    assert "an owner answers at 127.0.0.1:" in said
    assert "refuse" not in said
