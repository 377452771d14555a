"""Owners and readers with a secret: each proves to the other that it has it, or nothing is served."""

import pytest
from fake_driver import INCARNATION, FakeServer, Recorder
from ucx_owners import BLOCKS, UcxRegionOwner, publish_in_peer

from kvmarket import MarketConfig, Marketplace
from kvmarket.errors import TransportUnavailableError
from kvmarket.report import MissReason
from kvmarket.secret import Secret
from kvmarket.testing.samples import SPEC, sample_kv, sample_tokens
from kvmarket.transport.ucx import UcxTransport
from kvmarket.transport.ucx_peer import Peer
from kvmarket.transport.ucx_proof import ProofKey
from kvmarket.transport.ucx_server import ServerSession
from kvmarket.transport.ucx_wire import Challenge, Describe, Hello, Proof, Proven, Refused, Region, Welcome, encode

SECRET, ANOTHER = Secret(b"s" * 32), Secret(b"t" * 32)
KEY = ProofKey(SECRET)
NONCE = b"n" * 16


@pytest.mark.parametrize(
    ("owners", "readers", "why"),
    [
        (SECRET, SECRET, None),
        (SECRET, ANOTHER, "this owner has another secret"),
        (SECRET, None, "demands a secret (KVMARKET_SECRET_FILE), and this process has none"),
        (None, SECRET, "the owner did not prove that it has the secret"),
        (None, None, None),
    ],
    ids=["the same", "another", "none of the reader's", "none of the owner's", "none at all"],
)
def test_only_who_has_the_owners_secret_is_served(owners, readers, why):
    owner, reader = UcxRegionOwner(secret=owners), UcxTransport({}, secret=readers)
    lent = owner.lend_pattern(4, 4096)
    try:
        if why is None:
            assert reader.connect(lent.owner, lent.descriptor).scheme == "ucx"
        else:
            with pytest.raises(TransportUnavailableError) as raised:
                reader.connect(lent.owner, lent.descriptor)
            assert why in str(raised.value)
    finally:
        reader.close()
        owner.close()


async def test_processes_with_one_secret_share_over_ucx(peers, settings, tmp_path):
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef" * 4)
    path.chmod(0o600)
    settings |= {"transport": "ucx", "secret_file": str(path)}
    peers.spawn().call(publish_in_peer, settings)
    tokens = sample_tokens(1, BLOCKS)
    async with Marketplace("model", SPEC, config=MarketConfig(**settings)) as market:
        result = await market.fetch(tokens, deadline_s=5.0)
        assert (result.report.transport, result.report.blocks_adopted) == ("ucx", BLOCKS)
        assert (result.kv == sample_kv(tokens)).all()


async def test_an_owner_that_refuses_the_secret_is_a_miss_that_says_so(peers, settings, monkeypatch):
    """Both are in one namespace, so that only the connection is left to keep them apart."""
    settings |= {"transport": "ucx"}
    peers.spawn().call(publish_in_peer, settings)
    monkeypatch.setattr("kvmarket.core.make_transports", lambda *_: [UcxTransport({}, secret=ANOTHER)])
    async with Marketplace("model", SPEC, config=MarketConfig(**settings)) as market:
        report = (await market.fetch(sample_tokens(1, BLOCKS), deadline_s=5.0)).report
    assert (report.reason, report.blocks_adopted) == (MissReason.UNREACHABLE, 0)
    assert "did not prove" in report.detail


# ---- message by message


@pytest.fixture
def session(region_owner):
    driver = Recorder()
    return ServerSession(FakeServer(driver, region_owner, KEY), object()), driver


def proof_for(challenge, key=KEY):
    return Proof(NONCE, key.of_reader(INCARNATION, challenge.nonce, NONCE))


def hello(session, version=3):
    session.on_control(encode(Hello(1, version, INCARNATION)))


def test_a_right_proof_is_answered_with_the_owners_own(session):
    session, driver = session
    hello(session)
    (challenge,) = driver.said
    session.on_control(encode(proof_for(challenge)))
    assert driver.said[1:] == [Proven(KEY.of_owner(INCARNATION, challenge.nonce, NONCE)), Welcome(3)]
    session.on_control(encode(Describe(5, 0, False)))
    assert isinstance(driver.said[-1], Region)
    hello(session)
    assert driver.said[-1] == Welcome(3), "it is known by now"


