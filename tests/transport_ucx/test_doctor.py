"""What `kvmarket doctor` says of UCX: what is here, how each owner would be reached, and what to change."""

import asyncio
import importlib.util
import os
import subprocess
import sys

import pytest

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
