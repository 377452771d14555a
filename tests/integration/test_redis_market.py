"""Two processes share blocks over a real server and shared memory; the server and the owners have bad days."""

import os
import signal
import subprocess
import time
from dataclasses import replace

import pytest

pytest.importorskip("redis", reason="the extra 'redis' is not installed")

import market_jobs as jobs

from kvmarket import MarketConfig
from kvmarket.errors import NamespaceDeniedError, RegistryUnavailableError
from kvmarket.registry.redis import RedisRegistry
from kvmarket.registry.redis_search import STRETCHES_ALL_INSIDE
from kvmarket.report import MissReason
from kvmarket.testing.redis_server import WHERE_FROM, RedisServer, find_server
from kvmarket.testing.sample_records import announce, chain, rows
from kvmarket.testing.waiting import until

pytestmark = pytest.mark.skipif(find_server() is None, reason=WHERE_FROM)

LEASE_S = 3.0
TIMEOUT_S = 5.0  # machines that run tests are busy
BLOCKS = 12


@pytest.fixture
def server(tmp_path):
    with RedisServer(tmp_path) as server:
        yield server


def url_of(server, **options):
    chosen = {"lease_s": LEASE_S, "timeout_s": TIMEOUT_S, **options}
    return f"{server.url}?" + "&".join(f"{name}={value}" for name, value in chosen.items())


@pytest.fixture
def config(server, runtime_dir):
    return MarketConfig(
        registry=url_of(server), runtime_dir=str(runtime_dir), arena_bytes=4 << 20, fetch_deadline_s=10.0
    )


def market(peers, config):
    peer = peers.spawn()
    peer.call(jobs.open_market, config)
    return peer


def fetched(peer, seed, blocks=BLOCKS):
    """Blocks adopted, all of them right."""
    report, right = peer.call(jobs.fetch, seed, blocks)
    assert right
    assert report.blocks_adopted in (0, blocks)
    return report


def test_one_process_fetches_what_another_published(peers, config):
    owner, reader = market(peers, config), market(peers, config)
    assert owner.call(jobs.publish, 1, BLOCKS).blocks == BLOCKS
    report = fetched(reader, 1)
    assert (report.blocks_adopted, report.transport) == (BLOCKS, "shm")
    assert fetched(reader, 2).reason is MissReason.NOT_PUBLISHED
    assert owner.call(jobs.withdraw, 1, BLOCKS) == BLOCKS
    until(lambda: fetched(reader, 1).blocks_adopted == 0, "the withdrawal")


def test_a_new_epoch_reaches_everybody(peers, config):
    owner, reader = market(peers, config), market(peers, config)
    owner.call(jobs.publish, 1, BLOCKS)
    assert fetched(reader, 1).blocks_adopted == BLOCKS
    reader.call(jobs.bump_epoch)
    assert fetched(reader, 1).blocks_adopted == 0

    def published_again():  # the owner hears of it with its next heartbeat
        owner.call(jobs.publish, 1, BLOCKS)
        return fetched(reader, 1).blocks_adopted == BLOCKS

    until(published_again, "publishing in the new epoch")


def test_owners_announce_again_when_the_server_comes_back_empty(peers, config, server):
    owner, reader = market(peers, config), market(peers, config)
    owner.call(jobs.publish, 1, BLOCKS)
    assert fetched(reader, 1).blocks_adopted == BLOCKS
    server.kill()
    began = time.monotonic()
    report = fetched(reader, 1)
    assert report.reason is MissReason.REGISTRY_UNAVAILABLE
    assert time.monotonic() - began < config.fetch_deadline_s
    server.start()
    report = until(lambda: (r := fetched(reader, 1)).blocks_adopted and r, "the blocks of before")
    assert report.transport == "shm"
    assert owner.call(jobs.publish, 2, BLOCKS).blocks == BLOCKS
    assert fetched(reader, 2).blocks_adopted == BLOCKS


