"""The benchmarks still run and still end with the JSON that readers of their figures rely on. No timing is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("bench", ["fetch.py", "lookup.py"])
def test_help_says_what_is_measured(bench):
    said = run(bench, "--help").stdout
    assert "--quick" in said
    assert "Aim" in said or "memcpy" in said
