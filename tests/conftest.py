"""Fixtures for all tests, and the checks that no test leaves anything behind."""

import contextlib
import gc
import os
import time
from pathlib import Path

import pytest
from hypothesis import settings

from kvmarket.config import MarketConfig
from kvmarket.testing.peers import PeerPool

LEFT_BEHIND_WAIT_S = 3.0
ENGINES = "tests/adapters/"

settings.register_profile("kvmarket", deadline=None, print_blob=True)  # machines that run tests are busy
settings.load_profile("kvmarket")


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="repeat what is repeated as often as kvmarket promises to stand"
    )


@pytest.fixture(scope="session")
def at_length(request):
    """Returns the first of two numbers, or the second with ``--long``."""
    return lambda short, long: long if request.config.getoption("--long") else short


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give all tests with engines to one worker, one after the other: they compute, while the others mostly wait."""
    from xdist.scheduler import LoadFileScheduling

    class EnginesTogether(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return ENGINES if nodeid.startswith(ENGINES) else super()._split_scope(nodeid)

    return EnginesTogether(config, log)


def shared_memories():
    """Kvmarket's shared memories that this process has open or mapped, its own and peers', by name and inode."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(entry)  # noqa: PTH115 - a magic link: text, not a path
            if target.startswith("/memfd:kvmarket:"):
                found.add((target.split()[0], entry.stat().st_ino))
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/memfd:kvmarket:" in line:
            _range, _mode, _offset, _device, inode, name, *_ = line.split()
            found.add((name, int(inode)))
    return found


def children():
    """Child processes of this one, zombies included."""
    found = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # that thread has ended meanwhile; its children are another's now
            found.update(map(int, path.read_text().split()))
    return found


def nothing_new(look, before):
    end = time.monotonic() + LEFT_BEHIND_WAIT_S
    while (left := look() - before) and time.monotonic() < end:
        gc.collect()  # arrays in a cycle keep their memory
        time.sleep(0.01)  # a thread that enters pages into the page table does so for a moment
    return left


MEMORIES = pytest.StashKey[set]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[MEMORIES] = shared_memories()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    """Fail a test that leaves shared memory behind: its own, or mappings of a peer's."""
    result = yield
    if getattr(item, "funcargs", None):
        item.funcargs.clear()  # a mapping lasts as long as any array of it
    left = nothing_new(shared_memories, item.stash[MEMORIES])
    assert not left, f"shared memory was left behind: {sorted(left)}"
    return result


@pytest.fixture(autouse=True)
def leaves_no_processes(request):
    """Fail a test that leaves processes behind; engines may outlive one test."""
    before = children()
    yield
    if not request.node.get_closest_marker("vllm"):
        left = nothing_new(children, before)
        assert not left, f"child processes were left behind: {sorted(left)}"


@pytest.fixture(scope="session")
def peer_pool():
    with PeerPool([Path(__file__).parent / "integration" / "market_jobs.py"]) as pool:
        yield pool


@pytest.fixture
def peers(peer_pool):
    """Makes processes, see `kvmarket.testing.peers`; they are killed after the test."""
    yield peer_pool
    peer_pool.reap()


@pytest.fixture
def runtime_dir(tmp_path):
    path = tmp_path / "runtime"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def config(runtime_dir):
    """Settings for a marketplace of this test alone."""
    return MarketConfig(
        runtime_dir=str(runtime_dir),
        arena_bytes=4 << 20,
        registry_bytes=16 << 20,
        fetch_deadline_s=10.0,  # tests of deadlines set their own; the others run on busy machines
    )
