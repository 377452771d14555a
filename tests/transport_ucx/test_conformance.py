"""The conformance suite of transports over UCX: real lanes, an owner in another process and in this one."""

import contextlib
from unittest import mock

import pytest
from ucx_owners import PeerUcxOwner
from ucx_suite import OneSidedConformance, TwoSidedConformance, UcxConformance

from kvmarket.transport import ucx_cma


class TestTwoSidedOverTcp(TwoSidedConformance):
    """Both sides see only TCP."""

    @pytest.fixture(autouse=True)
    def tcp_only(self, monkeypatch):
        monkeypatch.setenv("UCX_TLS", "tcp")


class TestOneSidedOverSharedMemory(OneSidedConformance):
    """CMA lanes, read by UCX itself as RDMA lanes are."""


class TestReadsByTheKernel(UcxConformance):
    """The same lanes, and the system call behind them."""

    @pytest.fixture
    def owner(self, peers):
        return PeerUcxOwner(peers.spawn())

    @contextlib.contextmanager
    def during_copy(self, action):
        calls = []
        copy = ucx_cma.CmaRegion._copy

        def copy_then_act(region, remote, local):
            copy(region, remote, local)
            calls.append(len(remote))
            if len(calls) == 2:  # the first looks at the generations, the second moves the pages
                action()

        with mock.patch.object(ucx_cma.CmaRegion, "_copy", copy_then_act):
            yield
        assert len(calls) > 2, "nothing was read"
