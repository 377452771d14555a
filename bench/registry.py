"""How fast is the registry server's client: prefix look-ups, announcing, memory, fencing.

A server of its own on the loopback address. Measured on one connection, one caller:

- look-ups of prefixes of 128 blocks per second, beside MGET of 128 values of a record's size through bare hiredis and a
  socket, in turns; `ratio` is ours over MGET's
- blocks announced per second, in batches as the publisher makes them
- with 1,000,000 entries: bytes of server memory per entry, p50 and p99 of a look-up
- seconds to fence an owner of 100,000 blocks, among the others' entries

Aim: 8,000 look-ups a second. `--quick` takes fewer of everything. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import hiredis
import numpy as np
from common import finish, log, percentile

from kvmarket.registry.records import RECORD_BYTES, block_keys, make_records
from kvmarket.registry.redis import RedisRegistry
from kvmarket.testing.redis_server import RedisServer

ASKED_BLOCKS = 128
BATCH_BLOCKS = 256
AIM_PER_S = 8000
OWNERS = 4
OPTIONS = "?lease_s=60&timeout_s=10"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer entries and rounds: shows that it runs")
    return parser.parse_args()


class RawClient:
    """Bare hiredis on a socket: no pool, no retry, no error handling."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()

    def call(self, *command: bytes) -> Any:
        self._socket.sendall(hiredis.pack_command(command))
        while (reply := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(1 << 16))
        return reply

    def close(self) -> None:
        self._socket.close()


class Filler:
    """Announces prefixes of `ASKED_BLOCKS` blocks with random hashes."""

    def __init__(self, registry: RedisRegistry) -> None:
        self.registry, self.digest = registry, os.urandom(32)
        self.epoch = registry.open_namespace(self.digest, {"name": "bench"})
        self._rng = np.random.default_rng(0)

    def owner(self) -> int:
        owner = self.registry.register_owner(os.urandom(16)).owner
        self.registry.register_region(owner, 0, {})
        return owner

    def prefixes(self, count: int) -> list[list[bytes]]:
        found = []
        for _ in range(count):
            data = self._rng.bytes(32 * ASKED_BLOCKS)
            found.append(block_keys([data[at : at + 32] for at in range(0, len(data), 32)]))
        return found

    def announce(self, owner: int, prefixes: list[list[bytes]]) -> float:
        """Return the seconds it took."""
        per_call = BATCH_BLOCKS // ASKED_BLOCKS
        digests = [bytes(16)] * BATCH_BLOCKS
        took = 0.0
        for first in range(0, len(prefixes), per_call):
            keys = [key for prefix in prefixes[first : first + per_call] for key in prefix]
            pages = np.arange(len(keys))
            records = make_records(owner, 0, pages, np.full(len(keys), 2, np.uint64), digests[: len(keys)])
            began = time.perf_counter()
            taken = self.registry.announce(self.digest, self.epoch, keys, records)
            took += time.perf_counter() - began
            if not taken:
                raise SystemExit("the epoch moved")
        return took


def rates(filler: Filler, raw: RawClient, prefixes: list[list[bytes]], rounds: int) -> dict[str, float]:
    """Look-ups and MGETs in turns; the rates are medians over rounds, the ratio is paired by round."""
    names = [[b"raw:%d:%d" % (i, j) for j in range(ASKED_BLOCKS)] for i in range(len(prefixes))]
    for each in names:
        raw.call(b"MSET", *(part for name in each for part in (name, bytes(RECORD_BYTES))))
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        for prefix in prefixes:
            if filler.registry.lookup(filler.digest, prefix).blocks != ASKED_BLOCKS:
                raise SystemExit("a prefix was not found")
        middle = time.perf_counter()
        for each in names:
            raw.call(b"MGET", *each)
        ended = time.perf_counter()
        ours.append(len(prefixes) / (middle - began))
        theirs.append(len(prefixes) / (ended - middle))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    best = max(ours)
    return {
        "lookups_per_s": statistics.median(ours),
        "lookups_per_s_best_round": best,
        "hiredis_mget_per_s": statistics.median(theirs),
        "ratio": ratio,
    }


def latencies(filler: Filler, prefixes: list[list[bytes]], count: int) -> dict[str, float]:
    """Single look-ups of prefixes all over the store."""
    order = np.random.default_rng(1).integers(0, len(prefixes), count)
    seconds = []
    for number in order.tolist():
        began = time.perf_counter()
        filler.registry.lookup(filler.digest, prefixes[number])
        seconds.append(time.perf_counter() - began)
    return {"p50_ms": percentile(seconds, 50) * 1e3, "p99_ms": percentile(seconds, 99) * 1e3}


def main() -> None:
    quick = arguments().quick
    entries, fenced_blocks, rounds = (32_768, 2560, 3) if quick else (1_000_000, 100_000, 15)
    with tempfile.TemporaryDirectory() as directory, RedisServer(Path(directory)) as server:
        registry, raw = RedisRegistry(server.url + OPTIONS), RawClient(server.port)
        filler = Filler(registry)
        hot = filler.prefixes(200)
        owners = [filler.owner() for _ in range(OWNERS)]
        log("look-ups beside MGET")
        filler.announce(owners[0], hot)
        result: dict[str, Any] = {"bench": "registry", "quick": quick, "asked_blocks": ASKED_BLOCKS}
        result["lookup"] = rates(filler, raw, hot, rounds)
        raw.call(b"FLUSHALL")  # also of what MGET read
        registry.close()

        registry = RedisRegistry(server.url + OPTIONS)
        filler = Filler(registry)
        owners = [filler.owner() for _ in range(OWNERS)]
        before = registry.usage()[1]
        prefixes = filler.prefixes(entries // ASKED_BLOCKS)
        log(f"announcing {len(prefixes) * ASKED_BLOCKS} blocks")
        share = -(-len(prefixes) // OWNERS)
        took = sum(filler.announce(owners[i], prefixes[i * share : (i + 1) * share]) for i in range(OWNERS))
        announced = len(prefixes) * ASKED_BLOCKS
        result["announce_blocks_per_s"] = announced / took
        result["full"] = {"entries": announced, "bytes_per_entry": (registry.usage()[1] - before) / announced}
        result["full"] |= latencies(filler, prefixes, 300 if quick else 5000)

        log(f"fencing an owner of {fenced_blocks} blocks")
        victim = filler.owner()
        filler.announce(victim, filler.prefixes(fenced_blocks // ASKED_BLOCKS))
        began = time.perf_counter()
        registry._owners.fence(victim)  # noqa: SLF001 - what a sweep does for each dead owner
        result["fence"] = {"blocks": fenced_blocks // ASKED_BLOCKS * ASKED_BLOCKS, "s": time.perf_counter() - began}
        raw.close()
        registry.close()
    reached = result["lookup"]["lookups_per_s"]
    verdict = "reached" if reached >= AIM_PER_S else "missed"
    print(f"look-ups of {ASKED_BLOCKS} blocks: {reached:.0f}/s, aim {AIM_PER_S}/s {verdict}")
    finish(result)


if __name__ == "__main__":
    main()
