"""Fixtures for tests over UCX; all are skipped where ucxx is not installed."""

import sys
from pathlib import Path

import pytest

from kvmarket.region.pages import PageLayout
from kvmarket.testing.peers import PeerPool
from kvmarket.testing.region_owner import RegionOwner

sys.path.insert(0, str(Path(__file__).parent))  # its owners run in processes of their own, and are imported here, too


def pytest_addoption(parser):
    parser.addoption("--require-verbs", action="store_true", help="fail where tests over RDMA would be skipped")


def pytest_collection_modifyitems(config, items):
    """Skip with the reason rather than fail to import, unless they are required."""
    if config.getoption("--require-verbs", default=False):
        return
    try:
        import ucxx  # noqa: F401 - asks whether it is there
    except ImportError:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents and not item.get_closest_marker("without_ucxx"):
                item.add_marker(pytest.mark.skip(reason="ucxx is not installed (extra 'ucx')"))


@pytest.fixture(scope="session")
def ucx_pool():
    with PeerPool([Path(__file__).parent / "ucx_owners.py"]) as pool:
        yield pool


@pytest.fixture
def peers(ucx_pool):
    """Makes processes that are killed after the test."""
    yield ucx_pool
    ucx_pool.reap()


@pytest.fixture
def region_owner():
    owner = RegionOwner()
    owner.lend(PageLayout.packed(4, 64), [256], [b"x" * 64] * 4)
    owner.validate(0, [0, 1, 2, 3])
    yield owner
    owner.close()


@pytest.fixture
def settings(runtime_dir):
    return {"runtime_dir": str(runtime_dir), "arena_bytes": 4 << 20, "registry_bytes": 16 << 20}
