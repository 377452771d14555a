"""The conformance suite of transports over UCX, for lanes that its subclasses choose."""

import contextlib
from dataclasses import replace
from unittest import mock

import pytest
from ucx_owners import PeerUcxOwner, UcxRegionOwner

from kvmarket.testing.region_owner import Lent
from kvmarket.testing.transport_suite import TransportConformance
from kvmarket.transport import ucx_rma, ucx_server
from kvmarket.transport.ucx import UcxTransport
from kvmarket.transport.ucx_driver import UcxDriver

CONNECT_S = 15.0  # machines that run tests are busy, and an emulated one connects at a tenth of the speed


class UcxConformance(TransportConformance):
    @pytest.fixture
    def transport(self):
        transport = UcxTransport({}, connect_s=CONNECT_S)
        yield transport
        transport.close()

    def unreachable(self, lent):
        silent = replace(lent.descriptor, endpoints={})
        closed = replace(lent.descriptor, endpoints={"ucx": (("127.0.0.1", 9),)})
        return [(Lent(lent.owner, silent), "does not listen"), (Lent(lent.owner, closed), "127.0.0.1:9")]

    def vanish(self, owner):
        owner.peer.kill()


class TwoSidedConformance(UcxConformance):
    """Every page travels in the owner's messages."""

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
        send_data, bytes_of = UcxDriver.send_data, ucx_server.bytes_of

        def act_once(outcome):
            calls.append(outcome)
            if len(calls) == 1:
                action()
            return outcome

        def send_then_act(driver, endpoint, header, iov, done):
            send_data(driver, endpoint, header, iov, lambda status: done(act_once(status)))

        def copy_then_act(memory, pages):
            return act_once(bytes_of(memory, pages))

        with (
            mock.patch.object(UcxDriver, "send_data", send_then_act),
            mock.patch.object(ucx_server, "bytes_of", copy_then_act),
        ):
            yield
        assert calls, "nothing was sent"


class OneSidedConformance(UcxConformance):
    """The owner is another process, whose memory UCX reads without it."""

    @pytest.fixture
    def transport(self):
        transport = UcxTransport({}, direct=False, connect_s=CONNECT_S)
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
