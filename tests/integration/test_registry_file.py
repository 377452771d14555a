"""The registry file in every state it may be found in: never a crash, never wrong, an error that says what to do."""

import asyncio
import hashlib
import os
import random
import shutil
from dataclasses import replace

import lmdb
import market_jobs as jobs
import numpy as np
import pytest

from kvmarket import ConfigError, Marketplace, MissReason, RegistryError
from kvmarket.errors import RegistryFullError, RegistryProtocolError, RegistryUnavailableError
from kvmarket.registry import block_keys
from kvmarket.registry.lmdb import LmdbRegistry
from kvmarket.registry.lmdb_file import FILE_NAME, USERS_NAME
from kvmarket.registry.records import make_records, pack
from kvmarket.testing.samples import SPEC, sample_kv, sample_tokens

TOKENS = sample_tokens(1, 40)


@pytest.fixture
def used(peers, config):
    """The registry of two owners that were killed, in use by a process that looks on."""
    onlooker = peers.spawn()
    onlooker.call(jobs.open_market, config)
    for seed in (1, 2):
        peer = peers.spawn()
        peer.call(jobs.open_market, config)
        peer.call(jobs.publish, seed, 40)
        peer.kill()
    path = config.directory / FILE_NAME
    yield path
    onlooker.kill()


@pytest.fixture
def left(peers, config):
    """The registry of two owners that were killed; nobody uses it."""
    for seed in (1, 2):
        peer = peers.spawn()
        peer.call(jobs.open_market, config)
        peer.call(jobs.publish, seed, 40)
        peer.kill()
    return config.directory / FILE_NAME


def use(state, config):
    """Everything a process does with a registry; returns what became of it."""
    try:
        jobs.open_market(state, config)
    except RegistryError as error:
        return type(error).__name__, str(error)
    try:
        try:
            report, equal = jobs.fetch(state, 1, 40)
            assert equal
            if report.reason is MissReason.REGISTRY_UNAVAILABLE:
                return "miss", report.detail
            blocks = jobs.publish(state, 3, 4).blocks
            report, equal = jobs.fetch(state, 3, 4)
            assert equal
            assert report.blocks_adopted == blocks == 4
        except RegistryError as error:
            return type(error).__name__, str(error)
    finally:
        jobs.close_market(state)
    return "fine", ""


def test_a_newer_major_is_refused_by_name(used, config):
    env = lmdb.open(str(used), subdir=False, max_dbs=16)
    with env.begin(write=True) as txn:
        later = pack("registry", {}).replace(b"\x01", b"\x02", 1)
        txn.put(b"version", later, db=env.open_db(b"meta", txn=txn))
    env.close()
    for _ in range(2):
        with pytest.raises(RegistryProtocolError, match=r"another kvmarket.*version 2"):
            Marketplace("model", SPEC, config=config)


def test_a_newer_major_that_nobody_uses_is_kept(left, config):
    (config.directory / USERS_NAME).write_bytes(b"kvmarket registry 2\n")
    before = left.read_bytes()
    for _ in range(2):
        with pytest.raises(RegistryProtocolError, match="another kvmarket: version 2"):
            Marketplace("model", SPEC, config=config)
    assert left.read_bytes() == before


