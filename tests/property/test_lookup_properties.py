"""The registry file and the server against the reference: prefixes that fork and end, several owners of a block."""

import os

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmarket.registry import block_keys, lmdb_cursors
from kvmarket.registry.lmdb import LmdbRegistry
from kvmarket.registry.lmdb_lookup import Answers
from kvmarket.registry.memory import MemoryRegistry
from kvmarket.registry.records import RUN_BLOCKS, make_records
from kvmarket.registry.redis import RedisRegistry
from kvmarket.testing.redis_server import WHERE_FROM, RedisServer, find_server

DIGEST = bytes(32)
LENGTH = 3 * RUN_BLOCKS
EDGES = (0, 1, RUN_BLOCKS - 1, RUN_BLOCKS, RUN_BLOCKS + 1, 2 * RUN_BLOCKS - 1, 2 * RUN_BLOCKS, LENGTH - 1, LENGTH)
positions = st.one_of(st.sampled_from(EDGES), st.integers(0, LENGTH))


def chain(fork, tail):
    """Hashes of `LENGTH` blocks: those before `fork` are the same for every tail."""
    return [(f"{i}" if i < fork else f"{i} {fork} {tail}").encode().ljust(32, b".") for i in range(LENGTH)]


doings = st.sampled_from(["announce", "announce", "withdraw", "discard"])
announcements = st.lists(
    st.tuples(st.integers(0, 2), st.tuples(positions, st.integers(0, 2)), positions, positions, doings),
    min_size=1,
    max_size=8,
)
questions = st.tuples(st.integers(0, 7), positions, positions)
# Of two runs and little else, so that whole ones meet each other, a part of one, and a fork.
whole_announcements = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.tuples(st.sampled_from((LENGTH, LENGTH, RUN_BLOCKS + 3)), st.integers(0, 1)),
        st.sampled_from((0, 0, RUN_BLOCKS, RUN_BLOCKS + 1)),
        st.sampled_from((RUN_BLOCKS, 2 * RUN_BLOCKS, 2 * RUN_BLOCKS, RUN_BLOCKS + 5)),
        doings,
    ),
    min_size=2,
    max_size=6,
)
whole_questions = st.tuples(st.integers(0, 7), st.sampled_from((0, RUN_BLOCKS)), st.just(2 * RUN_BLOCKS))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("registries")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("redis", reason="the extra 'redis' is not installed")
    if find_server() is None:
        pytest.skip(WHERE_FROM)
    with RedisServer(tmp_path_factory.mktemp("server")) as server:
        yield server


def answer(registry, digest, announced, asked):
    """What a registry finds after some owners announced, and withdrew, parts of some prefixes; and on the way there."""
    epoch = registry.open_namespace(digest, {})
    owners = [registry.register_owner(bytes([i]) * 16).owner for i in range(3)]
    which, first, last = asked
    asked_keys = block_keys(chain(*announced[which % len(announced)][1]))[first:last]
    answers = []
    for number, (who, shape, start, end, doing) in enumerate(announced):
        keys = block_keys(chain(*shape))[start:end]
        if doing == "withdraw":
            registry.withdraw(digest, owners[who], keys)
        elif doing == "discard":
            stale = registry.lookup(digest, keys).records
            registry.discard(digest, keys, stale[stale["owner"] == owners[who]][::2])
        else:
            pages = np.arange(len(keys)) + 1000 * number
            records = make_records(owners[who], 0, pages, np.full(len(keys), 2, np.uint64))
            assert registry.announce(digest, epoch, keys, records)
        found = registry.lookup(digest, asked_keys)
        rows = [(int(r["block"]), owners.index(int(r["owner"])), int(r["page"])) for r in found.records]
        answers.append((found.blocks, sorted(rows), found.first_missing))
    for owner in owners:
        registry.release_owner(owner)
    return answers


def entries(registry):
    """How many entries the tables about blocks have."""
    file = registry._file
    with file.read() as txn:
        return {name: txn.stat(file.tables[name])["entries"] for name in ("blocks", "runs", "stretches")}


def as_the_reference(directory, announced, asked):
    registry = LmdbRegistry(directory / str(len(list(directory.iterdir()))), map_bytes=16 << 20)
    found = answer(registry, DIGEST, announced, asked)
    left = entries(registry)
    registry.close()
    assert found == answer(MemoryRegistry(), DIGEST, announced, asked)
    assert left == {"blocks": 0, "runs": 0, "stretches": 0}


@settings(max_examples=60, deadline=None)
@given(announced=announcements, asked=questions)
def test_the_file_finds_what_the_reference_finds(directory, announced, asked):
    as_the_reference(directory, announced, asked)


@settings(max_examples=100, deadline=None)
@given(announced=whole_announcements, asked=whole_questions)
def test_the_file_finds_what_the_reference_finds_of_whole_runs(directory, announced, asked):
    as_the_reference(directory, announced, asked)


