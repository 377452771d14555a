"""Messages: what is sent is what is read, and 100,000 random and mutated ones harm nobody."""

import gc
import os
import random
import resource
import time

import msgpack
import numpy as np
import pytest
from fake_driver import INCARNATION, FakeServer, Recorder
from hypothesis import given
from hypothesis import strategies as st
from ucx_owners import PeerUcxOwner, UcxRegionOwner

from kvmarket.region.pages import PageLayout
from kvmarket.transport import ucx_server
from kvmarket.transport.ucx import UcxTransport
from kvmarket.transport.ucx_operations import Payload
from kvmarket.transport.ucx_peer import Peer
from kvmarket.transport.ucx_server import ServerSession
from kvmarket.transport.ucx_wire import (
    MESSAGE_BYTES_MAX,
    PAGES_MAX,
    VERSION_MAX,
    Challenge,
    Describe,
    Hello,
    Ping,
    Pong,
    Proof,
    Proven,
    Read,
    Refused,
    Region,
    Trailer,
    Welcome,
    WireError,
    common_version,
    decode,
    decode_data_header,
    encode,
    encode_data_header,
)

MESSAGES = 100_000
SAMPLES = [
    Hello(1, 1, INCARNATION),
    Welcome(1),
    Refused("busy", "too much", 3),
    Describe(1, 0, True),
    Region(1, b"p" * 64, [(4096, 8192, b"key")], [(1, 2, b"")]),
    Read.of(7, 0, np.arange(4), np.full(4, 2, np.uint64)),
    Trailer(7, [1, 2], [3]),
    Ping(),
    Pong(),
    Challenge(bytes(16)),
    Proof(bytes(16), bytes(32)),
    Proven(bytes(32)),
]


def garbage(rng):
    """Yield `MESSAGES` byte strings: random bytes, random msgpack, and valid messages with something changed."""
    encoded = [encode(sample) for sample in SAMPLES]
    for number in range(MESSAGES):
        kind = number % 4
        if kind == 0:
            yield rng.randbytes(rng.randrange(64))
        elif kind == 1:
            fields = [rng.choice([None, True, -1, 2**63, 2**64 - 1, 0.5, "", b"", b"x" * 16, [], {}]) for _ in range(6)]
            yield msgpack.packb([rng.randrange(-1, 15), *fields[: rng.randrange(7)]])
        else:
            data = bytearray(rng.choice(encoded))
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(data))
                if rng.random() < 0.6:
                    data[at] = rng.randrange(256)
                elif rng.random() < 0.5:
                    del data[at:]
                    data += rng.randbytes(rng.randrange(8))
                    if not data:
                        data = bytearray(b"\x90")
                else:
                    data[at:at] = rng.randbytes(rng.randrange(16))
            yield bytes(data)


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_messages_survive_the_wire(message):
    assert encode(decode(encode(message))) == encode(message)
    later = msgpack.packb([*msgpack.unpackb(encode(message)), "a field of a later version"])
    assert encode(decode(later)) == encode(message)


def test_reads_carry_pages_and_generations():
    pages, generations = np.array([0, 5, 2**32 - 1]), np.array([2, 4, 2**64 - 2], np.uint64)
    read = decode(encode(Read.of(1, 2, pages, generations)))
    assert (read.page_numbers == pages).all()
    assert (read.page_generations == generations).all()


@pytest.mark.parametrize(
    ("low", "high", "chosen"),
    [(1, 1, 1), (1, 9, VERSION_MAX), (0, 1, 1), (1, 2, 2), (2, 9, 3), (3, 9, 3), (4, 9, None), (0, 0, None)],
)
def test_the_highest_common_version_is_chosen(low, high, chosen):
    assert common_version(Hello(low, high, INCARNATION)) == chosen


@given(st.binary(max_size=64))
def test_data_headers(data):
    assert (decode_data_header(data) is None) == (len(data) != 8)
    assert decode_data_header(encode_data_header(77)) == (77, False)
    assert decode_data_header(encode_data_header(77, whole=True)) == (77, True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        bytes(MESSAGE_BYTES_MAX + 1),
        msgpack.packb([6, 1, 0, bytes(4 * (PAGES_MAX + 1)), bytes(8 * (PAGES_MAX + 1))]),
        msgpack.packb([6, 1, 0, bytes(8), bytes(8)]),
        msgpack.packb([1, 1, 1, b"short"]),
        msgpack.packb([99]),
        b"\x91" * 5000,
    ],
    ids=["empty", "not msgpack", "too long", "too many pages", "uneven", "bad incarnation", "unknown", "deep"],
)
def test_what_is_no_message_is_refused(data):
    with pytest.raises(WireError):
        decode(data)


def test_100000_bad_messages_do_not_harm_an_owner(region_owner):
    driver = Recorder()
    server = FakeServer(driver, region_owner)
    session = ServerSession(server, object())
    began = time.monotonic()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in garbage(random.Random(1)):
        session.on_control(data)
        if driver.closed:  # the real driver would have closed it
            driver.closed.clear()
            session = ServerSession(server, object())
            session.on_control(encode(SAMPLES[0]))
    assert driver.sent > MESSAGES / 100, "hardly any got past the decoder: the test mutates too much"
    assert len(driver.tickers) == 0
    assert time.monotonic() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "KiB"


