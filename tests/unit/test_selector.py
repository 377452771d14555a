"""Which transport is taken, and what is said when none reaches."""

import threading
from types import SimpleNamespace

import pytest

from kvmarket.errors import PeerGoneError, TransportUnavailableError
from kvmarket.identity import OwnerInfo
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import PageLayout
from kvmarket.testing.host_cuda import HostCuda
from kvmarket.transport import Connection, Transport, TransportSelector
from kvmarket.transport.select import CONNECTIONS_MAX


def describe():
    return SimpleNamespace(tier="host")


def owner(number=1):
    return OwnerInfo(number, number.to_bytes(16, "big"), 1, 1, "boot", "host")


class FakeConnection(Connection):
    path = "there"

    def __init__(self):
        self.closed = 0

    def read(self, request, *, deadline, on_group=None):
        raise NotImplementedError

    def close(self):
        self.closed += 1


class FakeTransport(Transport):
    def __init__(self, scheme, error=None, gate=None):
        self.scheme, self._error, self._gate = scheme, error, gate
        self.made, self.closed = [], 0

    def connect(self, owner, descriptor, deadline=None):
        if self._gate:
            self._gate.wait()
        if self._error:
            raise self._error
        self.made.append(FakeConnection())
        return self.made[-1]

    def close(self):
        self.closed += 1


def test_for_memory_of_a_card_the_first_that_reads_into_it_is_taken():
    class Unmappable(FakeConnection):
        def prepare(self, local=None):
            raise TransportUnavailableError("it cannot be mapped", scheme="direct")

    direct, network = FakeTransport("direct"), FakeTransport("network")
    direct.connect = lambda *_: Unmappable()
    selector, api = TransportSelector([direct, network]), HostCuda()
    local = CudaPagedMemory.of(api, PageLayout.packed(1, 64), [api.allocate(64, 0)])
    asking = selector.connection(owner(), 0, describe)
    assert isinstance(asking, Unmappable), "who only asks need not map"
    reading = selector.connection(owner(), 0, describe, local=local)
    assert network.made == [reading]
    assert selector.connection(owner(), 0, describe, local=local) is reading
    assert selector.connection(owner(), 0, describe) is asking
    assert [reached for _, reached, _ in selector.explain(owner(), describe())] == [False, True]
    selector.forget(owner())
    assert selector.connection(owner(), 0, describe, local=local) is not reading
    assert selector.connection(owner(), 0, describe, prove=True) is network.made[-1]
    api.close()


def test_the_first_that_reaches_is_taken_and_remembered():
    far, near = FakeTransport("far", TransportUnavailableError("too far", scheme="far")), FakeTransport("near")
    selector = TransportSelector([far, near, FakeTransport("never")])
    described = []
    connection = selector.connection(owner(), 0, lambda: described.append(1) or describe())
    assert connection is near.made[0]
    assert selector.connection(owner(), 0, lambda: described.append(1) or describe()) is connection
    assert selector.connection(owner(), 1, lambda: described.append(1) or describe()) is not connection
    assert selector.connection(owner(2), 0, lambda: described.append(1) or describe()) is not connection
    assert len(described) == 3
    assert connection.tier == "host"
    selector.close()
    assert [made.closed for made in near.made] == [1, 1, 1]
    assert near.closed == far.closed == 1


def test_when_none_reaches_every_reason_is_told():
    transports = [FakeTransport(name, TransportUnavailableError(f"{name} says no")) for name in ("a", "b")]
    with pytest.raises(TransportUnavailableError, match="a: a says no; b: b says no") as caught:
        TransportSelector(transports).connection(owner(), 0, describe)
    assert caught.value.scheme == "a+b"
    assert caught.value.peer == "host/pid 1"


def test_an_owner_that_is_gone_is_not_tried_elsewhere():
    other = FakeTransport("other")
    selector = TransportSelector([FakeTransport("shm", PeerGoneError("dead")), other])
    with pytest.raises(PeerGoneError):
        selector.connection(owner(), 0, describe)
    assert other.made == []


def test_owners_that_died_are_forgotten():
    transport = FakeTransport("t")
    selector = TransportSelector([transport])
    connections = {number: selector.connection(owner(number), 0, describe) for number in (1, 2, 3)}
    selector.forget(owner(1))
    assert selector.connection(owner(1), 0, describe) is not connections[1]
    selector.forget_dead(lambda number: number == 3)
    assert selector.connection(owner(3), 0, describe) is connections[3]
    assert selector.connection(owner(2), 0, describe) is not connections[2]


def test_the_number_of_connections_is_bounded():
    selector = TransportSelector([FakeTransport("t")])
    first = selector.connection(owner(), 0, describe)
    for region in range(1, CONNECTIONS_MAX):
        selector.connection(owner(), region, describe)
    assert selector.connection(owner(), 0, describe) is first, "used lately"
    selector.connection(owner(), CONNECTIONS_MAX, describe)
    assert selector.connection(owner(), 0, describe) is first
    assert len(selector._connections) == CONNECTIONS_MAX


def test_threads_that_connect_at_once_share_one_connection():
    transport = FakeTransport("t", gate=threading.Barrier(4))
    selector, got = TransportSelector([transport]), []
    threads = [threading.Thread(target=lambda: got.append(selector.connection(owner(), 0, describe))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(transport.made) == 4
    assert len(set(map(id, got))) == 1
    assert sorted(made.closed for made in transport.made) == [0, 1, 1, 1], "those that lost the race are closed"
    assert got[0].closed == 0
