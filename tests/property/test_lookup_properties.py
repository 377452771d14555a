"""The registry file and the server against the reference: prefixes that fork and end, several owners of a block."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmarket.registry import block_keys, lmdb_cursors
from kvmarket.registry.lmdb import LmdbRegistry
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


announcements = st.lists(
    st.tuples(st.integers(0, 2), st.tuples(positions, st.integers(0, 2)), positions, positions, st.booleans()),
    min_size=1,
    max_size=8,
)
questions = st.tuples(st.integers(0, 7), positions, positions)


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
    """What a registry finds after some owners announced, and withdrew, parts of some prefixes."""
    epoch = registry.open_namespace(digest, {})
    owners = [registry.register_owner(bytes([i]) * 16).owner for i in range(3)]
    for number, (who, shape, start, end, back) in enumerate(announced):
        keys = block_keys(chain(*shape))[start:end]
        if back and number:
            registry.withdraw(digest, owners[who], keys)
            continue
        pages = np.arange(len(keys)) + 1000 * number
        records = make_records(owners[who], 0, pages, np.full(len(keys), 2, np.uint64))
        assert registry.announce(digest, epoch, keys, records)
    which, first, last = asked
    shape = announced[which % len(announced)][1]
    found = registry.lookup(digest, block_keys(chain(*shape))[first:last])
    rows = sorted((int(r["block"]), owners.index(int(r["owner"])), int(r["page"])) for r in found.records)
    for owner in owners:
        registry.release_owner(owner)
    return found.blocks, rows, found.first_missing


@settings(max_examples=60, deadline=None)
@given(announced=announcements, asked=questions)
def test_the_file_finds_what_the_reference_finds(directory, announced, asked):
    registry = LmdbRegistry(directory / str(len(list(directory.iterdir()))), map_bytes=16 << 20)
    found = answer(registry, DIGEST, announced, asked)
    registry.close()
    assert found == answer(MemoryRegistry(), DIGEST, announced, asked)


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


def test_a_second_owner_of_the_last_block_of_a_run_is_found(tmp_path):
    registry = LmdbRegistry(tmp_path / "registry")
    epoch = registry.open_namespace(DIGEST, {})
    first, second = (registry.register_owner(bytes([i]) * 16).owner for i in range(2))
    keys = block_keys(chain(LENGTH, 0))
    records = make_records(first, 0, np.arange(LENGTH), np.full(LENGTH, 2, np.uint64))
    registry.announce(DIGEST, epoch, keys, records)
    for last in (RUN_BLOCKS, RUN_BLOCKS + 5, LENGTH):
        also = make_records(second, 0, np.array([7]), np.array([2], np.uint64))
        registry.announce(DIGEST, epoch, keys[last - 1 : last], also)
        found = registry.lookup(DIGEST, keys[:last])
        assert found.blocks == last
        assert sorted(found.records["owner"][found.records["block"] == last - 1].tolist()) == [first, second]
    for owner in (first, second):
        registry.release_owner(owner)
    registry.close()


def test_whole_runs_of_one_record_each_are_walked_and_the_rest_is_looked_up(tmp_path, monkeypatch):
    """The look-up of a long prompt that one owner has, or two have, asks for no block by itself."""
    asked = []
    careful = lmdb_cursors._collect_one_by_one
    monkeypatch.setattr(
        lmdb_cursors,
        "_collect_one_by_one",
        lambda cursor, wanted, start, *into: (
            asked.append((start, len(wanted))) or careful(cursor, wanted, start, *into)
        ),
    )
    registry = LmdbRegistry(tmp_path / "registry")
    epoch = registry.open_namespace(DIGEST, {})
    first, second = (registry.register_owner(bytes([i]) * 16).owner for i in range(2))
    keys = block_keys(chain(LENGTH, 0))
    registry.announce(DIGEST, epoch, keys, make_records(first, 0, np.arange(LENGTH), np.full(LENGTH, 2, np.uint64)))
    found = registry.lookup(DIGEST, keys[5:])
    assert (found.blocks, found.records["page"].tolist(), asked) == (LENGTH - 5, [*range(5, LENGTH)], [])
    also = make_records(second, 0, np.array([7]), np.array([2], np.uint64))
    registry.announce(DIGEST, epoch, keys[RUN_BLOCKS + 3 : RUN_BLOCKS + 4], also)
    found = registry.lookup(DIGEST, keys)
    rest = [(RUN_BLOCKS + 3, RUN_BLOCKS - 3)]
    assert (found.blocks, len(found.records), asked) == (LENGTH, LENGTH + 1, rest)
    assert found.records["block"].tolist() == sorted([*range(LENGTH), RUN_BLOCKS + 3])
    asked.clear()
    registry.announce(DIGEST, epoch, keys, make_records(second, 0, np.arange(LENGTH), np.full(LENGTH, 2, np.uint64)))
    found = registry.lookup(DIGEST, keys)
    assert (found.blocks, len(found.records), asked) == (LENGTH, 2 * LENGTH, [])
    assert found.records["owner"].tolist() == [first, second] * LENGTH
    for owner in (first, second):
        registry.release_owner(owner)
    registry.close()
