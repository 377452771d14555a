"""Tenants with secrets, as real processes that share a registry: none reads, shadows or times another's entries."""

import contextlib
import secrets as random_secrets
from collections import Counter
from dataclasses import replace
from functools import partial

import market_jobs as jobs
import pytest
from typer.testing import CliRunner

from kvmarket import Marketplace, MissReason
from kvmarket.cli import app
from kvmarket.errors import ConfigError
from kvmarket.registry import open_registry
from kvmarket.registry.lmdb import LmdbRegistry
from kvmarket.registry.records import block_keys
from kvmarket.testing.redis_server import WHERE_FROM, RedisServer, find_server
from kvmarket.testing.sample_records import chain
from kvmarket.testing.samples import SPEC, sample_kv, sample_tokens

BLOCKS = 40  # more than a run
SHARED, ELSE = 1, 2
"""Prompts: the one that everybody asks about, and another one that tenant A always holds."""


@pytest.fixture(params=["lmdb", "redis"])
def base(request, config, tmp_path):
    """Settings without a secret, over either registry."""
    if request.param == "lmdb":
        yield config
        return
    pytest.importorskip("redis", reason="the extra 'redis' is not installed")
    if find_server() is None:
        pytest.skip(WHERE_FROM)
    with RedisServer(tmp_path) as server:
        yield replace(config, registry=f"{server.url}?timeout_s=5&lease_s=10")


@pytest.fixture
def secret_file(tmp_path):
    def write(name):
        path = tmp_path / name
        path.write_text(random_secrets.token_hex(32))
        path.chmod(0o600)
        return str(path)

    return write


@pytest.fixture
def tenants(base, secret_file):
    """The settings of tenant A, and of those who are not A: another secret, and none."""
    mine = replace(base, secret_file=secret_file("a"))
    return mine, {"another secret": replace(base, secret_file=secret_file("b")), "no secret": base}


def opened(peers, config):
    peer = peers.spawn()
    peer.call(jobs.open_market, config)
    return peer


def bytes_differ(state, seed):
    """Publish other bytes under the same tokens, as somebody does who wants others to adopt them."""
    tokens = sample_tokens(seed, BLOCKS)
    return state.loop.run_until_complete(state.market.publish(tokens, 255 - sample_kv(tokens, SPEC)))


async def test_nothing_of_a_tenant_is_found_without_its_secret(peers, tenants):
    mine, others = tenants
    publisher = opened(peers, mine)
    publisher.call(jobs.publish, SHARED, BLOCKS)
    nobody = "nobody has published anything in this registry that may be shown here"
    for config in others.values():
        async with Marketplace("model", SPEC, config=config) as market:
            match = await market.match(sample_tokens(SHARED, BLOCKS))
            fetched = await market.fetch(sample_tokens(SHARED, BLOCKS))
            report = fetched.report
            said = [match.reason, match.detail, match.owners, report.reason, report.detail, report.sources]
            assert (match.blocks, report.blocks_adopted, len(fetched.kv)) == (0, 0, 0)
            assert await market.withdraw(sample_tokens(SHARED, BLOCKS)) == 0
            assert said == [MissReason.NOT_PUBLISHED, nobody, (), MissReason.NOT_PUBLISHED, nobody, {}]
            assert market.core.registry.namespaces() == []
    assert publisher.call(jobs.fetch, SHARED, BLOCKS)[0].blocks_adopted == BLOCKS
    async with Marketplace("model", SPEC, config=mine) as market:
        result = await market.fetch(sample_tokens(SHARED, BLOCKS))
        assert (result.kv == sample_kv(sample_tokens(SHARED, BLOCKS), SPEC)).all(), "who has the secret finds it"


