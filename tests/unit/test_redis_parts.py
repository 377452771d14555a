"""The parts of the registry server's client that need no server: URLs, the breaker, batches, leases."""

import socket
import threading
import time

import numpy as np
import pytest

from kvmarket.config import MarketConfig
from kvmarket.errors import ConfigError, RegistryProtocolError, RegistryUnavailableError
from kvmarket.identity import OwnerInfo
from kvmarket.registry.leases import Lease
from kvmarket.registry.records import RECORD_BYTES, encode_records, make_records
from kvmarket.registry.redis_batches import FIELDS_PER_RUN_MAX, batch, decode, with_owner
from kvmarket.registry.redis_keeper import Keeper
from kvmarket.registry.redis_link import RETRY_MAX_S, RETRY_MIN_S, Breaker
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
    part = batch(keys)
    assert part.heads == [keys[0][:8], keys[27][:8], keys[59][:8]]
    assert np.frombuffer(part.counts, ">u2").tolist() == [27, 32, 6]
    assert (part.keys, part.width) == (b"".join(keys), len(keys[0]))


def test_a_run_with_very_many_keys_is_cut():
    keys = [bytes(12) + number.to_bytes(32, "big") for number in range(FIELDS_PER_RUN_MAX * 2 + 1)]
    part = batch(keys)
    assert np.frombuffer(part.counts, ">u2").tolist() == [FIELDS_PER_RUN_MAX, FIELDS_PER_RUN_MAX, 1]


def test_keys_of_two_lengths_are_refused():
    with pytest.raises(RegistryProtocolError, match="equally long"):
        batch([bytes(44), bytes(20)])


def segment(expires, record):
    return bytes([len(record)]) + expires.to_bytes(4, "big") + record


def test_expired_and_foreign_segments_are_left_out():
    records = encode_records(make_records(7, 1, np.arange(3), np.full(3, 2, np.uint64)))
    plain = b"".join(segment(100, record) for record in records)
    assert decode(3, 99, plain, b"")["page"].tolist() == [0, 1, 2]
    assert len(decode(3, 100, plain, b"")) == 0
    mixed = [segment(100, records[0]), segment(50, records[1]) + segment(100, with_owner(records[1], b"\0\0\0\x09"))]
    mixed.append(segment(100, b"\x91\x02"))  # another major version
    found = decode(3, 60, b"".join(mixed), b",".join(b"%d" % len(each) for each in mixed))
    assert list(zip(found["block"], found["owner"], strict=True)) == [(0, 7), (1, 9)]
    strange = segment(100, bytes(RECORD_BYTES))
    assert len(decode(1, 60, strange, b"")) == 0


# ---- leases


def lease():
    return Lease(OwnerInfo(5, bytes(16), 1, 1, "boot", "host"), 5, b"me")


def test_starting_over_keeps_entries_and_owes_the_old_number():
    mine, digest = lease(), bytes(32)
    space = mine.space(digest, 3)
    space.joined = True
    space.announced([b"a", b"b"], [b"1", b"2"], 10.0)
    mine.answered([b"me", b"me"])
    assert not mine.lost
    for other in (None, b"somebody"):
        mine.lost = False
        mine.answered([b"me", other])
        assert mine.lost
    mine.begin(9)
    assert (mine.number, mine.old, mine.info.owner, mine.lost) == (9, [5], 5, False)
    assert not mine.spaces[digest].joined
    assert list(mine.spaces[digest].entries) == [b"a", b"b"]


def test_a_later_epoch_begins_anew_and_an_earlier_one_is_over():
    mine, digest = lease(), bytes(32)
    mine.space(digest, 3).announced([b"a"], [b"1"], 10.0)
    assert mine.space(digest, 2) is None
    assert mine.space(digest, 3).entries
    assert not mine.space(digest, 4).entries
    assert mine.space(digest, 3) is None


def test_the_oldest_entries_are_renewed_first():
    space = lease().space(bytes(32), 1)
    space.announced([b"a", b"b", b"c"], [b"1", b"2", b"3"], 10.0)
    space.announced([b"a"], [b"4"], 20.0)
    space.withdrawn([b"b", b"x"])
    assert space.due(9.0, 10) == []
    assert space.due(10.0, 10) == [b"c"]
    assert space.due(20.0, 10) == [b"c", b"a"]
    assert space.due(20.0, 1) == [b"c"]
