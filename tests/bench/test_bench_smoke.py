"""The benchmarks still run and still end with the JSON that readers of their figures rely on. No timing is asserted."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvmarket.testing.redis_server import WHERE_FROM, find_server

ROOT = Path(__file__).parents[2]
FETCHES = {f"fetch_{verify}{out}" for verify in ("none", "sampled", "full") for out in ("", "_out")}


def run(bench, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "bench" / bench), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "PYTHONPATH": path}
    )


def last_line(bench):
    done = run(bench, "--quick")
    assert done.stderr, "it tells how far it is"
    return json.loads(done.stdout.splitlines()[-1])


def test_fetch():
    result = last_line("fetch.py")
    assert (result["bench"], result["quick"]) == ("fetch", True)
    for case in ("contiguous", "small_pages", "blocks"):
        assert {"copy", "read", "scattered", "memcpy_gbps", "cpu_s", *FETCHES} <= set(result[case])
        assert all(result[case][name] > 0 for name in FETCHES)
    assert result["latency"]["fetch_full_out"]["p50_us"] > 0
    assert result["owner_cpu_s"] >= 0


def test_lookup():
    result = last_line("lookup.py")
    assert (result["bench"], result["quick"], result["asked_blocks"]) == ("lookup", True, 256)
    for shape in ("chats", "hot"):
        assert result[shape]["blocks"] > 10_000
        assert result[shape]["bytes_per_block"] > 0
        assert result[shape]["announce_blocks_per_s"] > 0
        for kind in ("hit", "half", "miss"):
            assert {"registry", "fetcher", "match", "dict"} == set(result[shape][kind])
            assert all(0 < times["p50_ms"] <= times["p99_ms"] for times in result[shape][kind].values())


def test_disk():
    result = last_line("disk.py")
    assert (result["bench"], result["quick"]) == ("disk", True)
    for pages in ("pages_32k", "pages_1024k"):
        assert all(result[pages][f"{what}_ratio"] > 0 for what in ("write", "read"))


def test_eviction():
    result = last_line("eviction.py")
    assert (result["bench"], result["quick"]) == ("eviction", True)
    for policy in ("lru", "s3fifo"):
        assert 0 < result[policy]["after_scan"] < 1
        assert result[policy]["ns_per_block"] > 0
    assert result["s3fifo"]["kept"] > result["lru"]["kept"]


@pytest.mark.skipif(find_server() is None, reason=WHERE_FROM)
def test_registry():
    pytest.importorskip("redis", reason="the extra 'redis' is not installed")
    result = last_line("registry.py")
    assert (result["bench"], result["quick"], result["asked_blocks"]) == ("registry", True, 128)
    assert result["lookup"]["ratio"] > 0
    assert result["announce_blocks_per_s"] > 0
    assert result["full"]["entries"] > 10_000
    assert 0 < result["full"]["p50_ms"] <= result["full"]["p99_ms"]
    assert result["full"]["bytes_per_entry"] > 40
    assert result["fence"]["blocks"] > 1000


@pytest.mark.skipif(find_spec("ucxx") is None, reason="ucxx is not installed (extra 'ucx')")
def test_transport():
    result = last_line("transport.py")
    assert (result["bench"], result["quick"], result["peer"]) == ("transport", True, "none")
    for lanes, kind in (("cma", "cma("), ("tcp", "am(tcp/")):
        assert result[lanes]["path"].startswith(kind)
        assert result[lanes]["right"] is True
        assert all(result[lanes][case]["kvmarket"] > 0 for case in ("contiguous", "blocks", "latency"))
        assert result[lanes]["idle_cpu"]["kvmarket"] >= 0


@pytest.mark.parametrize("bench", ["fetch.py", "lookup.py", "registry.py", "transport.py"])
def test_help_says_what_is_measured(bench):
    if bench == "registry.py":
        pytest.importorskip("redis", reason="the extra 'redis' is not installed")
    said = run(bench, "--help").stdout
    assert "--quick" in said
    assert "Aim" in said or "memcpy" in said
