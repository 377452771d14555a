"""Bad days on a registry server: processes and the server are killed, stopped and restarted while blocks are fetched.

Links to it are cut or swallow everything, and the clocks of leases jump. Real processes, a real server, real signals,
in an order that the seed decides. Never a wrong byte, never a fetch that hangs, and nothing left behind. A failure
names its seed; `CHAOS` holds what a run is made of.
"""

import contextlib
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

pytest.importorskip("redis", reason="the extra 'redis' is not installed")

import market_jobs as jobs

from kvmarket import MarketConfig
from kvmarket.errors import KVMarketError
from kvmarket.registry.redis import RedisRegistry
from kvmarket.report import MissReason
from kvmarket.testing.bad_link import BadLink
from kvmarket.testing.peers import PeerPool
from kvmarket.testing.redis_server import WHERE_FROM, RedisServer, find_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_server() is None, reason=WHERE_FROM),
]

FETCHES = 1200
SEEDS = [1, 2]
PROMPTS, BLOCKS = 12, 8
OWNERS, READERS = 3, 2
LINKS = 2
LOOP_SOCKETS = 2  # of the event loop that a market is used from
JUMPS_S = [-3600.0, -5.0, -0.5, 0.5, 5.0, 3600.0]
LEASE_S, TIMEOUT_S, DEADLINE_S = 2.0, 0.3, 1.5
GRACE_S = 8.0  # machines that run tests are busy
GONE_WITHIN_S = 20.0
SLOWEST = "slowest fetch in ms"
AWAY_PAUSE_S = 0.03  # fetches miss at once: without it most of a run would be in the time without a server
CHAOS = {
    "fetch": 400,
    "publish": 60,
    "withdraw": 6,
    "bump_epoch": 1,
    "kill_owner": 2,
    "stop_owner": 2,
    "kill_reader": 1,
    "kill_server": 1,
    "stop_server": 1,
    "cut_link": 1,
    "lose_link": 1,
    "jump_clock": 4,
}


@dataclass
class World:
    """What runs, and what was seen."""

    peers: object
    server: RedisServer
    config: MarketConfig
    links: list
    rng: random.Random
    owners: list = field(default_factory=list)
    readers: list = field(default_factory=list)
    stopped: list = field(default_factory=list)
    bad_links: list = field(default_factory=list)
    handles: dict = field(default_factory=dict)
    unserved: bool = False
    away: str = ""
    back_at: float = 0.0
    seen: Counter = field(default_factory=Counter)
    slowest_s: float = 0.0

    def fill(self):
        """Start what is missing, as far as the server lets it."""
        for group, size in ((self.owners, OWNERS), (self.readers, READERS)):
            while len(group) < size and not self.away and (good := [x for x in self.links if not x.is_bad]):
                peer, port = self.peers.spawn(), self.rng.choice(good).port
                config = replace(self.config, registry=self.config.registry.replace(str(self.server.port), str(port)))
                self.handles[peer] = peer.call(jobs.open_handles)
                try:
                    peer.call(jobs.open_market, config)
                except KVMarketError:  # it is busy coming back
                    peer.kill()
                    self.seen["market not opened"] += 1
                    return
                group.append(peer)

    def repair(self):
        """End what should last for a moment only."""
        now = time.monotonic()
        if self.away and now > self.back_at:
            self.server.start() if self.away == "killed" else self.server.go_on()
            self.away = ""
        for entry in [entry for entry in self.stopped if now > entry[0]]:
            self.stopped.remove(entry)
            entry[1].signal(signal.SIGCONT)
            self.owners.append(entry[1])
        for entry in [entry for entry in self.bad_links if now > entry[0]]:
            self.bad_links.remove(entry)
            entry[1].mend()

    # ---- what can happen

    def fetch(self):
        if not self.readers:
            return
        began = time.monotonic()
        report, right = self.rng.choice(self.readers).call(jobs.fetch, self.rng.randrange(PROMPTS), BLOCKS)
        took = time.monotonic() - began
        self.slowest_s = max(self.slowest_s, took)
        assert right, f"wrong bytes: {report}"
        assert took < DEADLINE_S + GRACE_S, f"a fetch took {took:.1f} s: {report}"
        self.seen["fetches"] += 1
        self.seen[f"ended {report.reason}"] += 1
        self.seen["hits"] += report.blocks_adopted > 0
        self.unserved = report.reason is MissReason.REGISTRY_UNAVAILABLE

    def publish(self):
        self._ask_owner(jobs.publish)

    def withdraw(self):
        self._ask_owner(jobs.withdraw)

    def _ask_owner(self, job):
        if self.owners:
            try:
                self.rng.choice(self.owners).call(job, self.rng.randrange(PROMPTS), BLOCKS)
                self.seen[job.__name__] += 1
            except KVMarketError as error:
                self.seen[f"{job.__name__}: {type(error).__name__}"] += 1

    def bump_epoch(self):
        if self.owners:
            with contextlib.suppress(KVMarketError):
                self.rng.choice(self.owners).call(jobs.bump_epoch)

    def kill_owner(self):
        self._kill(self.owners)

    def kill_reader(self):
        self._kill(self.readers)

    def _kill(self, group):
        if group and not self.away:
            group.pop(self.rng.randrange(len(group))).kill()

    def stop_owner(self):
        if self.owners:
            owner = self.owners.pop(self.rng.randrange(len(self.owners)))
            owner.signal(signal.SIGSTOP)
            self.stopped.append((time.monotonic() + self.rng.choice([0.2, 1.5 * LEASE_S]), owner))

    def cut_link(self):
        self._spoil_link(BadLink.cut)

    def lose_link(self):
        self._spoil_link(BadLink.swallow)

    def _spoil_link(self, how):
        if good := [link for link in self.links if not link.is_bad]:
            link = self.rng.choice(good)
            how(link)
            self.bad_links.append((time.monotonic() + self.rng.choice([0.1, 0.5, 1.5 * LEASE_S]), link))
            self.seen[how.__name__] += 1

    def jump_clock(self):
        if self.owners and self.readers:
            self.rng.choice([*self.owners, *self.readers]).call(jobs.jump_clock, self.rng.choice(JUMPS_S))
            self.seen["jumps"] += 1

    def kill_server(self):
        self._take_away("killed", self.server.kill)

    def stop_server(self):
        self._take_away("stopped", self.server.stop)

    def _take_away(self, how, take):
        if not self.away:
            take()
            self.away, self.back_at = how, time.monotonic() + self.rng.choice([0.1, 0.5, 1.5 * LEASE_S])

    def end(self):
        """Everything comes back and is closed."""
        self.back_at = 0.0
        self.stopped = [(0.0, owner) for _, owner in self.stopped]
        self.bad_links = [(0.0, link) for _, link in self.bad_links]
        self.repair()
        for peer in (*self.owners, *self.readers):
            peer.call(jobs.close_market, timeout_s=30)
            left = peer.call(jobs.open_handles) - self.handles[peer]
            left["socket"] -= LOOP_SOCKETS
            assert not +left, f"left open: {left}"