def test_a_server_that_hangs_costs_one_timeout(peers, config, server):
    timeout_s = 1.0
    impatient = replace(config, registry=url_of(server, timeout_s=timeout_s))
    owner, reader = market(peers, config), market(peers, impatient)
    owner.call(jobs.publish, 1, BLOCKS)
    server.stop()
    try:
        began = time.monotonic()
        reports = [fetched(reader, 1) for _ in range(200)]
        took = time.monotonic() - began
    finally:
        server.go_on()
    assert {report.reason for report in reports} == {MissReason.REGISTRY_UNAVAILABLE}
    assert took < 200 * timeout_s / 10, "only the first may wait"
    until(lambda: fetched(reader, 1).blocks_adopted, "the blocks of before")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_lease_of_an_owner_runs_out(peers, config, how):
    owner, reader = market(peers, config), market(peers, config)
    owner.call(jobs.publish, 1, BLOCKS)
    assert fetched(reader, 1).blocks_adopted == BLOCKS
    owner.signal(how)
    until(lambda: fetched(reader, 1).blocks_adopted == 0, "the end of the lease")
    registry = RedisRegistry(config.registry)
    assert registry.namespaces() == []
    registry.sweep()  # the reader's keeper may have been faster
    assert registry.usage()[3:] == (0, 0, 0)
    if how == signal.SIGSTOP:
        owner.signal(signal.SIGCONT)
        until(lambda: fetched(reader, 1).blocks_adopted, "the owner under a new number")
        assert owner.call(jobs.publish, 2, BLOCKS).blocks == BLOCKS
        assert fetched(reader, 2).blocks_adopted == BLOCKS
        owner.kill()
    registry.close()


# ---- the registry by itself


@pytest.fixture
def opened(server):
    """Registries that are closed after the test."""
    made = []

    def make(url=None, **options):
        made.append(RedisRegistry(url or url_of(server, **options)))
        return made[-1]

    yield make
    for registry in made:
        registry.close()


def keys_left(registry):
    return {key for key in registry._writes.call(b"KEYS", b"*") if not key.endswith((b":e", b":d", b":c"))}


def test_nothing_but_namespaces_is_left_of_released_owners(opened):
    registry, digest = opened(), os.urandom(32)
    registry.open_namespace(digest, {})
    owner = registry.register_owner(os.urandom(16)).owner
    registry.register_region(owner, 0, {})
    announce(registry, digest, owner, chain(1, 5000))
    registry.bump_epoch(digest)
    announce(registry, digest, owner, chain(1, 500))
    assert keys_left(registry)
    registry.release_owner(owner)
    assert keys_left(registry) == set()


def test_an_expired_owner_never_comes_back_under_its_number(opened):
    registry, other, digest = opened(lease_s=60), opened(), os.urandom(32)
    registry.open_namespace(digest, {})
    info = registry.register_owner(os.urandom(16))
    registry.register_region(info.owner, 3, {"of": "me"})
    keys = chain(1, 100)
    assert announce(registry, digest, info.owner, keys)
    other._owners.fence(info.owner)  # as if its lease had run out
    found = other.lookup(digest, keys)
    assert (found.blocks, len(found.records)) == (0, 0)
    assert announce(registry, digest, info.owner, chain(2, 10)), "it starts over on its own"
    found = other.lookup(digest, keys)
    (number,) = found.owners
    assert found.blocks == 100
    assert number != info.owner
    assert found.owners[number].incarnation == info.incarnation
    assert not other.alive(info.owner)
    assert other.region(number, 3)["of"] == "me"
    assert other.region(info.owner, 3) is None
    registry.release_owner(info.owner)
    assert keys_left(registry) == set()


def test_fencing_one_owner_leaves_the_others_alone(opened):
    registry, digest = opened(lease_s=60), os.urandom(32)
    registry.open_namespace(digest, {})
    first, second = (registry.register_owner(os.urandom(16)).owner for _ in range(2))
    keys = chain(1, 3000)
    announce(registry, digest, first, keys)
    announce(registry, digest, second, keys[:2500], first_page=7)
    registry.release_owner(first)
    found = registry.lookup(digest, keys)
    assert rows(found) == [(block, second, block + 7, 2) for block in range(2500)]
    registry.release_owner(second)