@settings(max_examples=60, deadline=None)
@given(announced=announcements, asked=questions)
@pytest.mark.parametrize("plain", [True, False])
def test_the_server_finds_what_the_reference_finds(server, announced, asked, plain):
    registry, digest = RedisRegistry(f"{server.url}?timeout_s=5&lease_s=60"), os.urandom(32)
    if not plain:
        registry._runs._read = lambda *_: None  # what a crowded run leads to
    found = answer(registry, digest, announced, asked)
    left = registry._writes.call(b"KEYS", b"kvm:2:{%b}:[ri]*" % digest.hex().encode())
    registry.close()
    assert left == []
    assert found == answer(MemoryRegistry(), DIGEST, announced, asked)


@pytest.fixture
def registry(tmp_path):
    registry = LmdbRegistry(tmp_path / "registry")
    yield registry
    registry.close()


class World:
    """One namespace, three owners, and which runs a look-up read record by record."""

    def __init__(self, registry, monkeypatch):
        self.registry, self.epoch = registry, registry.open_namespace(DIGEST, {})
        self.owners = [registry.register_owner(bytes([i]) * 16).owner for i in range(3)]
        self.walked, self.careful = [], []
        read_run, one_by_one = lmdb_cursors._read_run, lmdb_cursors._collect_one_by_one

        def walk(*args, start, **into):
            self.walked.append(start)
            return read_run(*args, start=start, **into)

        def collect(cursor, wanted, start, *into):
            self.careful.append((start, len(wanted)))
            return one_by_one(cursor, wanted, start, *into)

        monkeypatch.setattr(lmdb_cursors, "_read_run", walk)
        monkeypatch.setattr(lmdb_cursors, "_collect_one_by_one", collect)

    def announce(self, who, keys, page=0):
        records = make_records(self.owners[who], 0, page + np.arange(len(keys)), np.full(len(keys), 2, np.uint64))
        assert self.registry.announce(DIGEST, self.epoch, keys, records)

    def lookup(self, keys):
        self.walked.clear()
        self.careful.clear()
        return self.registry.lookup(DIGEST, keys)


@pytest.fixture
def world(registry, monkeypatch):
    world = World(registry, monkeypatch)
    yield world
    for owner in world.owners:
        registry.release_owner(owner)


KEYS = block_keys(chain(LENGTH, 0))


def test_a_second_owner_of_the_last_block_of_a_run_is_found(world):
    first, second, _ = world.owners
    world.announce(0, KEYS)
    for last in (RUN_BLOCKS, RUN_BLOCKS + 5, LENGTH):
        world.announce(1, KEYS[last - 1 : last], page=7)
        found = world.lookup(KEYS[:last])
        assert found.blocks == last
        assert sorted(found.records["owner"][found.records["block"] == last - 1].tolist()) == [first, second]


def test_whole_runs_are_read_at_once_and_others_are_walked(world):
    world.announce(0, KEYS[:-1], page=7)
    found = world.lookup(KEYS)
    assert (found.blocks, found.records["page"].tolist()) == (LENGTH - 1, [*range(7, 7 + LENGTH - 1)])
    assert world.walked == [2 * RUN_BLOCKS]
    assert world.lookup(KEYS[5:]).records["page"].tolist() == [*range(12, 7 + LENGTH - 1)]
    assert world.walked == [0, 2 * RUN_BLOCKS - 5]
    assert world.lookup(KEYS[: RUN_BLOCKS + 9]).blocks == RUN_BLOCKS + 9
    assert (world.walked, world.careful) == ([RUN_BLOCKS], [])
    world.announce(1, KEYS)
    assert world.lookup(KEYS[5:RUN_BLOCKS]).records["owner"].tolist() == world.owners[:2] * (RUN_BLOCKS - 5)
    assert (world.walked, world.careful) == ([0], [])
    found = world.lookup(KEYS)
    assert world.walked == [2 * RUN_BLOCKS]
    assert found.records["owner"].tolist() == [*world.owners[:2] * (LENGTH - 1), world.owners[1]]
    assert found.records["block"].tolist() == [*np.repeat(np.arange(LENGTH - 1), 2).tolist(), LENGTH - 1]


def test_a_run_that_somebody_has_a_part_of_is_walked(world):
    world.announce(0, KEYS)
    world.announce(1, KEYS[RUN_BLOCKS + 3 : RUN_BLOCKS + 4], page=900)
    found = world.lookup(KEYS)
    assert (found.blocks, len(found.records)) == (LENGTH, LENGTH + 1)
    assert world.walked == [RUN_BLOCKS]
    assert world.careful == [(RUN_BLOCKS + 3, RUN_BLOCKS - 3)]


def test_a_fork_of_a_run_is_walked(world):
    fork = block_keys(chain(RUN_BLOCKS + 3, 1))
    world.announce(0, KEYS)
    world.announce(1, fork, page=500)
    found = world.lookup(KEYS)
    assert (found.blocks, world.walked) == (LENGTH, [RUN_BLOCKS])
    assert len(found.records) == LENGTH + RUN_BLOCKS + 3


def test_an_owner_with_two_forks_of_a_run_keeps_what_they_share_where_it_said_last(world):
    fork = block_keys(chain(RUN_BLOCKS + 3, 1))
    world.announce(0, KEYS)
    world.announce(0, fork, page=500)
    pages = [*range(500, 500 + RUN_BLOCKS + 3), *range(RUN_BLOCKS + 3, LENGTH)]
    assert world.lookup(KEYS).records["page"].tolist() == pages


