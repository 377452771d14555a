"""Deadlines, metrics, reports."""

import json
import threading
import time

import pytest

from kvmarket.deadline import SECONDS_MAX, Deadline
from kvmarket.errors import InvalidInputError
from kvmarket.metrics import Metrics
from kvmarket.report import FetchReport, MissReason, TransferReport


def test_a_deadline_passes():
    deadline = Deadline(0.3)
    assert not deadline.expired
    assert 0 < deadline.remaining_s <= 0.3
    time.sleep(0.31)
    assert deadline.expired
    assert deadline.remaining_s == 0
    assert Deadline(0).expired


def test_a_deadline_can_be_cancelled():
    deadline = Deadline(100)
    threading.Thread(target=deadline.cancel).start()
    end = time.monotonic() + 5
    while not deadline.expired and time.monotonic() < end:
        time.sleep(0.001)
    assert deadline.expired
    assert deadline.remaining_s == 0


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), SECONDS_MAX + 1, "1", None, 1j])
def test_a_deadline_that_would_never_pass_is_refused(seconds):
    with pytest.raises(InvalidInputError, match="deadline"):
        Deadline(seconds)


def test_counters_add_up_across_threads():
    metrics = Metrics()

    def work():
        for _ in range(1000):
            metrics.add(blocks=2, seconds=0.5)
            metrics.add_reason("missed", MissReason.TORN)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.snapshot() == {"blocks": 8000, "seconds": 2000.0, "missed{reason=torn}": 4000}


def test_reports_are_json():
    transfers = (
        TransferReport("shm", "mmap(memfd)", 2, 8192, 0.1, 0.05, {2: MissReason.TORN}),
        TransferReport("inproc", "memcpy", 0, 0, 0.1, 0.05, {0: MissReason.DEADLINE}),
    )
    report = FetchReport(100, 64, 32, 2, 2, 8192, {"host/pid 1": 2}, transfers, {"total": 0.2}, MissReason.TORN, 2, "x")
    assert report.hit
    assert report.transport == "shm", "only what carried bytes"
    summary = json.loads(json.dumps(report.as_dict()))
    assert summary["reason"] == "torn"
    assert summary["paths"] == ["mmap(memfd)"]
    assert summary["stages_ms"] == {"total": 200.0}