def test_a_tenant_can_neither_shadow_nor_remove_what_is_anothers(peers, tenants):
    mine, others = tenants
    publisher, reader = opened(peers, mine), opened(peers, mine)
    strangers = [opened(peers, config) for config in others.values()]
    for stranger in strangers:
        stranger.call(bytes_differ, SHARED)
    assert reader.call(jobs.fetch, SHARED, BLOCKS)[0].blocks_adopted == 0, "what a stranger offers does not reach A"
    publisher.call(jobs.publish, SHARED, BLOCKS)
    for stranger in strangers:
        for meddle in (
            partial(stranger.call, bytes_differ, SHARED),
            partial(stranger.call, jobs.withdraw, SHARED, BLOCKS),
            partial(stranger.call, jobs.bump_epoch),
            partial(stranger.call, jobs.close_market),
        ):
            meddle()
            report, right = reader.call(jobs.fetch, SHARED, BLOCKS)
            assert (report.blocks_adopted, right) == (BLOCKS, True)


def test_a_new_secret_is_a_new_namespace(peers, base, secret_file):
    old = replace(base, secret_file=secret_file("old"))
    publisher = opened(peers, old)
    publisher.call(jobs.publish, SHARED, BLOCKS)
    rotated = opened(peers, replace(base, secret_file=secret_file("new")))
    assert rotated.call(jobs.fetch, SHARED, BLOCKS)[0].blocks_adopted == 0
    rotated.call(jobs.publish, SHARED, BLOCKS)
    publisher.call(jobs.close_market)
    assert rotated.call(jobs.fetch, SHARED, BLOCKS)[0].blocks_adopted == BLOCKS


def test_the_administrator_of_the_registry_sees_no_secret_and_cannot_compute_a_key(peers, tenants):
    """What is stored, all of it: neither the secret nor keys that follow from the namespace's digest and the tokens."""
    mine, _ = tenants
    publisher = opened(peers, mine)
    digest = publisher.call(jobs.open_market, mine)
    publisher.call(jobs.publish, SHARED, BLOCKS)
    stored = everything_stored(mine)
    text = mine.read_secret()._value
    assert digest in stored or digest.hex().encode() in stored, "this does look at what is stored"
    assert text not in stored
    hashes = publisher.call(hashes_from, digest)
    assert not [key for key in block_keys(hashes) if key[12:] in stored]


def hashes_from(state, root):
    from kvmarket.hashing import hash_blocks

    return hash_blocks(sample_tokens(SHARED, BLOCKS), SPEC.block_size, root=root)


def everything_stored(config):
    registry = open_registry(config)
    try:
        if isinstance(registry, LmdbRegistry):
            return b"".join(path.read_bytes() for path in config.directory.iterdir() if path.is_file())
        client = registry._reads
        parts = []
        for key in client.call(b"KEYS", b"*"):
            parts += [key, client.call(b"DUMP", key) or b""]
            if client.call(b"TYPE", key) == b"hash":
                parts += client.call(b"HGETALL", key)
            elif client.call(b"TYPE", key) == b"set":
                parts += client.call(b"SMEMBERS", key)
        return b"".join(parts)
    finally:
        registry.close()


# ---- what a stranger could tell the difference by


