"""The log of blocks on disk: what is read is what was written, however the files look."""

import os
import random
import shutil

import numpy as np
import pytest
import xxhash

from kvmarket.disk_log import RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, DiskLog, StoredBlock
from kvmarket.errors import InvalidInputError

PAGE = 1024
RECORD = RECORD_HEADER_BYTES + PAGE
IDENTITY = bytes(range(16))
ROOM = 256 << 10


def page_of(number):
    return np.random.default_rng(number).integers(0, 256, PAGE, np.uint8)


def key_of(number):
    return b"key-%06d" % number


def stored(number, **more):
    parent = key_of(number - 1) if number % 8 else None
    return StoredBlock(key_of(number), parent, xxhash.xxh3_128_digest(page_of(number).data), **more)


def write(log, numbers):
    for number in numbers:
        log.append(stored(number), page_of(number))


def right(log, numbers):
    """Return which blocks are read, all of them right."""
    found = []
    for number in numbers:
        page = np.zeros(PAGE, np.uint8)
        if log.read(key_of(number), [page[:100], page[100:]]):
            assert (page == page_of(number)).all()
            found.append(number)
    return found


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def logs(directory):
    made = []

    def make(bytes_max=ROOM, identity=IDENTITY):
        for log in made:
            log.close()
        made.append(DiskLog(directory, bytes_max, PAGE, identity))
        return made[-1]

    yield make
    for log in made:
        log.close()


def size(directory):
    return sum(path.stat().st_size for path in directory.iterdir())


def test_what_was_written_is_read_and_is_there_after_opening_again(logs, directory):
    log = logs()
    write(log, range(20))
    assert right(log, range(25)) == list(range(20))
    assert log.run([key_of(number) for number in range(25)], 0) == 20
    log = logs()
    assert right(log, range(25)) == list(range(20))
    assert log.newest(3) == [stored(17), stored(18), stored(19)]
    assert log.damaged == 0
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_the_size_is_bounded_and_the_oldest_go(logs, directory):
    log = logs()
    for number in range(600):
        write(log, [number])
        assert size(directory) <= ROOM
        assert log.nbytes == size(directory)
    found = right(log, range(600))
    assert found == list(range(600 - len(found), 600))
    assert len(found) > ROOM // RECORD // 2
    assert right(logs(), range(600)) == found


def test_what_is_read_again_and_again_stays(logs):
    log = logs()
    write(log, range(3))
    for number in range(3, 900):
        write(log, [number])
        assert right(log, [1]) == [1], number
    assert right(log, [0, 2]) == []


def test_withdrawn_blocks_stay_away(logs):
    log = logs()
    write(log, range(10))
    assert log.forget([key_of(3), key_of(4), b"unknown"]) == 2
    assert right(log, range(10)) == [0, 1, 2, 5, 6, 7, 8, 9]
    log = logs()
    assert right(log, range(10)) == [0, 1, 2, 5, 6, 7, 8, 9]
    write(log, [3])
    assert right(logs(), range(10)) == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_another_identity_sees_nothing_and_cleans_up(logs, directory):
    write(logs(), range(10))
    assert len(logs(identity=bytes(16))) == 0
    assert size(directory) == 0
    log = logs()
    write(log, range(10))
    log.clear(bytes(16))
    assert len(log) == 0
    assert size(directory) == 0
    write(log, [1])
    assert right(log, range(10)) == [1]
    assert len(logs()) == 0


def test_what_has_expired_ends_the_run(logs):
    log = logs()
    write(log, [0])
    log.append(stored(1, expires=1000), page_of(1))
    keys = [key_of(0), key_of(1)]
    assert [log.run(keys, now) for now in (0, 999.9, 1000)] == [2, 2, 1]
    assert logs().run(keys, 1000) == 1


def test_any_prefix_of_a_file_is_a_prefix_of_the_blocks(logs, directory, tmp_path):
    """Wherever a crash stops the writing, what is whole is served and what is not is not."""
    write(logs(), range(2))
    logs().close()
    (file,) = directory.iterdir()
    data = file.read_bytes()
    kept = tmp_path / "kept"
    shutil.copytree(directory, kept)
    cuts = [0, 1, SEGMENT_HEADER_BYTES - 1, SEGMENT_HEADER_BYTES, SEGMENT_HEADER_BYTES + 100]
    cuts += [SEGMENT_HEADER_BYTES + RECORD + cut for cut in (-1, 0, 1, RECORD_HEADER_BYTES, RECORD - 1, RECORD)]
    for cut in cuts:
        directory.mkdir(exist_ok=True)
        (directory / file.name).write_bytes(data[:cut])
        log = logs()
        assert right(log, range(2)) == list(range(max(0, cut - SEGMENT_HEADER_BYTES) // RECORD))
        write(log, [2])
        assert right(logs(), [2]) == [2]
        log = logs()
        log.clear(bytes(16))


def test_no_damage_is_ever_served(logs, directory):
    rng = random.Random(1)
    write(logs(), range(24))
    logs().close()
    whole = {path: path.read_bytes() for path in directory.iterdir()}
    lost = 0
    for _ in range(150):
        for path, data in whole.items():
            path.write_bytes(data)
        path = rng.choice(list(whole))
        with path.open("r+b") as file:
            at = rng.randrange(len(whole[path]))
            if rng.random() < 0.5:
                file.seek(at)
                file.write(bytes([whole[path][at] ^ (1 << rng.randrange(8))]))
            else:  # a run of zeros, as of a block that never reached the disk
                file.seek(at // 512 * 512)
                file.write(bytes(min(512, len(whole[path]) - at // 512 * 512)))
        log = logs()
        found = right(log, range(24))  # which asserts that all of them are right
        lost += 24 - len(found)
        log.close()
        for left in directory.iterdir():
            left.unlink()
    assert lost > 100


def test_pages_swapped_between_records_are_refused(logs, directory):
    log = logs()
    write(log, range(2))
    (path,) = directory.iterdir()
    data = bytearray(path.read_bytes())
    first, second = (SEGMENT_HEADER_BYTES + row * RECORD for row in range(2))
    data[first : first + RECORD], data[second : second + RECORD] = (
        data[second : second + RECORD],
        data[first : first + RECORD],
    )
    path.write_bytes(data)
    assert right(log, range(2)) == []
    assert log.damaged == 2
    assert right(logs(), range(2)) == [0, 1], "each says itself which block it is"


def test_a_disk_that_fails_leaves_the_log_as_it_was(logs, monkeypatch):
    log = logs()
    write(log, range(4))

    def full(fd, pieces, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space"):
        write(log, [4])
    monkeypatch.setattr(os, "pwritev", lambda fd, pieces, offset: 100)
    with pytest.raises(OSError, match="a part"):
        write(log, [4])
    monkeypatch.undo()
    write(log, [5])
    assert right(log, range(6)) == [0, 1, 2, 3, 5]
    assert right(logs(), range(6)) == [0, 1, 2, 3, 5]


def test_limits_are_named(logs):
    with pytest.raises(InvalidInputError, match="KVMARKET_DISK_BYTES"):
        logs(bytes_max=2 * PAGE)
    with pytest.raises(InvalidInputError, match="81 bytes is longer than 80"):
        logs().append(StoredBlock(bytes(81), None, bytes(16)), page_of(0))
