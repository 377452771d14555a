"""UCX for pages on a card: the suite of transports, and a market whose processes cannot map each other's memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_jobs as jobs
import numpy as np
import pytest

from kvmarket.cuda import cuda_pages
from kvmarket.deadline import Deadline
from kvmarket.report import MissReason
from kvmarket.testing.ucx_cuda_suite import UcxCudaConformance
from kvmarket.testing.ucx_protocols import of_gpu_messages

PAGES = 40


@pytest.fixture(scope="module", autouse=True)
def needs_ucxx(ucxx):
    """Every test here needs it."""


class TestWithinOneProcess(UcxCudaConformance):
    real = True


def open_ucx_core(state, runtime_dir):
    jobs.open_core(state, runtime_dir, transport="ucx", ucx_addresses="127.0.0.1")


@pytest.fixture
def owner(peers, runtime_dir):
    peer = peers.spawn()
    peer.call(open_ucx_core, str(runtime_dir))
    peer.call(jobs.lend, PAGES, 1, timeout_s=60)
    peer.call(jobs.offer, list(range(PAGES)))
    return peer


def fetch(torch, runtime_dir, **settings):
    from kvmarket.config import MarketConfig
    from kvmarket.core import MarketCore

    config = MarketConfig(
        runtime_dir=str(runtime_dir), registry_bytes=16 << 20, transport="ucx", ucx_addresses="127.0.0.1", **settings
    )
    core = MarketCore(jobs.namespace(), config)
    tensors = [torch.zeros_like(tensor) for tensor in jobs.engine_tensors(torch, PAGES, 1)]
    torch.cuda.synchronize()
    local = cuda_pages(jobs.engine_layout(PAGES), tensors)
    fetched = core.fetcher.fetch(iter([jobs.keys_of(PAGES)]), local, np.arange(PAGES), Deadline(20))
    core.close()
    return tensors, fetched.outcome


def test_blocks_travel_from_card_to_card(owner, runtime_dir, torch, capsys):
    tensors, outcome = fetch(torch, runtime_dir)
    assert (outcome.blocks, outcome.reason, outcome.detail) == (PAGES, MissReason.NONE, "")
    assert all(torch.equal(a, b) for a, b in zip(tensors, jobs.engine_tensors(torch, PAGES, 1), strict=True))
    report = outcome.transfers[0]
    assert report.transport == "ucx_cuda"
    assert ("cuda_ipc" in report.path) != ("host_bounce" in report.path), report.path
    with capsys.disabled():
        print(f"\nucx on CUDA memory: {report.path}")


def test_a_bounce_is_refused_when_asked(owner, runtime_dir, torch, monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp,cuda_copy,self")
    tensors, outcome = fetch(torch, runtime_dir, ucx_require="no_host_bounce")
    assert (outcome.blocks, outcome.reason) == (0, MissReason.UNREACHABLE)
    assert "no_host_bounce" in outcome.detail
    assert not any(bool(tensor.any()) for tensor in tensors)


def test_a_bounce_that_is_allowed_is_said(owner, runtime_dir, torch, monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp,cuda_copy,self")
    tensors, outcome = fetch(torch, runtime_dir)
    assert outcome.blocks == PAGES, outcome.detail
    assert outcome.transfers[0].path.endswith("host_bounce")
    assert all(torch.equal(a, b) for a, b in zip(tensors, jobs.engine_tensors(torch, PAGES, 1), strict=True))


def test_an_owner_that_dies_is_a_miss(owner, runtime_dir, torch):
    assert fetch(torch, runtime_dir)[1].blocks == PAGES
    owner.kill()
    assert fetch(torch, runtime_dir)[1].blocks == 0


def told_protocols(runtime_dir, **settings):
    """Fetch between two other processes; return the report's path, and what UCX told of messages of GPU memory."""
    script = Path(__file__).with_name("gpu_ucx_told.py")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "UCX_PROTO_INFO": "y", **settings}
    done = subprocess.run(
        [sys.executable, str(script), str(runtime_dir)],
        env=environ, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    (result,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert (result["blocks"], result["right"]) == (result["pages"], True), result
    told = of_gpu_messages(done.stdout + done.stderr, result["pages"] * jobs.SPEC.page_bytes)
    assert told, "UCX told nothing of messages from a card"
    return result["path"], told


BY_WAY_OF_THE_HOST = ("software emulation", "copy-in", "fragmented", "cuda_copy")


def test_what_is_not_said_to_bounce_goes_by_lanes_that_read_the_card(runtime_dir):
    path, told = told_protocols(runtime_dir)
    assert "host_bounce" not in path
    assert any("data fetch into cuda" in row.operation for row in told), told
    for row in told:
        assert not any(word in f"{row.how} {row.lanes}" for word in BY_WAY_OF_THE_HOST), row
        assert "cuda_ipc" in row.lanes, row


def test_what_goes_by_way_of_the_host_is_said_to_bounce(runtime_dir):
    path, told = told_protocols(runtime_dir, UCX_TLS="tcp,cuda_copy,self")
    assert path.endswith("host_bounce")
    assert any(any(word in f"{row.how} {row.lanes}" for word in BY_WAY_OF_THE_HOST) for row in told), told
    assert not any("cuda_ipc" in row.lanes for row in told)