def keys_left(registry):
    return {key for key in registry._writes.call(b"KEYS", b"*") if not key.endswith((b":e", b":d"))}


def until_nothing_is_left(url):
    registry = RedisRegistry(url)
    end = time.monotonic() + GONE_WITHIN_S
    left = set()
    while time.monotonic() < end:
        with contextlib.suppress(KVMarketError):
            registry.sweep()
            left = keys_left(registry)
            if not left:
                break
        time.sleep(0.2)
    registry.close()
    return left


def play(peers, directory, seed, fetches):
    """One run; returns what was seen."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer(directory))
        links = [stack.enter_context(BadLink(server.port)) for _ in range(LINKS)]
        config = MarketConfig(
            registry=f"{server.url}?lease_s={LEASE_S}&timeout_s={TIMEOUT_S}",
            runtime_dir=str(directory),
            arena_bytes=1 << 20,
            fetch_deadline_s=DEADLINE_S,
        )
        world = World(peers, server, config, links, random.Random(seed))
        acts, weights = zip(*CHAOS.items(), strict=True)
        try:
            while world.seen["fetches"] < fetches:
                world.repair()
                world.fill()
                getattr(world, world.rng.choices(acts, weights)[0])()
                if world.away or world.unserved:
                    world.unserved = False
                    time.sleep(AWAY_PAUSE_S)
            world.end()
        finally:
            server.go_on()
        assert until_nothing_is_left(server.url) == set(), "keys are left on the server"
        world.seen[SLOWEST] = int(world.slowest_s * 1e3)
        return world.seen


@pytest.mark.parametrize("seed", SEEDS)
def test_never_wrong_never_hung_nothing_left(peers, tmp_path, seed):
    try:
        seen = play(peers, tmp_path, seed, FETCHES // len(SEEDS))
    except BaseException:
        print(f"seed {seed}")
        raise
    print(seed, dict(seen))
    assert seen["hits"] >= 20, seen
    assert seen["ended registry_unavailable"] > 0, seen


def main(fetches):
    """A longer run: new seeds until there are enough fetches."""
    total = Counter()
    with PeerPool([jobs.__file__]) as pool:
        while total["fetches"] < fetches:
            seed = random.SystemRandom().randrange(2**32)
            print(f"seed {seed}", flush=True)
            with tempfile.TemporaryDirectory() as directory:
                seen = play(pool, Path(directory), seed, FETCHES // len(SEEDS))
            slowest = max(total[SLOWEST], seen.pop(SLOWEST))
            total.update(seen)
            total[SLOWEST] = slowest
            pool.reap()
    print(dict(total))


if __name__ == "__main__":
    main(int(sys.argv[1]))