def test_the_highest_epoch_wins_after_the_server_lost_all(opened, server):
    """Who did not hear of a new epoch must not bring the old one back, even where it tells the new server first."""
    late, informed, reader, digest = opened(), opened(), opened(), os.urandom(32)
    old = late.open_namespace(digest, {})
    owner = late.register_owner(os.urandom(16)).owner
    keys = chain(1, 20)
    announce(late, digest, owner, keys)
    late._keeper.stop()  # hears nothing
    informed.open_namespace(digest, {})
    informed._keeper.stop()
    new = informed.bump_epoch(digest)
    server.kill()
    server.start()
    while late._beat():
        time.sleep(0.05)
    assert late.epoch(digest) == old
    assert reader.lookup(digest, keys).blocks == 0, "held back until others had the time to tell"
    while informed._beat():
        time.sleep(0.05)
    assert reader.epoch(digest) == new
    late._beat()
    time.sleep(LEASE_S + 0.2)
    late._beat()
    assert reader.lookup(digest, keys).blocks == 0
    late.release_owner(owner)


def test_entries_live_as_long_as_they_are_renewed(opened):
    registry, reader, digest = opened(ttl_s=4, lease_s=3), opened(), os.urandom(32)
    registry.open_namespace(digest, {})
    owner = registry.register_owner(os.urandom(16)).owner
    keys = chain(1, 50)
    announce(registry, digest, owner, keys)
    end = time.monotonic() + 8
    while time.monotonic() < end:
        assert reader.lookup(digest, keys).blocks == 50
        time.sleep(0.1)
    lease = registry._owners.find(owner)
    lease.spaces[digest].stretches.clear()  # now nobody renews them
    until(lambda: reader.lookup(digest, keys).blocks == 0, "the end of the entries")
    registry.release_owner(owner)


def test_a_crowded_run_is_searched_on_the_server(opened):
    """Many prompts that share their first blocks: each has a stretch of its own from where it differs."""
    registry, reader, digest = opened(lease_s=60), opened(), os.urandom(32)
    registry.open_namespace(digest, {})
    owner = registry.register_owner(os.urandom(16)).owner
    shared, branches = 9, [chain(seed, 24, common=9) for seed in range(STRETCHES_ALL_INSIDE + 20)]
    announce(registry, digest, owner, branches[0])
    for number, keys in enumerate(branches[1:], 1):
        announce(registry, digest, owner, keys[shared:], first_page=100 * number)
    for number in (0, 1, 300, len(branches) - 1):
        expected = [(b, owner, b if b < shared or not number else 100 * number + b - shared, 2) for b in range(24)]
        assert rows(reader.lookup(digest, branches[number])) == expected
        inside = reader.lookup(digest, branches[number][shared:])
        assert [row[2] for row in rows(inside)] == [row[2] for row in expected[shared:]] * (number > 0)
    assert reader._runs.crowded
    found = reader.lookup(digest, branches[5])
    assert reader.discard(digest, found.keys, found.records[[3, 20]]) == 2
    assert reader.lookup(digest, branches[5]).blocks == 3
    assert registry.withdraw(digest, owner, branches[5][shared:]) == 24 - shared
    registry.release_owner(owner)
    assert keys_left(registry) == set()


@pytest.mark.parametrize("kind", ["redis", "lmdb"])
def test_records_that_their_owner_refuses_are_removed(peers, config, kind):
    if kind == "lmdb":
        config = replace(config, registry="lmdb")
    owner, reader = market(peers, config), market(peers, config)
    owner.call(jobs.publish, 1, BLOCKS)
    owner.call(jobs.publish, 2, BLOCKS)
    assert owner.call(jobs.announce_stale, 1, BLOCKS)
    assert fetched(reader, 1).reason is MissReason.STALE_GENERATION
    until(lambda: owner.call(jobs.found_blocks, 1, BLOCKS) == 0, "the end of stale records")
    assert fetched(reader, 2).blocks_adopted == BLOCKS