def test_100000_bad_messages_do_not_harm_a_reader():
    driver = Recorder()
    rng = random.Random(2)

    def fresh():
        peer = Peer(driver, INCARNATION, "127.0.0.1", 1)
        peer.start()
        peer.on_control(encode(Welcome(1)))
        peer.ready.result(0)
        return peer

    peer, ended = fresh(), []
    local = np.zeros(256, np.uint8)
    for data in garbage(rng):
        iov = np.array([[local.ctypes.data, 256]], np.uint64)
        if rng.random() < 0.05:
            peer.read(0, np.arange(4), np.full(4, 2, np.uint64), iov, ended.append)
        if rng.random() < 0.05:
            peer.on_data(data[:8], Payload(len(data), data, None))
        peer.on_control(data)
        if driver.closed:
            driver.closed.clear()
            peer.on_closed("as the driver says after it closed")
            peer = fresh()
    assert ended, "no read ever ended"
    peer.on_closed("the end")
    assert not driver.tickers


def test_a_live_owner_outlives_bad_messages(peers):
    owner = PeerUcxOwner(peers.spawn())
    lent = owner.lend_pattern(4, 4096)
    owner.validate(0, [0, 1, 2, 3])
    transport = UcxTransport({})
    driver, (address, port) = transport.driver, lent.descriptor.endpoints["ucx"][0]

    class Sender:
        def __init__(self):
            self.closed = False

        def on_control(self, data):
            """Answers are of no interest."""

        def on_data(self, header, payload):
            driver.drop(payload)

        def on_closed(self, why):
            self.closed = True

    messages = garbage(random.Random(3))
    connections = 0
    for _ in range(300):
        sender = Sender()
        endpoint = driver.call(lambda sender=sender: driver.connect(address, port, sender), 5)
        connections += 1
        driver.call(
            lambda endpoint=endpoint: driver.send_control(endpoint, encode(Hello(1, 1, lent.owner.incarnation))), 5
        )
        for _ in range(10):
            data = next(messages)
            driver.call(lambda endpoint=endpoint, data=data: driver.send_control(endpoint, data), 5)
        driver.call(lambda endpoint=endpoint: driver.disconnect(endpoint, "done"), 5)
    assert connections == 300
    transport.connect(lent.owner, lent.descriptor)
    end = time.monotonic() + 10
    while owner.sessions() > 1 and time.monotonic() < end:
        time.sleep(0.05)
    assert owner.sessions() == 1
    transport.close()


def test_an_owner_refuses_other_versions_and_other_incarnations(region_owner):
    answers = []
    driver = Recorder()
    driver.send_control = lambda endpoint, data: answers.append(decode(data))
    session = ServerSession(FakeServer(driver, region_owner), object())
    session.on_control(encode(Hello(7, 9, INCARNATION)))
    assert answers[-1].code == "version"
    assert "7 to 9" in answers[-1].text
    session.on_control(encode(Hello(1, 1, bytes(16))))
    assert answers[-1].code == "incarnation"
    session.on_control(encode(Hello(1, 3, INCARNATION)))
    assert answers[-1] == Welcome(VERSION_MAX)
    session.on_control(encode(Describe(5, 99, False)))
    assert (answers[-1].code, answers[-1].transfer) == ("region", 5)


@pytest.mark.parametrize("version", [1, 2])
def test_short_reads_are_one_message_from_version_2_on(region_owner, version):
    sent = []
    driver = Recorder()
    driver.send_data = lambda endpoint, header, iov, done: (sent.append((header, None)), done(0))
    driver.send_short = lambda endpoint, header, data: sent.append((header, data))
    driver.send_control = lambda endpoint, data: sent.append(decode(data))
    session = ServerSession(FakeServer(driver, region_owner), object())
    session.on_control(encode(Hello(1, version, INCARNATION)))
    generations = region_owner.validate(0, [0, 1, 2, 3])
    session.on_control(encode(Read.of(5, 0, np.array([1, 3]), generations[[1, 3]])))
    whole = encode_data_header(5, whole=True), b"x" * 128
    assert sent[1:] == ([whole] if version > 1 else [(encode_data_header(5), None), Trailer(5, [], [])])


def test_a_page_torn_in_a_short_read_is_named_in_a_trailer(region_owner, monkeypatch):
    sent = []
    driver = Recorder()
    driver.send_short = lambda endpoint, header, data: sent.append(header)
    driver.send_control = lambda endpoint, data: sent.append(decode(data))
    session = ServerSession(FakeServer(driver, region_owner), object())
    session.on_control(encode(Hello(1, 2, INCARNATION)))
    generations = region_owner.validate(0, [0, 1, 2, 3])
    copy = ucx_server.bytes_of
    monkeypatch.setattr(ucx_server, "bytes_of", lambda *args: (copy(*args), region_owner.invalidate(0, [3]))[0])
    session.on_control(encode(Read.of(5, 0, np.array([1, 3]), generations[[1, 3]])))
    assert sent[1:] == [encode_data_header(5), Trailer(5, [], [1])]


def test_a_reader_that_never_says_hello_is_dropped(region_owner):
    driver = Recorder()
    session = ServerSession(FakeServer(driver, region_owner), object())
    session.tick(time.monotonic())
    assert driver.closed == []
    session.tick(time.monotonic() + 60)
    assert driver.closed == ["no HELLO came"]
    session.on_control(encode(Ping()))
    assert driver.closed[-1] == "a message came before HELLO"


def test_another_incarnation_at_the_same_port_is_told_apart(monkeypatch):
    from dataclasses import replace

    from kvmarket.errors import PeerGoneError

    owner = UcxRegionOwner()
    try:
        lent = owner.lend(PageLayout.packed(1, 64), [64], [b"a" * 64])
        transport = UcxTransport({})
        with pytest.raises(PeerGoneError, match="incarnation"):
            transport.connect(replace(lent.owner, incarnation=os.urandom(16)), lent.descriptor)
        with pytest.raises(PeerGoneError, match="probe"):
            transport.connect(lent.owner, replace(lent.descriptor, probe=os.urandom(64)))
        transport.close()
    finally:
        owner.close()
