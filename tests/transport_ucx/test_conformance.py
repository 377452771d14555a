"""The conformance suite of transports over UCX: real lanes, an owner in another process and in this one."""

import contextlib
from unittest import mock

import pytest
from ucx_owners import PeerUcxOwner
from ucx_suite import CONNECT_S, OneSidedConformance, TwoSidedConformance, UcxConformance

from kvmarket.transport import ucx_cma
from kvmarket.transport.ucx import UcxTransport


class TestTwoSidedOverTcp(TwoSidedConformance):
    """Both sides see only TCP."""

    @pytest.fixture(autouse=True)
    def tcp_only(self, monkeypatch):
        monkeypatch.setenv("UCX_TLS", "tcp")


class TestTwoSidedThroughBuffers(TestTwoSidedOverTcp):
    """As over RDMA, scattered pages arrive in registered buffers and are copied from there."""

    @pytest.fixture
    def transport(self):
        transport = UcxTransport({}, stage=True, connect_s=CONNECT_S)
        yield transport
        assert transport.staging.in_use == 0
        transport.close()


class TestOneSidedOverSharedMemory(OneSidedConformance):
    """CMA lanes, read by UCX itself as RDMA lanes are."""


class TestReadsByTheKernel(UcxConformance):
    """The same lanes, and the system call behind them: pages and the second look at their generations in one call."""

    @pytest.fixture
    def owner(self, peers):
        return PeerUcxOwner(peers.spawn())

    first_copy = 1
    """After how many calls something happens, in a read that is not so short that it is one call altogether."""

    @contextlib.contextmanager
    def during_copy(self, action):
        calls = []
        copy = ucx_cma.CmaRegion._copy

        def copy_then_act(region, remote, local):
            copy(region, remote, local)
            calls.append(len(remote))
            if len(calls) == self.first_copy:
                action()

        with (
            mock.patch.object(ucx_cma.CmaRegion, "_copy", copy_then_act),
            mock.patch.object(ucx_cma, "SHORT_BYTES", 0),
        ):
            yield
        assert len(calls) > self.first_copy, "nothing was read"


class TestReadsByTheKernelWithoutOrder(TestReadsByTheKernel):
    """As on processors that may look at the generations before they have the bytes, unless there is a fence between."""

    first_copy = 2

    @pytest.fixture(autouse=True)
    def unordered(self, monkeypatch):
        monkeypatch.setattr(ucx_cma, "IN_ORDER", False)