def random_pages(path, seed, pages):
    rng = random.Random(seed)
    with path.open("r+b") as file:
        for _ in range(pages):
            file.seek(4096 * rng.randrange(2, path.stat().st_size // 4096))
            file.write(rng.choice([bytes(4096), rng.randbytes(4096), rng.randbytes(16)]))


@pytest.mark.parametrize("damage", ["none", "pages", "header", "short", "empty", "lock"])
def test_with_nobody_left_it_is_made_anew(left, config, peers, damage):
    """So no damage done meanwhile matters. (lmdb would abort the process on some of it.)"""
    if damage == "pages":
        random_pages(left, 1, 20)
    elif damage == "header":
        left.write_bytes(os.urandom(9000))
    elif damage in {"short", "empty"}:
        os.truncate(left, 9000 if damage == "short" else 0)
    elif damage == "lock":
        (left.parent / f"{FILE_NAME}-lock").write_bytes(os.urandom(8192))
    first = peers.spawn()
    first.call(jobs.open_market, config)
    report, _ = first.call(jobs.fetch, 1, 40)
    assert (report.reason, report.blocks_adopted) == (MissReason.NOT_PUBLISHED, 0)
    assert [path.name for path in (config.directory / "owners").iterdir()] == []
    first.call(jobs.publish, 1, 4)
    assert peers.spawn().call(use, config) == ("fine", "")
    report, equal = first.call(jobs.fetch, 1, 4)
    assert (report.blocks_adopted, equal) == (4, True)


def test_processes_that_start_together_meet(left, config, peers):
    """Exactly one of them makes the registry anew, before anybody else is in it."""
    for turn in range(5):
        fleet = [peers.spawn() for _ in range(4)]
        for peer in fleet:
            peer.start(jobs.open_market, config)
        for peer in fleet:
            peer.result()
        for number, peer in enumerate(fleet):
            peer.call(jobs.publish, 10 * turn + number, 3)
        for peer in fleet:
            for number in range(len(fleet)):
                report, equal = peer.call(jobs.fetch, 10 * turn + number, 3)
                assert (report.blocks_adopted, equal) == (3, True)
        for peer in fleet:
            peer.kill()


@pytest.mark.parametrize(
    "keep",
    [0, 1, 17, 4095, 4096, 4097, 8191, 8192, 8193, 12288, 20000, 0.3, 0.5, 0.7, 0.9, -4097, -4096, -1],
)
def test_a_truncated_file(used, config, peers, keep):
    size = used.stat().st_size
    os.truncate(used, int(size * keep) if isinstance(keep, float) else keep if keep >= 0 else size + keep)
    outcome, detail = peers.spawn().call(use, config)
    assert outcome in {"fine", "miss", "RegistryProtocolError", "RegistryUnavailableError"}
    if outcome == "RegistryProtocolError":
        assert "remove it" in detail
    if keep == 0:
        assert outcome == "fine", "an empty file is a new one"


@pytest.mark.parametrize("nbytes", [1, 100, 4096, 8192, 100_000])
def test_random_bytes_instead_of_a_file(config, peers, nbytes):
    path = config.directory / FILE_NAME
    path.write_bytes(os.urandom(nbytes))
    outcome, detail = peers.spawn().call(use, config)
    assert outcome == "RegistryProtocolError"
    assert str(path) in detail
    assert "remove it" in detail
    path.unlink()
    assert peers.spawn().call(use, config) == ("fine", ""), "which helps"


def test_a_damaged_lock_file_is_no_crash(used, config, peers):
    (used.parent / f"{FILE_NAME}-lock").write_bytes(os.urandom(8192))
    outcome, detail = peers.spawn().call(use, config)
    assert outcome in {"fine", "RegistryProtocolError"}
    assert outcome == "fine" or "remove it" in detail


def test_records_of_a_newer_version_inside_are_skipped(config, peers):
    peer = peers.spawn()
    peer.call(jobs.open_market, config)
    peer.call(jobs.publish, 1, 4)
    reader = peers.spawn()
    reader.call(jobs.open_market, config)
    assert reader.call(rewrite_records, 2) == 2
    report, equal = reader.call(jobs.fetch, 1, 4)
    assert equal
    assert report.blocks_adopted == 2


def rewrite_records(state, first):
    """Give the records of later blocks another major version."""
    file, changed = state.market.core.registry._file, 0
    with file.write() as txn:
        for key, value in list(txn.cursor(file.tables["blocks"])):
            if int.from_bytes(key[12:16], "big") >= first:
                txn.delete(key, value, db=file.tables["blocks"])
                txn.put(key, value[:1] + b"\x02" + value[2:], db=file.tables["blocks"])
                changed += 1
    return changed


@pytest.mark.parametrize("how", ["removed", "replaced"])
async def test_a_registry_that_is_taken_away_is_noticed(config, peers, how):
    """Else its users would go on among themselves, and never meet those who come later."""
    async with Marketplace("model", SPEC, config=config) as market:
        await market.publish(TOKENS, sample_kv(TOKENS))
        shutil.rmtree(config.directory)
        if how == "replaced":
            newcomer = peers.spawn()
            newcomer.call(jobs.open_market, config)
            assert newcomer.call(jobs.publish, 5, 2).blocks == 2
        report = (await market.fetch(TOKENS)).report
        assert report.reason is MissReason.REGISTRY_UNAVAILABLE
        assert "was removed or replaced" in report.detail
        other_tokens = sample_tokens(2, 2)
        with pytest.raises(RegistryUnavailableError, match="restart this process"):
            await market.publish(other_tokens, sample_kv(other_tokens))


def test_a_directory_that_others_may_enter_is_refused(config):
    config.directory.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        Marketplace("model", SPEC, config=config)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(config):
    os.chown(config.directory, 65534, 65534)
    with pytest.raises(ConfigError, match="must belong to uid 0"):
        Marketplace("model", SPEC, config=config)


def test_a_directory_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RegistryUnavailableError, match=str(directory)):
            Marketplace("model", SPEC, config=replace(config, runtime_dir=str(directory)))


@pytest.mark.skipif(os.getuid() != 0, reason="root can read everything: a peer becomes somebody else")
def test_a_directory_that_cannot_be_read(config, tmp_path, peers):
    config.directory.chmod(0o700)
    for parent in (tmp_path, *tmp_path.parents[:-1]):
        if parent.stat().st_uid == 0 and parent.name.startswith("pytest"):
            parent.chmod(0o711)
    peer = peers.spawn()
    with pytest.raises(RegistryUnavailableError, match="Permission denied"):
        peer.call(open_as_nobody, replace(config, runtime_dir=f"{config.directory}/below"))


def open_as_nobody(state, config):
    os.setuid(65534)
    jobs.open_market(state, config)


def test_directories_are_made_private(config, tmp_path):
    directory = tmp_path / "new" / "runtime"
    LmdbRegistry(directory).close()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in directory.rglob("*")} == {0}


