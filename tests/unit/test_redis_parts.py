"""The parts of the registry server's client that need no server: URLs, the breaker, batches, leases."""

import socket
import threading
import time

import numpy as np
import pytest

from kvmarket.config import MarketConfig
from kvmarket.errors import ConfigError, RegistryProtocolError, RegistryUnavailableError
from kvmarket.identity import OwnerInfo
from kvmarket.registry.leases import Lease, Stretch
from kvmarket.registry.records import RECORD_BYTES, encode_records, make_records
from kvmarket.registry.redis_batches import (
    STRETCH_BLOCKS_MAX,
    asked,
    batches,
    cuts,
    decode,
    encode_stretch,
    select,
)
from kvmarket.registry.redis_keeper import Keeper
from kvmarket.registry.redis_link import CLOCK_GOOD_S, RETRY_MAX_S, RETRY_MIN_S, Breaker, ServerClock
from kvmarket.registry.redis_scripts import SEGMENT, STRETCH_HEAD
from kvmarket.registry.redis_wire import ServerError, Wire, WireClosedError, WireGarbledError, tag_of
from kvmarket.server_url import parse_url, without_secrets
from kvmarket.testing.sample_records import chain

# ---- the URL


def test_our_options_are_taken_out_of_the_url():
    url = parse_url("rediss://u:p@host:7000/2?lease_s=3&ssl_ca_certs=/ca.pem&entries_max=5&ttl_s=60&timeout_s=0.1")
    assert url.url == "rediss://u:p@host:7000/2?ssl_ca_certs=%2Fca.pem"
    assert (url.lease_s, url.entries_max, url.ttl_s, url.timeout_s) == (3.0, 5, 60.0, 0.1)


@pytest.mark.parametrize(("given", "passed"), [("valkey", "redis"), ("valkeys", "rediss"), ("redis", "redis")])
def test_every_scheme_is_one_the_client_knows(given, passed):
    assert parse_url(f"{given}://host").url == f"{passed}://host"
    assert MarketConfig.from_env({"KVMARKET_REGISTRY": f"{given}://host"}).registry == f"{given}://host"


@pytest.mark.parametrize(
    "text",
    ["redis://", "redis://:secret@", "redis://u:secret@h:port", "redis://u:secret@h?lease_s=0", "http://u:secret@h"]
    + [f"redis://u:secret@h?{option}" for option in ("ttl_s=nan", "timeout_s=x", "entries_max=0", "lease_s=inf")],
)
def test_a_bad_url_is_an_error_that_keeps_the_secret(text):
    with pytest.raises(ConfigError) as error:
        MarketConfig.from_env({"KVMARKET_REGISTRY": text})
    assert "KVMARKET_REGISTRY" in str(error.value)
    assert "secret" not in str(error.value)


def test_secrets_are_not_shown():
    config = MarketConfig(registry="redis://user:s3cret@host:1?timeout_s=1")
    assert "s3cret" not in repr(config)
    assert config.registry_shown == without_secrets(config.registry) == "redis://(hidden)@host:1"
    assert without_secrets("lmdb:///a@b") == "lmdb:///a@b"


# ---- the breaker and the keeper


def test_the_breaker_admits_one_attempt_per_pause():
    breaker = Breaker()
    assert breaker.admits(0.0)
    breaker.failed(0.0)
    assert breaker.is_open
    assert not breaker.admits(RETRY_MIN_S * 0.9)
    assert breaker.admits(RETRY_MIN_S)
    assert not breaker.admits(RETRY_MIN_S * 1.5), "the attempt that was admitted is not over"
    breaker.succeeded()
    assert breaker.admits(RETRY_MIN_S * 1.5)


