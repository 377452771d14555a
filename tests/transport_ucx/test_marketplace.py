"""Publishing and fetching through UCX: settings, the choice of the transport, and what reports say of it."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from ucx_owners import BLOCKS, publish_in_peer

from kvmarket import MarketConfig, Marketplace, core, reach
from kvmarket.deadline import Deadline
from kvmarket.errors import ConfigError, MissingExtraError, RegistryProtocolError, TransportUnavailableError
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.region.pages import PagedMemory
from kvmarket.registry import block_keys
from kvmarket.registry.memory import MemoryRegistry
from kvmarket.testing.region_owner import RegionOwner
from kvmarket.testing.samples import SPEC, sample_kv, sample_tokens
from kvmarket.transport import ucx_settings
from kvmarket.transport.ucx import UcxTransport

NAMESPACE = Namespace(ModelIdentity("model"), SPEC)


def publish_over_tcp_in_peer(state, settings):
    os.environ["UCX_TLS"] = "tcp,self"
    publish_in_peer(state, settings)


def leases_in_peer(state):
    """Return the sizes of the reads that held leases of the peer's arena, and the pages still leased."""
    leases = state.market._arena._arena.leases
    return [len(pages) for pages in leases.take_uses()], leases.held()


def close_in_peer(state):
    state.loop.run_until_complete(state.market.aclose())


async def fetch(settings, **changes):
    tokens = sample_tokens(1, BLOCKS)
    async with Marketplace("model", SPEC, config=MarketConfig(**{**settings, **changes})) as market:
        result = await market.fetch(tokens, deadline_s=5.0)
        assert (result.kv == sample_kv(tokens)[: result.report.blocks_adopted]).all()
        return result.report


async def test_blocks_travel_through_ucx_between_two_processes_and_the_report_names_the_lanes(peers, settings):
    peer = peers.spawn()
    peer.call(publish_in_peer, {**settings, "transport": "ucx"})
    report = await fetch(settings, transport="ucx")
    assert report.transport == "ucx"
    assert report.blocks_adopted == BLOCKS == report.blocks_verified
    (path,) = {transfer.path for transfer in report.transfers}
    assert path == "cma(cma/memory+posix/memory+sysv/memory)"
    peer.call(close_in_peer)
    gone = await fetch(settings, transport="ucx")
    assert not gone.hit


