"""The registry suite against a real server, against one that checks the slots of a cluster, and against three nodes."""

import contextlib
import time

import pytest

pytest.importorskip("redis", reason="the extra 'redis' is not installed")

from kvmarket.registry.redis import RedisRegistry
from kvmarket.testing.redis_server import WHERE_FROM, RedisServer, find_server
from kvmarket.testing.registry_suite import RegistryConformance

pytestmark = pytest.mark.skipif(find_server() is None, reason=WHERE_FROM)

LEASE_S = 4.0  # long enough for a busy machine, short enough to wait for


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One node that serves all slots: commands and scripts that span slots are refused there."""
    with RedisServer(tmp_path_factory.mktemp("cluster"), ["--cluster-enabled", "yes"]) as server:
        registry = RedisRegistry(server.url)
        registry._writes.call(b"CLUSTER", b"ADDSLOTSRANGE", 0, 16383)
        wait_for_cluster(registry)
        registry.close()
        yield server


def wait_for_cluster(registry):
    end = time.monotonic() + 20
    while b"cluster_state:ok" not in registry._writes.call(b"CLUSTER", b"INFO"):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A cluster of three nodes, each of which serves a third of the slots."""
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(RedisServer(tmp_path_factory.mktemp("node"), ["--cluster-enabled", "yes"]))
            for _ in range(3)
        ]
        registries = [RedisRegistry(server.url) for server in servers]
        for number, registry in enumerate(registries):
            first, last = 16384 * number // 3, 16384 * (number + 1) // 3 - 1
            registry._writes.call(b"CLUSTER", b"ADDSLOTSRANGE", first, last)
            for other in servers:
                registry._writes.call(b"CLUSTER", b"MEET", b"127.0.0.1", other.port)
        for registry in registries:
            wait_for_cluster(registry)
            registry.close()
        yield servers


class RedisConformance(RegistryConformance):
    death_notice_s = LEASE_S + 0.2

    def make_registry(self):
        registry = RedisRegistry(self.url)
        registry._writes.call(b"FLUSHALL")
        return registry

    def open_elsewhere(self):
        return RedisRegistry, (self.url,)


class TestRedis(RedisConformance):
    @pytest.fixture(autouse=True)
    def where(self, server):
        self.url = f"{server.url}?lease_s={LEASE_S}&timeout_s=2"


class TestClusterNode(RedisConformance):
    @pytest.fixture(autouse=True)
    def where(self, cluster):
        self.url = f"{cluster.url}?lease_s={LEASE_S}&timeout_s=2"


class TestThreeNodes(RedisConformance):
    """Namespaces and owners are on different nodes: which one it is, the first one that is asked says."""

    @pytest.fixture(autouse=True)
    def where(self, nodes):
        self.servers = nodes
        self.url = f"{nodes[0].url}?lease_s={LEASE_S}&timeout_s=2"

    def make_registry(self):
        for server in self.servers:
            registry = RedisRegistry(server.url)
            registry._writes.call(b"FLUSHALL")
            registry.close()
        return RedisRegistry(self.url)

    def test_all_three_are_used(self, registry):
        for number in range(24):
            registry.open_namespace(bytes([number]) * 32, {})
        sizes = []
        for server in self.servers:
            with contextlib.closing(RedisRegistry(server.url)) as node:
                sizes.append(node._writes.call(b"DBSIZE"))
        assert min(sizes) > 0, sizes