def test_the_pause_grows_to_its_limit_and_starts_again():
    breaker, now, pauses = Breaker(), 0.0, []
    for _ in range(8):
        breaker.failed(now)
        pauses.append(breaker.wait_s(now))
        now += pauses[-1]
    assert pauses[:3] == pytest.approx([RETRY_MIN_S, 2 * RETRY_MIN_S, 4 * RETRY_MIN_S])
    assert pauses[-1] == pytest.approx(RETRY_MAX_S)
    breaker.succeeded()
    breaker.failed(now)
    assert breaker.wait_s(now) == pytest.approx(RETRY_MIN_S)


def test_the_keeper_beats_and_stops():
    beats = threading.Semaphore(0)

    def beat():
        beats.release()
        return 0.0

    keeper = Keeper(beat, 0.01)
    assert keeper.leaves_it_to_caller(), "nobody else would ask"
    keeper.start()
    keeper.start()
    for _ in range(3):
        assert beats.acquire(timeout=10)
    assert not keeper.leaves_it_to_caller()
    keeper.stop()
    keeper.start()
    count = keeper.beats
    time.sleep(0.05)
    assert keeper.beats == count


def test_no_server_is_an_error_within_the_timeout_and_then_at_once():
    pytest.importorskip("redis", reason="the extra 'redis' is not installed")
    from kvmarket.registry.redis import RedisRegistry

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        registry = RedisRegistry(f"redis://127.0.0.1:{silent.getsockname()[1]}?timeout_s=0.2")
        with pytest.raises(RegistryUnavailableError):
            registry.lookup(bytes(32), chain(1, 3))
        began = time.monotonic()
        registry._reads._gate._may_probe = lambda: False
        for _ in range(50):
            with pytest.raises(RegistryUnavailableError, match="away"):
                registry.lookup(bytes(32), chain(1, 3))
        assert time.monotonic() - began < 5
        assert registry.epoch_hint(bytes(32)) == 0
        registry.close()


def test_an_option_the_client_does_not_know_is_named():
    pytest.importorskip("redis", reason="the extra 'redis' is not installed")
    from kvmarket.registry.redis import RedisRegistry

    with pytest.raises(ConfigError, match="no_such_option"):
        RedisRegistry("redis://127.0.0.1:1?no_such_option=1")


# ---- batches


def test_keys_are_grouped_by_run():
    keys = chain(1, 70)[5:]
    part = asked(keys)
    assert part.heads == [keys[0][:8], keys[27][:8], keys[59][:8]]
    assert part.runs == [(5, 27), (32, 32), (64, 6)]
    assert (part.hashes, part.width) == (b"".join(key[12:] for key in keys), 32)
    assert cuts(keys)[0] == [0, 27, 59, 65]


def test_keys_that_do_not_follow_each_other_are_cut():
    keys = chain(1, 10)
    assert cuts(keys[:3] + keys[4:5] + chain(2, 10)[5:7])[0] == [0, 3, 4, 6]
    assert asked(keys[:3] + keys[4:5]).runs == [(0, 3), (4, 1)]
    long = [bytes(8) + number.to_bytes(4, "big") + bytes(32) for number in range(STRETCH_BLOCKS_MAX * 2 + 1)]
    assert cuts(long)[0] == [0, STRETCH_BLOCKS_MAX, 2 * STRETCH_BLOCKS_MAX, len(long)]


@pytest.mark.parametrize("group", [asked, cuts])
def test_keys_of_two_lengths_are_refused(group):
    with pytest.raises(RegistryProtocolError, match="equally long"):
        group([bytes(44), bytes(20)])


def test_calls_begin_where_runs_do():
    keys = chain(1, 200)[7:]
    assert list(batches(keys, 64)) == [(0, 57), (57, 121), (121, 185), (185, 193)]
    assert list(batches(keys[:64], 64)) == [(0, 64)]
    assert list(batches(keys[:5], 2)) == [(0, 1), (1, 3), (3, 5)]


def segment(expires, stretch, owner=b"\0\0\0\x07"):
    return SEGMENT.pack(SEGMENT.size + len(stretch), owner, expires) + stretch


