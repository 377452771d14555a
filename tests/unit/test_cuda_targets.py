"""What is written to on a card waits for the caller's work there, if any of it is left; a stand-in has the streams."""

import sys
from types import SimpleNamespace

import pytest

from kvmarket.cuda import _recorded


class TorchStream:
    def __init__(self, *, busy):
        self.busy, self.recorded = busy, 0

    def query(self):
        return not self.busy

    def record_event(self):
        self.recorded += 1
        return "event"


class CupyStream:
    def __init__(self, *, busy):
        self.done, self.busy, self.recorded = not busy, busy, 0

    def record(self):
        self.recorded += 1
        return "event"


class Device:
    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass


@pytest.mark.parametrize("busy", [True, False])
@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_an_event_is_recorded_only_behind_work_that_is_left(monkeypatch, busy, library):
    devices, stream = [], (TorchStream if library == "torch" else CupyStream)(busy=busy)
    torch = SimpleNamespace(cuda=SimpleNamespace(current_stream=lambda device: devices.append(device) or stream))
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: stream))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    tensor = SimpleNamespace(device="cuda:1", is_cuda=True) if library == "torch" else SimpleNamespace(device=Device())
    assert _recorded(tensor) == ("event" if stream.busy else None)
    assert stream.recorded == stream.busy
    assert devices == (["cuda:1"] if library == "torch" else [])
