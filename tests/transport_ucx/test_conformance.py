"""The conformance suite of transports over UCX: real lanes, an owner in another process and in this one."""

import contextlib
from dataclasses import replace
from unittest import mock

import pytest
from ucx_owners import PeerUcxOwner, UcxRegionOwner

from kvmarket.testing.region_owner import Lent
from kvmarket.testing.transport_suite import TransportConformance
from kvmarket.transport import ucx_cma, ucx_rma
from kvmarket.transport.ucx import UcxTransport
from kvmarket.transport.ucx_driver import UcxDriver


class UcxConformance(TransportConformance):
    @pytest.fixture
    def transport(self):
        transport = UcxTransport({})
        yield transport
        transport.close()

    def unreachable(self, lent):
        silent = replace(lent.descriptor, endpoints={})
        closed = replace(lent.descriptor, endpoints={"ucx": (("127.0.0.1", 9),)})
        return [(Lent(lent.owner, silent), "does not listen"), (Lent(lent.owner, closed), "127.0.0.1:9")]

    def vanish(self, owner):
        owner.peer.kill()


class TestTwoSidedOverTcp(UcxConformance):
    """Both sides see only TCP: every page travels in the owner's messages."""

    @pytest.fixture(autouse=True)
    def tcp_only(self, monkeypatch):
        monkeypatch.setenv("UCX_TLS", "tcp")

    @pytest.fixture
    def owner(self):
        owner = UcxRegionOwner()
        yield owner
        owner.close()

    def vanish(self, owner):
        owner.close()

    @contextlib.contextmanager
    def during_copy(self, action):
        calls = []
        send_data = UcxDriver.send_data

        def send_then_act(driver, endpoint, header, iov, done):
            def sent(status):
                calls.append(status)
                if len(calls) == 1:
                    action()
                done(status)

            send_data(driver, endpoint, header, iov, sent)

        with mock.patch.object(UcxDriver, "send_data", send_then_act):
            yield
        assert calls, "nothing was sent"


class TestOneSidedOverSharedMemory(UcxConformance):
    """The owner is another process of this host: CMA lanes, read without it by UCX, as RDMA lanes would be."""

    @pytest.fixture
    def transport(self):
        transport = UcxTransport({}, direct=False)
        yield transport
        transport.close()

    @pytest.fixture
    def owner(self, peers):
        return PeerUcxOwner(peers.spawn())

    @contextlib.contextmanager
    def during_copy(self, action):
        calls = []
        read_table = ucx_rma.OneSidedRead._read_table

        def act_then_read(transfer, following):
            calls.append(following)
            if len(calls) == 2:  # the second look at the table is the one after the copy
                action()
            read_table(transfer, following)

        with mock.patch.object(ucx_rma.OneSidedRead, "_read_table", act_then_read):
            yield
        assert len(calls) > 1, "nothing was read"


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