def stretch_of(keys, owner=b"\0\0\0\x07"):
    records = encode_records(make_records(7, 1, np.arange(len(keys)), np.full(len(keys), 2, np.uint64)))
    return encode_stretch(Stretch(keys, records), owner)


def test_what_a_run_has_is_cut_to_what_is_asked_for():
    keys = chain(1, 20)
    other = [*keys[:10], *chain(2, 20)[10:]]
    nine = b"\0\0\0\x09"
    fields = [keys[3][8:], segment(100, stretch_of(keys[3:])) + segment(100, stretch_of(other[3:], nine), nine)]
    fields += [keys[12][8:], segment(50, stretch_of(keys[12:13])), chain(2, 20)[4][8:], segment(100, stretch_of(keys))]
    part = asked(keys[5:15])
    places, segments, owners = select(part, [fields], 60)
    assert owners == {b"\0\0\0\x07", nine}
    found = decode(part, places, segments)
    mine = found[found["owner"] == 7]
    assert (mine["block"].tolist(), mine["page"].tolist()) == (list(range(10)), list(range(2, 12)))
    assert found[found["owner"] == 9]["block"].tolist() == [0, 1, 2, 3, 4], "up to where it is another prefix"
    assert (np.diff(found["block"]) >= 0).all()


def test_records_of_other_versions_are_left_out():
    keys = chain(1, 3)
    strange = encode_stretch(Stretch(keys, [bytes(RECORD_BYTES)] * 3), b"\0\0\0\0")
    assert len(decode(asked(keys), [0], [segment(100, strange)])) == 0
    short = (
        STRETCH_HEAD.pack(3, 0, 2) + b"".join(key[12:] for key in keys[1:]) + b"\x91\x02" * 3
    )  # another major version
    both = decode(asked(keys), [0, 0], [segment(100, short), segment(100, stretch_of(keys[:2]))])
    assert both["block"].tolist() == [0, 1]


def test_skipped_blocks_are_holes():
    keys = chain(1, 5)
    whole = stretch_of(keys)
    records = whole[STRETCH_HEAD.size + 4 * 32 :]
    part = (
        STRETCH_HEAD.pack(5, 3, RECORD_BYTES) + whole[STRETCH_HEAD.size : -len(records)] + records[3 * RECORD_BYTES :]
    )
    found = decode(asked(keys), [0], [segment(100, part)])
    assert list(zip(found["block"], found["page"], strict=True)) == [(3, 3), (4, 4)]


# ---- the wire


class Plugged:
    """What `Wire` uses of the client library's connection, on one end of a socket pair."""

    def __init__(self, end):
        self._sock = end

    def connect(self):
        self._sock.settimeout(5)

    def disconnect(self):
        self._sock.close()


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"+OK\r\n-ERR bad\r\n", ["OK", "ERR bad"]),
        (b"HTTP/1.1 400 Bad Request\r\n", WireGarbledError),
        (b"+OK\r\n", WireClosedError),
        (b"", WireClosedError),
    ],
)
def test_answers_of_a_wire(sent, expected):
    pytest.importorskip("hiredis", reason="the extra 'redis' is not installed")
    here, there = socket.socketpair()
    wire = Wire(Plugged(here))
    there.sendall(sent)
    there.shutdown(socket.SHUT_WR)
    if isinstance(expected, list):
        first, second = wire.exchange([(b"PING",), (b"GET", 1)])
        assert [first.decode(), str(second)] == expected
        assert isinstance(second, ServerError)
    else:
        with pytest.raises(expected):
            wire.exchange([(b"PING",), (b"PING",)])
    wire.close()
    wire.close()
    there.close()


def test_what_a_command_is_about_and_where_it_moved():
    assert tag_of((b"GET", b"kvm:{ab}:e")) == b"ab"
    assert tag_of((b"EVALSHA", b"digest", 2, b"kvm:{cd}:e", b"x")) == b"cd"
    assert tag_of((b"TIME",)) == b""
    assert ServerError("MOVED 3999 127.0.0.1:6381").moved_to == ("127.0.0.1", 6381)
    assert ServerError("MOVED 3999 :6381").moved_to == ("", 6381)
    assert ServerError("ERR moved").moved_to is None