async def test_pages_that_the_owner_sends_are_leased_meanwhile(peers, settings, monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    peer = peers.spawn()
    peer.call(publish_over_tcp_in_peer, {**settings, "transport": "ucx"})
    report = await fetch(settings, transport="ucx")
    assert {transfer.path.split("(")[0] for transfer in report.transfers} == {"am"}
    assert (report.blocks_adopted, report.tier) == (BLOCKS, "host")
    reads, held = peer.call(leases_in_peer)
    assert sum(reads) == BLOCKS
    assert held == set()


async def test_auto_prefers_shared_memory_on_one_host_and_does_not_listen(peers, settings):
    peers.spawn().call(publish_in_peer, {**settings, "transport": "auto"})
    assert (await fetch(settings)).transport == "shm"
    report = await fetch(settings, transport="ucx")
    assert not report.hit
    assert "does not listen" in report.detail


async def test_auto_takes_ucx_when_the_owner_is_on_another_host(peers, settings, monkeypatch):
    """The kernel's identity is what tells hosts apart; a reader that has another one is on another host."""
    peers.spawn().call(publish_in_peer, {**settings, "transport": "ucx"})
    monkeypatch.setattr(reach, "boot_id", lambda: "another-kernel")
    assert (await fetch(settings)).transport == "ucx"


async def test_a_requirement_that_the_lanes_do_not_meet_is_a_miss_that_says_what_is_missing(peers, settings):
    peers.spawn().call(publish_in_peer, {**settings, "transport": "ucx"})
    report = await fetch(settings, transport="ucx", ucx_require="rdma")
    assert not report.hit
    assert "no verbs" in report.detail
    assert "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY" in report.detail
    assert (await fetch(settings, transport="ucx", ucx_require="shm")).blocks_adopted == BLOCKS


async def test_shared_memory_that_is_required_and_excluded_is_named(peers, settings, monkeypatch):
    peers.spawn().call(publish_in_peer, {**settings, "transport": "ucx"})
    monkeypatch.setenv("UCX_TLS", "tcp")
    report = await fetch(settings, transport="ucx", ucx_require="shm")
    assert not report.hit
    assert "require=shm, but the connection uses tcp/" in report.detail


def test_a_registry_that_other_hosts_read_makes_auto_listen():
    class Shared(MemoryRegistry):
        local = False

    market = core.MarketCore(NAMESPACE, registry=Shared())
    assert market._listeners.schemes == ("ucx",)
    market.close()


@pytest.mark.without_ucxx
def test_ucx_without_ucxx_names_the_extra(monkeypatch):
    monkeypatch.setattr(reach.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"kvmarket\[ucx\]"):
        reach.make_transports(MarketConfig(transport="ucx"), {})
    assert [transport.scheme for transport in reach.make_transports(MarketConfig(), {})] == [
        "inproc",
        "shm",
        "cuda_ipc",
    ]


def test_importing_kvmarket_loads_no_ucx():
    code = "import sys, kvmarket; sys.exit(any(name.startswith(('ucxx', 'libucx')) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False, timeout=30).returncode == 0


def test_settings_are_checked():
    assert MarketConfig.from_env({"KVMARKET_TRANSPORT": "ucx", "KVMARKET_UCX_REQUIRE": "rdma"}).ucx_require == "rdma"
    with pytest.raises(ConfigError, match="UCX_REQUIRE"):
        MarketConfig.from_env({"KVMARKET_UCX_REQUIRE": "magic"})
    assert MarketConfig(ucx_addresses="10.0.0.1, fe80::1").ucx_addresses
    with pytest.raises(ConfigError, match="UCX_ADDRESSES"):
        MarketConfig.from_env({"KVMARKET_UCX_ADDRESSES": "10.0.0.1,somewhere"})


def test_what_the_user_set_for_ucx_wins_and_what_was_set_is_told():
    assert ucx_settings.ucx_settings({}) == ucx_settings.DEFAULTS
    chosen = ucx_settings.ucx_settings({"UCX_MAX_RNDV_RAILS": "4"})
    assert "MAX_RNDV_RAILS" not in chosen
    assert chosen["MM_ERROR_HANDLING"] == "y"
    transport = UcxTransport({})
    _ = transport.driver
    assert transport.settings["KEEPALIVE_INTERVAL"] == "1s"
    assert "MM_ERROR_HANDLING" not in os.environ
    transport.close()
    with pytest.raises(TransportUnavailableError, match="closed"):
        _ = transport.driver


@pytest.mark.parametrize(
    ("lanes", "rdma", "shm", "one_sided"),
    [
        ((("tcp", ""), ("tcp", "eth0")), False, False, False),
        ((("tcp", ""), ("posix", "memory"), ("cma", "memory")), False, True, True),
        ((("tcp", ""), ("posix", "memory")), False, True, False),
        ((("rc_mlx5", "mlx5_0:1"), ("tcp", "")), True, False, True),
        ((("ud_verbs", "rxe0:1"),), True, False, False),
        ((), False, False, False),
    ],
)
def test_lanes_are_judged(lanes, rdma, shm, one_sided):
    missing = ucx_settings.missing_requirement
    assert (missing("rdma", lanes) is None) == rdma
    assert (missing("shm", lanes) is None) == shm
    assert (missing("one_sided", lanes) is None) == one_sided == ucx_settings.reads_one_sided(lanes)
    assert missing("", lanes) is None


def test_descriptors_without_endpoints_still_decode_and_bad_ones_are_refused():
    owner = RegionOwner()
    descriptor = owner.lend_pattern(2, 64).descriptor
    owner.close()
    full = replace(descriptor, endpoints={"ucx": (("10.0.0.1", 4711),)})
    assert RegionDescriptor.from_wire(full.to_wire()) == full
    old = full.to_wire()
    del old["endpoints"]
    assert descriptor.to_wire() == old
    assert RegionDescriptor.from_wire(old) == descriptor
    for bad in (7, {"ucx": [["a", 0]]}, {"ucx": [["a"]]}, {"ucx": [[1, 2]]}, {3: []}, {"ucx": [["a", 1]] * 65}):
        with pytest.raises(RegistryProtocolError):
            RegionDescriptor.from_wire({**old, "endpoints": bad})


def test_pages_that_peers_cannot_map_are_read_in_place(settings):
    """Private memory of the owner's process, which shared memory does not reach, is served by UCX as it is."""
    config = MarketConfig(**settings, transport="ucx")
    owner, reader = core.MarketCore(NAMESPACE, config), core.MarketCore(NAMESPACE, config)
    pages = np.arange(4 * SPEC.page_bytes, dtype=np.uint32).astype(np.uint8).reshape(4, SPEC.page_bytes)
    publisher = owner.publisher(owner.lend(PagedMemory.packed(pages)))
    keys = block_keys([bytes([i]) * 32 for i in range(4)])
    publisher.offer(keys, range(4), wait=True).result(5)
    found, _, _ = reader.fetcher.lookup(keys)
    local = np.zeros_like(pages)
    outcome = reader.fetcher.read(found, PagedMemory.packed(local), np.arange(4), Deadline(5))
    assert outcome.blocks == 4
    assert (local == pages).all()
    assert outcome.transfers[0].transport == "ucx"
    reader.close()
    owner.close()