@pytest.mark.parametrize("early", [Describe(5, 0, False), Describe(5, 0, True)])
def test_nothing_is_served_before_the_proof(session, early):
    session, driver = session
    hello(session)
    session.on_control(encode(early))
    assert isinstance(driver.said[-1], Challenge)
    assert driver.closed == ["a message came before HELLO"]


def test_every_proof_is_for_one_challenge_and_is_tried_once(session):
    session, driver = session
    hello(session)
    first = driver.said[-1]
    hello(session)
    second = driver.said[-1]
    assert first.nonce != second.nonce
    session.on_control(encode(proof_for(first)))
    assert driver.said[-1] == Refused("secret", "this owner has another secret")
    session.on_control(encode(proof_for(second)))
    assert driver.closed == ["a proof came that nobody asked for"]
    assert Welcome(3) not in driver.said


@pytest.mark.parametrize(
    "proof",
    [
        lambda asked: Proof(NONCE, bytes(32)),
        lambda asked: proof_for(asked, ProofKey(ANOTHER)),
        lambda asked: Proof(NONCE, KEY.of_owner(INCARNATION, asked.nonce, NONCE)),
        lambda asked: Proof(NONCE, KEY.of_reader(bytes(16), asked.nonce, NONCE)),
        lambda asked: Proof(bytes(16), KEY.of_reader(INCARNATION, asked.nonce, NONCE)),
    ],
    ids=["none", "another secret", "an owner's", "for another incarnation", "with another nonce"],
)
def test_wrong_proofs_are_refused(session, proof):
    session, driver = session
    hello(session)
    session.on_control(encode(proof(driver.said[-1])))
    assert driver.said[-1] == Refused("secret", "this owner has another secret")
    session.on_control(encode(Describe(5, 0, False)))
    assert driver.closed == ["a message came before HELLO"]


def test_readers_of_older_versions_are_told_why_they_are_not_served(session):
    session, driver = session
    hello(session, version=2)
    assert driver.said[-1].code == "secret"
    assert "takes version 3" in driver.said[-1].text


def reader(key):
    driver = Recorder()
    peer = Peer(driver, INCARNATION, "127.0.0.1", 1, key=key)
    peer.start()
    return peer, driver


def test_a_reader_takes_only_an_owner_that_answers_its_nonce():
    peer, driver = reader(KEY)
    peer.on_control(encode(Challenge(NONCE)))
    proof = driver.said[-1]
    assert proof.proof == KEY.of_reader(INCARNATION, NONCE, proof.nonce)
    peer.on_control(encode(Proven(KEY.of_owner(INCARNATION, NONCE, proof.nonce))))
    peer.on_control(encode(Welcome(3)))
    peer.ready.result(0)


@pytest.mark.parametrize("answer", [None, Proven(bytes(32)), "reflected"])
def test_a_reader_refuses_an_owner_without_the_secret(answer):
    peer, driver = reader(KEY)
    peer.on_control(encode(Challenge(NONCE)))
    if answer == "reflected":
        answer = Proven(driver.said[-1].proof)
    if answer is not None:
        peer.on_control(encode(answer))
    peer.on_control(encode(Welcome(3)))
    with pytest.raises(TransportUnavailableError, match="did not prove"):
        peer.ready.result(0)
    assert driver.closed


def test_a_reader_proves_itself_once():
    peer, driver = reader(KEY)
    peer.on_control(encode(Challenge(NONCE)))
    peer.on_control(encode(Challenge(bytes(16))))
    assert driver.closed == ["the owner asked for a second proof"]
    assert sum(isinstance(message, Proof) for message in driver.said) == 1


def test_keys_have_no_readable_form():
    assert repr(KEY) == "ProofKey(hidden)"
    assert (bool(KEY), bool(ProofKey()), bool(ProofKey(Secret()))) == (True, False, False)
    assert not hasattr(KEY, "__dict__")