@contextlib.contextmanager
def counted(registry):
    """Count what look-ups ask of the store and how many bytes come back, in `Counter`s of its operations."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(registry, LmdbRegistry):
            read = registry._file.read

            @contextlib.contextmanager
            def counting():
                with read() as txn:
                    yield CountingTransaction(txn, counts)

            patch.setattr(registry._file, "read", counting)
        else:
            exchange = registry._reads._exchange

            def counting_trip(node, commands):
                replies = exchange(node, commands)
                counts["round trips"] += 1
                counts["commands"] += len(commands)
                counts["bytes sent"] += len(repr(commands))
                counts["bytes back"] += len(repr(replies))
                return replies

            patch.setattr(registry._reads, "_exchange", counting_trip)
        yield counts


class CountingTransaction:
    """An lmdb transaction, or a cursor of one, that counts calls and the bytes they return."""

    def __init__(self, inner, counts):
        self._inner, self._counts = inner, counts

    def __getattr__(self, name):
        method = getattr(self._inner, name)

        def call(*args, **kwargs):
            self._counts[name] += 1
            result = method(*args, **kwargs)
            if isinstance(result, bytes):
                self._counts["bytes"] += len(result)
            return CountingTransaction(result, self._counts) if name == "cursor" else result

        return call

    def __iter__(self):
        for item in self._inner:
            self._counts["next"] += 1
            self._counts["bytes"] += sum(map(len, item))
            yield item

    def __enter__(self):
        self._inner.__enter__()
        return self

    def __exit__(self, *exc):
        return self._inner.__exit__(*exc)


async def asked_by(config):
    """What a tenant is told about the shared prompt, and what the registry does for it."""
    async with Marketplace("model", SPEC, config=config) as market:
        registry = market.core.registry
        registry.lookup(random_secrets.token_bytes(32), chain(1, 2))  # now a server knows the script
        with counted(registry) as counts:
            match = await market.match(sample_tokens(SHARED, BLOCKS))
            result = await market.fetch(sample_tokens(SHARED, BLOCKS))
        report = replace(result.report, stages={})
        assert counts, "something was counted"
    return replace(match, seconds=0.0), report, dict(counts)


def seen_by_commands(config):
    env = {"KVMARKET_REGISTRY": config.registry, "KVMARKET_RUNTIME_DIR": config.runtime_dir}
    env |= {"KVMARKET_SECRET_FILE": config.secret_file} if config.secret_file else {}
    env |= {"KVMARKET_TRANSPORT": "shm"}
    shown = []
    for command in (["stats"], ["stats", "--json"], ["doctor"]):
        result = CliRunner().invoke(app, command, env=env)
        assert result.exit_code == 0, result.output
        output = result.output.partition("\nregistry\n")[2] or result.output  # before it is what UCX found here
        shown.append([line for line in output.splitlines() if " used, " not in line])
    return shown


def without_sizes(shown):
    """The size of the whole registry is not hidden: everybody who uses it fills it."""
    return [[line.split('"used_bytes"')[0] + line.partition('"blocks"')[2] for line in lines] for lines in shown]


async def test_a_stranger_cannot_tell_whether_a_tenant_holds_a_prompt(peers, tenants):
    """The same answers, the same counts, and the same work in the registry, whether A holds it or not."""
    mine, others = tenants
    publisher = opened(peers, mine)
    publisher.call(jobs.publish, ELSE, BLOCKS)
    for config in others.values():
        await asked_by(config)  # now their own namespaces are known as well
    before = [(await asked_by(config), without_sizes(seen_by_commands(config))) for config in others.values()]
    publisher.call(jobs.publish, SHARED, BLOCKS)
    after = [(await asked_by(config), without_sizes(seen_by_commands(config))) for config in others.values()]
    assert after == before


def test_who_has_the_secret_is_shown_its_own(peers, tenants):
    mine, others = tenants
    publisher = opened(peers, mine)
    digest = publisher.call(jobs.open_market, mine)
    publisher.call(jobs.publish, SHARED, BLOCKS)
    assert digest.hex()[:12] in str(seen_by_commands(mine))
    assert f"{BLOCKS} blocks of" in str(seen_by_commands(mine))
    for other in others.values():
        assert digest.hex()[:12] not in str(seen_by_commands(other))
        assert "'0 blocks of" in str(seen_by_commands(other))


def test_nothing_that_is_printed_contains_the_secret(tenants, capfd):
    mine, _ = tenants
    text = mine.read_secret()._value.decode()
    by_value = {"KVMARKET_SECRET": text, "KVMARKET_RUNTIME_DIR": mine.runtime_dir, "KVMARKET_REGISTRY": mine.registry}
    for command in ("doctor", "stats"):
        output = CliRunner().invoke(app, [command], env=by_value).output
        assert output
        assert text not in output
    assert text not in "".join(capfd.readouterr())


async def test_a_bad_secret_file_stops_a_marketplace_before_it_opens(base, tmp_path):
    path = tmp_path / "world"
    path.write_text("x" * 32)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="0644"):
        Marketplace("model", SPEC, config=replace(base, secret_file=str(path)))