def test_an_owner_may_not_fill_the_server(opened):
    registry, digest = opened(entries_max=100), os.urandom(32)
    registry.open_namespace(digest, {})
    owner = registry.register_owner(os.urandom(16)).owner
    assert announce(registry, digest, owner, chain(1, 90))
    with pytest.raises(RegistryUnavailableError, match="100 blocks"):
        announce(registry, digest, owner, chain(2, 20))
    assert registry.lookup(digest, chain(2, 20)).blocks == 0
    assert registry.lookup(digest, chain(1, 90)).blocks == 90
    registry.release_owner(owner)


def test_a_server_without_memory_is_full_not_wrong(tmp_path):
    with RedisServer(tmp_path, ["--maxmemory", "2mb", "--maxmemory-policy", "noeviction"]) as server:
        registry, digest = RedisRegistry(url_of(server)), os.urandom(32)
        registry.open_namespace(digest, {})
        owner = registry.register_owner(os.urandom(16)).owner

        def fill():
            for seed in range(100):
                announce(registry, digest, owner, chain(seed, 500))

        with pytest.raises(RegistryUnavailableError, match="no room"):
            fill()
        assert registry.lookup(digest, chain(0, 500)).blocks == 500
        registry.release_owner(owner)
        registry.close()


# ---- users and encryption


def take_and_find(registry, digest):
    """Announce blocks, find them, and close."""
    registry.open_namespace(digest, {})
    owner = registry.register_owner(os.urandom(16)).owner
    assert announce(registry, digest, owner, chain(1, 10))
    assert registry.lookup(digest, chain(1, 10)).blocks == 10
    registry.release_owner(owner)
    registry.close()


def test_an_access_controlled_user_by_url(tmp_path):
    rules = "on >pass~word ~kvm:* -@all +@connection +@read +@write +@scripting +time"
    users = tmp_path / "users.acl"
    users.write_text(f"user default off\nuser market {rules}\n")
    with RedisServer(tmp_path, ["--aclfile", str(users)]) as server:
        place = f"127.0.0.1:{server.port}"
        registry, digest = RedisRegistry(f"redis://market:pass~word@{place}"), os.urandom(32)
        take_and_find(registry, digest)
        for user in ("market:wrong@", "nobody:pass~word@", ""):
            refused = RedisRegistry(f"redis://{user}{place}")
            with pytest.raises(NamespaceDeniedError) as error:
                refused.lookup(digest, chain(1, 10))
            assert "wrong" not in str(error.value)
            refused.close()


@pytest.fixture
def certificate(tmp_path):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost"]
    try:
        subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    return key, cert


def test_encryption_by_url(tmp_path, certificate):
    key, cert = certificate
    options = ["--tls-cert-file", str(key.parent / "cert.pem"), "--tls-key-file", str(key), "--tls-auth-clients", "no"]
    try:
        server = RedisServer(tmp_path, options, tls=True)
    except TimeoutError as error:
        if "Bad directive" not in str(error) and "Unrecognized" not in str(error):
            raise
        pytest.skip("this server is built without TLS")
    with server:
        registry, digest = RedisRegistry(f"{server.url}?ssl_ca_certs={cert}&timeout_s=2"), os.urandom(32)
        take_and_find(registry, digest)
        untrusting = RedisRegistry(f"{server.url}?timeout_s=2")
        with pytest.raises(RegistryUnavailableError, match=r"(?i)certificate"):
            untrusting.lookup(digest, chain(1, 10))
        untrusting.close()


def test_what_is_on_disk_is_served_after_a_restart_unless_another_host_bumped_the_epoch(peers, config, tmp_path):
    """The other host is a process that keeps its logs elsewhere: only the server tells of the new epoch."""
    config = replace(config, disk_bytes=8 << 20, disk_dir=str(tmp_path / "disk"))
    other = market(peers, replace(config, disk_bytes=0, disk_dir=str(tmp_path / "elsewhere")))
    owner = market(peers, config)
    owner.call(jobs.publish, 1, BLOCKS)
    assert owner.call(jobs.flush_disk)
    owner.kill()
    again = market(peers, config)
    assert fetched(again, 1).blocks_adopted == BLOCKS
    again.kill()
    other.call(jobs.bump_epoch)
    assert not fetched(market(peers, config), 1).hit
