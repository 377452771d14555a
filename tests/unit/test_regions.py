"""Shared memory, generations, lent regions."""

import mmap
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from kvmarket.errors import InvalidInputError, PeerGoneError, RegistrationError, TransportUnavailableError
from kvmarket.region.generations import GenerationTable, PeerGenerations, readable
from kvmarket.region.memory import MemoryAddress, SharedMemory, map_peer_memory, private_huge_pages
from kvmarket.region.pages import PagedMemory, PageLayout
from kvmarket.region.region import LentRegion

INCARNATION = bytes(range(16))


@pytest.fixture
def memory():
    memory = SharedMemory(10_000, "test")
    yield memory
    memory.close()


@pytest.fixture
def table():
    table = GenerationTable(8, INCARNATION)
    yield table
    table.close()


def test_shared_memory_is_seen_by_whoever_maps_it(memory):
    mapped = map_peer_memory(memory.address)
    assert len(mapped) == 10_000
    memory.array[::7] = 9
    assert (mapped == memory.array).all()
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1


def test_shared_memory_cannot_be_cut_under_a_reader(memory):
    for nbytes in (0, 20_000):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.address.fd, nbytes)


def test_closed_memory_cannot_be_mapped_and_stays_for_those_who_have_it():
    memory = SharedMemory(4096)
    address, mapped = memory.address, map_peer_memory(memory.address)
    memory.array[:] = 5
    memory.close()
    memory.close()
    with pytest.raises(PeerGoneError):
        map_peer_memory(address)
    assert (mapped == 5).all()
    assert (memory.array == 5).all()


def test_only_the_memory_described_is_mapped(memory, tmp_path):
    pid, fd, inode, nbytes = memory.address.as_list()
    other = SharedMemory(10_000, "other")
    plain = (tmp_path / "file").open("wb+")
    plain.write(bytes(10_000))
    plain.flush()
    pair = socket.socketpair()
    foreign = os.memfd_create("somebody else's")
    os.ftruncate(foreign, 10_000)
    wrong = [
        MemoryAddress(2**22 + 5, fd, inode, nbytes),
        MemoryAddress(pid, 10_000, inode, nbytes),
        MemoryAddress(pid, fd, inode + 1, nbytes),
        MemoryAddress(pid, fd, inode, nbytes - 1),
        MemoryAddress(pid, other.address.fd, inode, nbytes),
        MemoryAddress(pid, plain.fileno(), os.fstat(plain.fileno()).st_ino, nbytes),
        MemoryAddress(pid, pair[0].fileno(), inode, nbytes),
        MemoryAddress(pid, foreign, os.fstat(foreign).st_ino, nbytes),
    ]
    try:
        for address in wrong:
            with pytest.raises(PeerGoneError):
                map_peer_memory(address)
    finally:
        other.close()
        plain.close()
        os.close(foreign)
        for end in pair:
            end.close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs a process of another user")
def test_memory_of_another_user_says_what_is_missing(memory, peers):
    address = peers.spawn().call(_make_memory)
    reader = peers.spawn()
    reader.call(_become_nobody)
    with pytest.raises(TransportUnavailableError, match="one user, with ptrace read access"):
        reader.call(_map, address)


def _make_memory(state):
    state.memory = SharedMemory(4096)
    return state.memory.address


def _become_nobody(state):
    os.setuid(65534)


def _map(state, address):
    map_peer_memory(address)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_memory_needs_bytes(nbytes):
    with pytest.raises(InvalidInputError, match="at least one byte"):
        SharedMemory(nbytes)


def open_descriptors():
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_memory_that_the_host_does_not_have_is_an_error_of_ours():
    before = open_descriptors()
    with pytest.raises(RegistrationError, match="shared memory"):
        SharedMemory(1 << 62)
    assert open_descriptors() == before


def test_offsets_in_memory(memory):
    start = memory.array.ctypes.data
    assert memory.contains(start + 100, 50) == 100
    assert memory.contains(start + 9_950, 50) == 9_950
    assert memory.contains(start + 9_951, 50) is None
    assert memory.contains(start - 1, 50) is None


def test_populating_keeps_the_bytes(memory):
    memory.array[:] = 3
    memory.populate()
    assert (memory.array == 3).all()


@pytest.mark.parametrize("nbytes", [1, mmap.PAGESIZE, (2 << 20) + 1])
def test_private_pages_are_aligned_to_huge_ones(nbytes):
    pages = private_huge_pages(nbytes)
    assert len(pages) == nbytes
    assert pages.ctypes.data % (2 << 20) == 0
    pages[:] = 1


def test_generations_go_up_and_are_odd_while_unreadable(table):
    pages = np.array([1, 3])
    assert table.values.tolist() == [0] * 8
    first = table.validate(pages)
    assert first.tolist() == [2, 2]
    table.invalidate(pages)
    table.invalidate(pages)
    assert table.values[pages].tolist() == [3, 3]
    assert table.validate(pages).tolist() == [4, 4]
    assert table.validate(np.array([1])).tolist() == [6], "published again without having been taken back"
    table.invalidate(np.array([0]))
    assert table.validate(np.array([0])).tolist() == [2]
    table.invalidate(np.empty(0, np.int64))


@pytest.mark.parametrize(
    ("page", "generation", "expected"),
    [(0, 4, True), (0, 2, False), (0, 6, False), (1, 5, False), (2, 0, False), (3, 4, False), (-1, 4, False)],
)
def test_what_is_readable(page, generation, expected):
    values = np.array([4, 5, 0], np.uint64)
    assert readable(values, np.array([page]), np.array([generation], np.uint64)).tolist() == [expected]


def test_a_reader_sees_the_owners_table(table):
    peer = PeerGenerations(table.memory.address, INCARNATION, 8, table.probe)
    table.validate(np.array([5]))
    assert peer.values.tolist() == table.values.tolist()
    assert peer.values[5] == 2


@pytest.mark.parametrize(
    "changes", [{"incarnation": bytes(16)}, {"num_pages": 7}, {"num_pages": 9}, {"probe": bytes(64)}]
)
def test_a_reader_refuses_another_table(table, changes):
    asked = {"address": table.memory.address, "incarnation": INCARNATION, "num_pages": 8, "probe": table.probe}
    with pytest.raises(PeerGoneError):
        PeerGenerations(**{**asked, **changes})


def test_closing_makes_every_page_unreadable():
    table = GenerationTable(4, INCARNATION)
    peer = PeerGenerations(table.memory.address, INCARNATION, 4, table.probe)
    generations = table.validate(np.arange(4))
    assert readable(peer.values, np.arange(4), generations).all()
    table.close()
    assert not readable(peer.values, np.arange(4), generations).any()


def test_regions_check_what_is_lent_and_asked():
    pages = PagedMemory(PageLayout.packed(4, 64), (np.zeros(255, np.uint8),))
    with pytest.raises(InvalidInputError, match="outside"):
        LentRegion(0, INCARNATION, pages, (), bytes(16))
    region = LentRegion(0, INCARNATION, PagedMemory.packed(np.zeros((4, 64), np.uint8)), (), bytes(16))
    try:
        for bad in ([4], [-1], np.array([0, 9])):
            with pytest.raises(InvalidInputError, match="outside"):
                region.invalidate(bad)
        assert region.page_numbers([]).tolist() == []
        assert region.generations.values.tolist() == [0] * 4
    finally:
        region.close()
