from dataclasses import replace

import pytest

from kvmarket.registry.host import boot_id, pid_namespace
from kvmarket.testing.region_owner import Lent, PeerRegionOwner, RegionOwner
from kvmarket.testing.transport_suite import TransportConformance, after_mapped_copy, without_memories
from kvmarket.transport.inproc import InprocTransport
from kvmarket.transport.shm import ShmTransport


class TestInproc(TransportConformance):
    @pytest.fixture
    def transport(self):
        return InprocTransport()

    @pytest.fixture
    def owner(self):
        owner = RegionOwner()
        yield owner
        owner.close()

    def during_copy(self, action):
        return after_mapped_copy(action)

    def unreachable(self, lent):
        return [(Lent(replace(lent.owner, incarnation=bytes(16)), lent.descriptor), "another process")]

    def vanish(self, owner):
        owner.close()


class TestShm(TransportConformance):
    @pytest.fixture
    def transport(self):
        return ShmTransport(boot_id(), pid_namespace())

    @pytest.fixture
    def owner(self, peers):
        return PeerRegionOwner(peers.spawn())

    def during_copy(self, action):
        return after_mapped_copy(action)

    def unreachable(self, lent):
        return [
            (Lent(replace(lent.owner, boot_id="elsewhere", host="far"), lent.descriptor), "far is another host"),
            (Lent(replace(lent.owner, pid_namespace=1), lent.descriptor), "PID namespace"),
            (Lent(lent.owner, without_memories(lent)), "private"),
        ]

    def vanish(self, owner):
        owner.peer.kill()


class TestShmWithinOneProcess(TestShm):
    """A process may map its own memory, too."""

    @pytest.fixture
    def owner(self):
        owner = RegionOwner()
        yield owner
        owner.close()

    def vanish(self, owner):
        owner.close()