async def publish_until_full(market):
    for seed in range(400):
        try:
            await market.publish(sample_tokens(seed, 40), sample_kv(sample_tokens(seed, 40)))
        except RegistryFullError as error:
            return list(range(seed)), str(error)
    raise AssertionError("it was never full")


async def test_a_full_registry_is_an_error_and_the_market_goes_on(config, peers):
    config = replace(config, registry_bytes=1 << 20, arena_bytes=64 << 20)
    reader = peers.spawn()
    async with Marketplace("model", SPEC, config=config) as market:
        reader.call(jobs.open_market, config)
        seeds, message = await publish_until_full(market)
        assert "KVMARKET_REGISTRY_BYTES" in message
        assert len(seeds) > 10
        for seed in seeds[:: len(seeds) // 5]:
            report, equal = reader.call(jobs.fetch, seed, 40)
            assert equal
            assert report.blocks_adopted == 40
        for seed in seeds[: len(seeds) // 2]:
            assert await market.withdraw(sample_tokens(seed, 40)) == 40
        report = await market.publish(TOKENS, sample_kv(TOKENS))
        assert (report.blocks, report.blocks_new) == (40, 40)
        assert reader.call(jobs.fetch, 1, 40)[0].blocks_adopted == 40
        for _ in range(3):  # full again and again: it always recovers
            more, _message = await publish_until_full(market)
            for seed in more:
                await market.withdraw(sample_tokens(seed, 40))
        assert market.metrics()["blocks_withdrawn"] > 1000


def announce_until_full(registry, digest, epoch, records):
    announced = []
    for seed in range(400):
        keys = block_keys([hashlib.sha256(b"%d %d" % (seed, block)).digest() for block in range(len(records))])
        try:
            registry.announce(digest, epoch, keys, records)
        except RegistryFullError:
            return announced
        announced += keys
    raise AssertionError("it was never full")


@pytest.mark.parametrize("how", ["withdraw", "discard"])
def test_a_full_registry_has_room_to_remove_all_at_once(config, how):
    """In one transaction it has not: the blocks are on more pages than are free to copy them to."""
    registry = LmdbRegistry(config.directory, map_bytes=1 << 20)
    digest = b"n" * 16
    epoch, owner = registry.open_namespace(digest, {}), registry.register_owner(b"i" * 16).owner
    records = make_records(owner, 0, np.arange(40), np.full(40, 2, np.uint64))
    announced = announce_until_full(registry, digest, epoch, records)
    with pytest.raises(RegistryFullError):
        registry._withdraw(digest, owner, announced)
    every = make_records(owner, 0, np.tile(np.arange(40), len(announced) // 40), np.full(len(announced), 2, np.uint64))
    if how == "withdraw":
        assert registry.withdraw(digest, owner, announced) == len(announced)
    else:
        assert registry.discard(digest, announced, every) == len(announced)
    assert registry.lookup(digest, announced[:40]).blocks == 0
    registry.announce(digest, epoch, announced[:40], records)
    assert registry.lookup(digest, announced[:40]).blocks == 40
    registry.release_owner(owner)
    registry.close()


async def test_a_registry_that_the_dead_filled_is_swept(config, peers):
    config = replace(config, registry_bytes=1 << 20, arena_bytes=64 << 20)
    owner = peers.spawn()
    owner.call(jobs.open_market, config)
    with pytest.raises(RegistryFullError):
        owner.call(publish_many, 400, 40)
    owner.kill()
    async with Marketplace("model", SPEC, config=config) as market:
        assert (await market.publish(TOKENS, sample_kv(TOKENS))).blocks == 40
        assert len(list((config.directory / "owners").iterdir())) == 1


async def test_a_full_registry_forgets_an_old_epoch(config, peers):
    config = replace(config, registry_bytes=1 << 20, arena_bytes=64 << 20)
    async with Marketplace("model", SPEC, config=config) as market:
        await publish_until_full(market)
        await market.bump_epoch()
        market.core.registry.sweep()
        assert (await market.publish(TOKENS, sample_kv(TOKENS))).blocks == 40


async def test_processes_with_different_limits_share_a_file(config, peers):
    """A process with a small map follows one that made the file longer, while its threads read."""
    small, large = (
        replace(config, registry_bytes=1 << 20),
        replace(config, registry_bytes=64 << 20, arena_bytes=32 << 20),
    )
    async with Marketplace("model", SPEC, config=small) as market:
        tokens = sample_tokens(0, 40)
        await market.publish(tokens, sample_kv(tokens))
        peer = peers.spawn()
        peer.call(jobs.open_market, large)
        peer.start(publish_many, 150, 40)
        stop = False

        def read():
            keys, count = market._keys(tokens, None), 0
            while not stop:
                assert market.core.registry.lookup(market.namespace.digest, keys).blocks == 40
                count += 1
            return count

        readers = [asyncio.create_task(asyncio.to_thread(read)) for _ in range(3)]
        await asyncio.to_thread(peer.result)
        stop = True
        assert min(await asyncio.gather(*readers)) > 0
        assert (config.directory / FILE_NAME).stat().st_size > 1 << 20
        for seed in (1, 75, 149):
            assert (await market.fetch(sample_tokens(seed, 40))).report.blocks_adopted == 40
        more = sample_tokens(1000, 40)
        assert (await market.publish(more, sample_kv(more))).blocks == 40


def publish_many(state, count, blocks):
    for seed in range(1, count):
        jobs.publish(state, seed, blocks)


def test_the_same_directory_by_two_names_is_one_registry(config, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(config.directory)
    first, second = LmdbRegistry(config.directory), LmdbRegistry(link)
    owner = first.register_owner(bytes(16))
    assert second.alive(owner.owner)
    first.close()
    assert second.alive(owner.owner)
    second.release_owner(owner.owner)
    second.close()
    second.close()


def test_a_registry_that_was_removed_is_a_new_one(config, peers):
    peer = peers.spawn()
    peer.call(jobs.open_market, config)
    peer.call(jobs.publish, 1, 4)
    shutil.rmtree(config.directory)
    assert peers.spawn().call(use, config) == ("fine", "")
    assert peer.call(jobs.fetch, 1, 4)[1], "whatever it found, it is right"


async def test_the_wrong_idea_that_an_owner_is_dead(config, monkeypatch):
    """Without a free descriptor nobody can tell who lives: that must not be taken for death."""
    async with (
        Marketplace("model", SPEC, config=config) as market,
        Marketplace("other", SPEC, config=config) as sweeper,
    ):
        await market.publish(TOKENS, sample_kv(TOKENS))
        registry, locks = sweeper.core.registry, sweeper.core.registry._file.locks
        monkeypatch.setattr(locks, "_held", {})  # as in another process

        def no_descriptors(*args, **kwargs):
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr("kvmarket.registry.host.os.open", no_descriptors)
            with pytest.raises(RegistryUnavailableError, match="Too many open files"):
                registry.sweep()
            report = (await market.fetch(TOKENS)).report
            assert (report.blocks_adopted, report.reason) == (0, MissReason.REGISTRY_UNAVAILABLE)
        monkeypatch.undo()
        assert registry.sweep() == 0
        assert (await market.fetch(TOKENS)).report.blocks_adopted == 40
