"""A card, for which memory of the host stands in."""

import pytest
from cuda_jobs import SPACE

from kvmarket.config import MarketConfig
from kvmarket.core import MarketCore
from kvmarket.testing.host_cuda import HostCuda


@pytest.fixture
def api(monkeypatch):
    api = HostCuda()
    monkeypatch.setattr("kvmarket.reach.load_cuda", lambda: api)
    yield api
    api.close()


@pytest.fixture
def open_core(api, runtime_dir):
    cores = []

    def make(**settings):
        config = MarketConfig(runtime_dir=str(runtime_dir), registry_bytes=16 << 20, **settings)
        cores.append(MarketCore(SPACE, config))
        return cores[-1]

    yield make
    for core in cores:
        core.close()
