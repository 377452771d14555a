"""Whether other owners live, asked through lock files that are kept open."""

import multiprocessing
import os
from pathlib import Path

import pytest

from kvmarket.registry import host
from kvmarket.registry.host import OwnerLocks


def hold(directory, owners, ready, end):
    locks = OwnerLocks(directory)
    for owner in owners:
        locks.acquire(owner)
    ready.set()
    end.wait(30)
    os._exit(0)  # as a process that is killed


class Holder:
    """Another process that holds the locks of owners."""

    def __init__(self, directory, owners):
        context = multiprocessing.get_context("fork")
        self._end, ready = context.Event(), context.Event()
        self._process = context.Process(target=hold, args=(directory, owners, ready, self._end))
        self._process.start()
        assert ready.wait(30)

    def die(self):
        self._end.set()
        self._process.join(30)


@pytest.fixture
def lock_files(tmp_path):
    """Return what tells how many lock files of this directory are open here."""

    def count():
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(link.readlink().parent == tmp_path for link in links if link.exists())

    return count


@pytest.fixture
def locks(tmp_path):
    locks = OwnerLocks(tmp_path)
    yield locks
    locks.close()


def test_an_owner_that_dies_is_dead_at_once_and_its_file_is_closed(locks, lock_files, tmp_path):
    holder = Holder(tmp_path, [1, 2])
    assert [locks.alive(owner) for owner in (1, 2, 1, 3)] == [True, True, True, False]
    assert lock_files() == 2, "kept open"
    holder.die()
    assert [locks.alive(owner) for owner in (1, 2, 1)] == [False] * 3
    assert lock_files() == 0


def test_a_number_whose_file_was_made_anew_is_alive(locks, tmp_path):
    first = Holder(tmp_path, [1])
    assert locks.alive(1)
    first.die()
    locks.forget(1)
    second = Holder(tmp_path, [1])
    assert locks.alive(1), "the file that was open is another one by now"
    second.die()
    assert not locks.alive(1)


def test_only_so_many_files_are_kept_open(locks, lock_files, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "PROBES_MAX", 3)
    holder = Holder(tmp_path, range(8))
    for _ in range(2):
        assert all(locks.alive(owner) for owner in range(8))
        assert lock_files() == 3
    locks.close()
    assert lock_files() == 0
    holder.die()
