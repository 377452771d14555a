"""GPU tests skip, with the reason, where there is no card; ``--require-gpu`` turns that into a failure."""

import importlib.util

import pytest

from kvmarket.errors import MissingExtraError, TransportUnavailableError
from kvmarket.testing.peers import PeerPool
from kvmarket.transport.cuda_runtime import load_cuda


def pytest_addoption(parser):
    parser.addoption("--require-gpu", action="store_true", help="fail where GPU tests would be skipped")
    parser.addoption("--stress-s", type=float, default=20.0, help="seconds of the overwriting test")


@pytest.fixture(scope="session")
def gpu(request):
    """This process's CUDA."""
    try:
        return load_cuda()
    except (MissingExtraError, TransportUnavailableError) as error:
        if request.config.getoption("--require-gpu", default=False):
            pytest.fail(f"no GPU to test on: {error}")
        pytest.skip(f"no GPU to test on: {error}")


@pytest.fixture(autouse=True)
def needs_gpu(gpu):
    """Every test here needs it."""


def required(request, name, minversion=None):
    """Import a module, or skip; with ``--require-gpu`` its absence is a failure."""
    try:
        return pytest.importorskip(name, minversion=minversion)
    except pytest.skip.Exception as error:
        if request.config.getoption("--require-gpu", default=False):
            pytest.fail(str(error))
        raise


@pytest.fixture(scope="session")
def ucxx(gpu, request):
    return required(request, "ucxx")


@pytest.fixture(scope="session")
def torch(gpu, request):
    return required(request, "torch")


@pytest.fixture(scope="session")
def transformers(gpu, request):
    return required(request, "transformers", "5.0")


@pytest.fixture(scope="session")
def vllm_installed(gpu, request):
    """Its absence skips, or fails; it is imported in child processes only."""
    if importlib.util.find_spec("vllm") is None:
        if request.config.getoption("--require-gpu", default=False):
            pytest.fail("vLLM is not installed")
        pytest.skip("vLLM is not installed")


@pytest.fixture(scope="session")
def gpu_pool(gpu):
    with PeerPool() as pool:
        yield pool


@pytest.fixture
def peers(gpu_pool):
    """Processes with a CUDA of their own; they are killed after the test."""
    yield gpu_pool
    gpu_pool.reap()