def test_the_servers_clock_is_asked_for_now_and_then():
    now = [5.0]
    clock = ServerClock(lambda: now[0])
    assert clock.now() is None
    assert clock.told(100) == clock.now() == 100
    for jump in (CLOCK_GOOD_S, -1.0):
        now[0] = 5.0 + jump
        assert clock.now() is None


# ---- leases


KEYS = chain(3, 8)
VALUES = [b"%d" % number for number in range(8)]


def lease():
    return Lease(OwnerInfo(5, bytes(16), 1, 1, "boot", "host"), 5, b"me")


def test_starting_over_keeps_entries_and_owes_the_old_number():
    mine, digest = lease(), bytes(32)
    space = mine.space(digest, 3)
    space.joined = True
    space.took(space.plan([Stretch(KEYS[:2], VALUES[:2])]), 10.0)
    mine.answered([b"me", b"me"])
    assert not mine.lost
    for other in (None, b"somebody"):
        mine.lost = False
        mine.answered([b"me", other])
        assert mine.lost
    mine.begin(9)
    assert (mine.number, mine.old, mine.info.owner, mine.lost) == (9, [5], 5, False)
    assert not mine.spaces[digest].joined
    assert list(mine.spaces[digest].stretches) == KEYS[:1]


def test_a_later_epoch_begins_anew_and_an_earlier_one_is_over():
    mine, digest = lease(), bytes(32)
    space = mine.space(digest, 3)
    space.took(space.plan([Stretch(KEYS[:1], VALUES[:1])]), 10.0)
    assert mine.space(digest, 2) is None
    assert mine.space(digest, 3).homes
    assert not mine.space(digest, 4).homes
    assert mine.space(digest, 3) is None


def told(space):
    """What a server holds that was told of every change: key -> value."""
    assert space.homes == {key: each for each in space.stretches.values() for key in each.keys}
    assert all(first == each.keys[0] for first, each in space.stretches.items())
    return {k: v for each in space.stretches.values() for k, v in zip(each.keys, each.values, strict=True)}


def test_a_change_cuts_the_stretches_it_touches():
    space = lease().space(bytes(32), 1)
    space.took(space.plan([Stretch(KEYS, VALUES)]), 10.0)
    change = space.plan([], [KEYS[0], KEYS[4], b"x"])
    assert ([list(put.keys) for put in change.puts], change.drops) == ([KEYS[1:4], KEYS[5:]], [KEYS[0]])
    assert change.removed == 2
    space.took(change, 10.0)
    change = space.plan([Stretch(KEYS[3:6], [b"new"] * 3)])
    assert [list(put.keys) for put in change.puts] == [KEYS[1:3], KEYS[6:], KEYS[3:6]]
    assert change.drops == [KEYS[5]]
    space.took(change, 10.0)
    expected = dict(zip(KEYS, VALUES, strict=True)) | dict.fromkeys(KEYS[3:6], b"new")
    assert told(space) == {key: value for key, value in expected.items() if key != KEYS[0]}
    space.took(space.plan([], KEYS), 10.0)
    assert told(space) == {}


def test_the_oldest_entries_are_renewed_first():
    space = lease().space(bytes(32), 1)
    parts = [Stretch(KEYS[at : at + 2], VALUES[at : at + 2]) for at in (0, 2, 4)]
    space.took(space.plan(parts), 10.0)
    space.took(space.plan([parts[0]]), 20.0)
    space.took(space.plan([], KEYS[2:4]), 10.0)
    assert space.due(9.0, 10) == []
    assert [each.keys for each in space.due(10.0, 10)] == [parts[2].keys]
    assert [each.keys for each in space.due(20.0, 10)] == [parts[2].keys, parts[0].keys]
    assert [each.keys for each in space.due(20.0, 1)] == [parts[2].keys]