def test_both_forks_in_one_announcement(world):
    fork = block_keys(chain(RUN_BLOCKS + 3, 1))
    world.announce(0, [*KEYS, *fork])
    pages = [*range(LENGTH, LENGTH + RUN_BLOCKS + 3), *range(RUN_BLOCKS + 3, LENGTH)]
    assert world.lookup(KEYS).records["page"].tolist() == pages


def test_a_block_that_is_announced_twice_at_once_is_where_it_was_said_last(world):
    world.announce(0, [*KEYS, KEYS[3]])
    assert world.lookup(KEYS).records["page"].tolist() == [0, 1, 2, LENGTH, *range(4, LENGTH)]


def test_keys_in_the_middle_of_a_run_count_as_well(world):
    """No chain of hashes has such keys; the registry does not rely on that."""
    world.announce(0, KEYS)
    asked = [*KEYS[:7], KEYS[7][:-1] + b"!", *KEYS[8:]]
    assert world.lookup(asked).blocks == 7


def test_runs_in_a_row_of_different_prefixes_are_each_read_at_once(world):
    other = block_keys(chain(0, 1))
    world.announce(0, [*KEYS, *other])
    for number, keys in enumerate((KEYS, other)):
        assert world.lookup(keys).records["page"].tolist() == [*range(number * LENGTH, (number + 1) * LENGTH)]
        assert world.walked == []


def test_announced_anew_a_run_is_read_at_once_and_withdrawn_in_part_no_more(world):
    world.announce(0, KEYS)
    world.announce(0, KEYS, page=500)
    assert world.lookup(KEYS).records["page"].tolist() == [*range(500, 500 + LENGTH)]
    assert world.walked == []
    world.registry.withdraw(DIGEST, world.owners[0], KEYS[40:41])
    assert world.lookup(KEYS).blocks == 40
    assert world.walked == [RUN_BLOCKS]
    world.registry.withdraw(DIGEST, world.owners[0], KEYS)
    assert entries(world.registry) == {"blocks": 0, "runs": 0, "stretches": 0}
    world.announce(0, KEYS)
    assert (world.lookup(KEYS).blocks, world.walked) == (LENGTH, [])


def test_what_one_owner_withdraws_others_still_have_whole(world):
    for who in range(2):
        world.announce(who, KEYS, page=500 * who)
    world.registry.withdraw(DIGEST, world.owners[0], KEYS)
    assert world.lookup(KEYS).records["page"].tolist() == [*range(500, 500 + LENGTH)]
    assert world.walked == []


def rewritten(value, number, field):
    fields = msgpack.unpackb(value)
    fields[number:] = [field, *fields[number + 1 :]]
    return msgpack.packb(fields)


STRANGE = {
    "more fields": lambda value: rewritten(value, 4, "more"),
    "another major version": lambda value: rewritten(value, 0, 2),
    "no region": lambda value: rewritten(value, 1, 1 << 63),
    "fewer blocks": lambda value: rewritten(value, 3, msgpack.unpackb(value)[3][:-28]),
    "no list": lambda value: msgpack.packb(7),
    "too short": lambda value: value[:-1],
    "too long": lambda value: value + b"more",
    "not msgpack": lambda value: b"\xc1" + value[1:],
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_stretch_that_this_version_cannot_use_is_read_record_by_record(world, name):
    world.announce(0, KEYS)
    file = world.registry._file
    with file.write() as txn:
        cursor = txn.cursor(file.tables["stretches"])
        assert cursor.first()
        assert cursor.put(cursor.key(), STRANGE[name](cursor.value()))
    found = world.lookup(KEYS)
    assert (found.blocks, found.records["page"].tolist()) == (LENGTH, [*range(LENGTH)])
    assert len(world.walked) == (name != "more fields")


def test_records_are_the_same_either_way(world, monkeypatch):
    for who in range(2):
        random = np.random.default_rng(who)
        records = make_records(
            world.owners[who],
            5 + who,
            random.permutation(1 << 20)[: len(KEYS)],
            random.integers(1, 1 << 63, len(KEYS), np.uint64) << np.uint64(1),
            [random.bytes(16) for _ in KEYS],
        )
        records["page"][0] = (1 << 32) - 1
        assert world.registry.announce(DIGEST, world.epoch, KEYS, records)
    at_once = world.lookup(KEYS)
    assert world.walked == []
    monkeypatch.setattr(lmdb_cursors, "read_stretches", lambda *_: [])
    world.registry._answers = Answers()
    walked = world.lookup(KEYS)
    assert world.walked
    assert at_once.records.tobytes() == walked.records.tobytes()


def test_a_new_epoch_leaves_nothing_of_the_old_one(world):
    world.announce(0, KEYS)
    world.registry.bump_epoch(DIGEST)
    world.registry._sweep_keys = 5
    world.registry.sweep()
    left = entries(world.registry)
    assert (left["blocks"], left["stretches"]) == (0, 0)
