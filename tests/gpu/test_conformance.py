"""The transport suite on a real card: between two processes, and within one."""

import pytest

from kvmarket.testing.cuda_owner import CudaRegionOwner, PeerCudaOwner
from kvmarket.testing.cuda_suite import CudaConformance


class TestBetweenProcesses(CudaConformance):
    real = True

    @pytest.fixture
    def owner(self, peers):
        return PeerCudaOwner(peers.spawn(), real=True)


class TestWithinOneProcess(CudaConformance):
    real = True

    @pytest.fixture
    def owner(self):
        owner = CudaRegionOwner(real=True)
        yield owner
        owner.close()

    def unreachable(self, lent):
        return []

    def vanish(self, owner):
        owner.close()
