"""Owners' leases in a simulated bad world: delay, loss, repetition, reordering, crashes, a server that forgets.

The code under test is the one that runs against a server; clock, server and network are models. A failure names its
seed; `run(seed)` repeats it, and `python tests/property/test_lease_simulation.py 10000` runs more of them.
"""

import contextlib
import random
import sys
from dataclasses import dataclass

import pytest
from lease_model import BadLink, ModelServer

from kvmarket.errors import RegistryError
from kvmarket.registry.records import decode_records, encode_records, make_records
from kvmarket.registry.redis_owners import Owners
from kvmarket.registry.redis_scripts import BUMP, namespace_key, owners_key
from kvmarket.server_url import ServerUrl
from kvmarket.testing.sample_records import chain

SEEDS, SEEDS_PER_TEST = 1000, 250
STEPS = 40
SETTLE_BEATS = 10
OPTIONS = ServerUrl("", lease_s=6.0, ttl_s=600.0, entries_max=60)
NAMESPACES = [bytes([number]) * 32 for number in (1, 2)]
KEYS = chain(1, 6)


@dataclass
class Process:
    """One owner's process: its leases, and what it holds, by namespace: key -> page."""

    owners: Owners
    link: BadLink
    handle: int
    holds: dict
    seen: dict
    crashed_at: float | None = None


class World:
    """Processes around one server. Pages are numbered by process, namespace and time: each says where it is from."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.numbers_max = self.rng.choice([20, 2**32])  # few: the same random numbers come up again
        self.server = ModelServer()
        self.processes, self.page, self.said = [], 0, {}
        for digest in NAMESPACES:
            self.server.script(BUMP, [namespace_key(digest, b"e")], [])
        self.epochs = {digest: self.epoch(digest) for digest in NAMESPACES}

    def epoch(self, digest):
        return self.server.values.get(namespace_key(digest, b"e"), 0)

    # ---- what happens

    def start(self):
        link = BadLink(self.server, self.rng)
        owners = Owners(link, OPTIONS, lambda: self.server.now, lambda: self.rng.randrange(self.numbers_max))
        handle = owners.register(self.rng.randbytes(16)).owner
        process = Process(owners, link, handle, {d: {} for d in NAMESPACES}, dict(self.epochs))
        self.processes.append(process)
        return process

    def announce(self, process):
        digest, key = self.rng.choice(NAMESPACES), self.rng.choice(KEYS)
        self.page += 1
        (record,) = encode_records(make_records(process.handle, 0, [self.page], [2]))
        self.said[self.page] = (digest, key, process)
        if process.owners.announce(digest, process.seen[digest], process.handle, [key], [record]):
            process.holds[digest][key] = self.page
        else:
            process.seen[digest] = self.epoch(digest)
            process.holds[digest].clear()

    def withdraw(self, process):
        digest, key = self.rng.choice(NAMESPACES), self.rng.choice(KEYS)
        process.holds[digest].pop(key, None)
        process.owners.withdraw(digest, process.seen[digest], process.handle, [key])

    def beat(self, process):
        for digest in NAMESPACES:
            epoch = self.epoch(digest)
            if epoch > process.seen[digest]:
                process.seen[digest] = epoch
                process.holds[digest].clear()
            process.owners.epoch_moved(digest, epoch)
        for lease in process.owners.all():
            process.owners.renew(lease)
        process.owners.fence_dead()

    def crash(self, process):
        process.crashed_at = self.server.now

    def bump(self, _process):
        digest = self.rng.choice(NAMESPACES)
        self.epochs[digest] = self.server.script(BUMP, [namespace_key(digest, b"e")], [])

    def forget(self, _process):
        """The server restarts empty; epochs come back as `RedisRegistry` brings them back, at once."""
        self.server.lose_everything()
        for digest, epoch in self.epochs.items():
            self.server.values[namespace_key(digest, b"e")] = epoch

    def sleep(self, _process):
        self.server.now += self.rng.choice([0.5, 2.0, 7.0, 30.0])

    def late(self, process):
        process.link.deliver_late()

    # ---- what must hold

    def check(self):
        for digest in NAMESPACES:
            for key in KEYS:
                for number, record in self.server.lookup(digest, key).items():
                    (found,) = decode_records([0], [record])
                    assert int(found["owner"]) == number
                    assert self.said[int(found["page"])][:2] == (digest, key), "another namespace's or block's"
                    process = self.said[int(found["page"])][2]
                    (lease,) = process.owners.all()
                    assert self.server.get(namespace_key(digest, b"l", number)) == lease.body, "another owner's"
                    dead_s = 0 if process.crashed_at is None else self.server.now - process.crashed_at
                    assert dead_s < 2 * OPTIONS.lease_s, "served long after its end"

    def settle(self):
        """No more faults: soon everything that living processes hold is found, and nothing else is left.

        Where two owners had one number, one of them may have withdrawn hints of the other: those are only lost hits.
        """
        for process in self.processes:
            process.link.faults = 0.0
            process.link.deliver_late()
        living = [process for process in self.processes if process.crashed_at is None]
        for _ in range(SETTLE_BEATS):
            self.server.now += OPTIONS.lease_s / 3
            for process in living:
                with contextlib.suppress(RegistryError):  # as the keeper does: the next beat tries again
                    self.beat(process)
        numbers = set()
        for process in living:
            (lease,) = process.owners.all()
            assert not lease.lost
            assert not lease.old
            numbers.add(lease.number)
            for digest, held in process.holds.items():
                for key, page in held.items():
                    record = self.server.lookup(digest, key).get(lease.number)
                    if record is None and self.numbers_max < 1000:
                        continue
                    assert record is not None, "a block that is held is not found"
                    assert int(decode_records([0], [record])["page"][0]) == page
        for digest in NAMESPACES:
            for key in KEYS:
                assert set(self.server.lookup(digest, key)) <= numbers, "an owner that is over is found"
        if living:
            assert {int(member) for member in self.server.sets[owners_key(b"s")]} == numbers


def run(seed):
    world = World(seed)
    world.start()
    acts = [world.announce] * 8 + [world.withdraw] * 3 + [world.beat] * 5 + [world.sleep] * 3 + [world.late] * 2
    acts += [world.crash, world.bump, world.forget]
    for _ in range(STEPS):
        living = [process for process in world.processes if process.crashed_at is None]
        if len(living) < 3 and (not living or world.rng.random() < 0.2):
            living.append(world.start())
        process = world.rng.choice(living)
        process.link.faults = world.rng.choice([0.0, 0.0, 0.1, 0.5])
        with contextlib.suppress(RegistryError):  # the caller hears of it; heartbeats go on
            world.rng.choice(acts)(process)
        world.check()
    world.settle()


def run_all(seeds):
    for seed in seeds:
        try:
            run(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_leases(first):
    run_all(range(first, first + SEEDS_PER_TEST))


if __name__ == "__main__":
    run_all(range(int(sys.argv[1])))
    print(f"{sys.argv[1]} seeds: nothing found")
