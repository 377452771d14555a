"""The registry suite against a real server, and against one that checks the slots of a cluster."""

import pytest

pytest.importorskip("redis", reason="the extra 'redis' is not installed")

from kvmarket.registry.redis import RedisRegistry
from kvmarket.testing.redis_server import WHERE_FROM, RedisServer, find_server
from kvmarket.testing.registry_suite import RegistryConformance

pytestmark = pytest.mark.skipif(find_server() is None, reason=WHERE_FROM)

LEASE_S = 1.5  # long enough for a busy machine, short enough to wait for


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
    import time

    end = time.monotonic() + 20
    while b"cluster_state:ok" not in registry._writes.call(b"CLUSTER", b"INFO"):
        assert time.monotonic() < end
        time.sleep(0.05)


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
