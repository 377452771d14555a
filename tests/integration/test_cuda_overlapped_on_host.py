"""Hashing, looking up and copying at once, over CUDA memory with host memory in its place."""

import numpy as np
import pytest
from cuda_jobs import KEYS, PAGES, pages_on, publish, same_bytes, scribble

from kvmarket.deadline import Deadline
from kvmarket.errors import InvalidInputError, TransferError
from kvmarket.registry import block_keys
from kvmarket.report import MissReason
from kvmarket.testing.host_cuda import HostTransfer

GROUPS = [KEYS[:8], KEYS[8:24], KEYS[24:]]


def fetch_in_groups(core, local, groups=GROUPS, deadline=None):
    return core.fetcher.fetch(iter(groups), local, np.arange(PAGES), deadline or Deadline(10))


@pytest.mark.parametrize("groups", [GROUPS, [KEYS], [[key] for key in KEYS]])
def test_blocks_are_read_while_others_are_looked_up(peers, runtime_dir, api, open_core, groups):
    peers.spawn().call(publish, str(runtime_dir))
    local, expected, core = pages_on(api, 2), pages_on(api, 1), open_core()
    fetched = fetch_in_groups(core, local, groups)
    assert (fetched.blocks_asked, fetched.reason, fetched.found.blocks) == (PAGES, MissReason.NONE, PAGES)
    outcome = fetched.outcome
    assert (outcome.blocks, outcome.reason, outcome.blocks_verified) == (PAGES, MissReason.NONE, PAGES)
    assert len(outcome.transfers) == 1, "the ordinary way was taken"
    assert same_bytes(local, expected, PAGES)
    assert fetched.found.records["block"].tolist() == list(range(PAGES))
    assert {"hash", "lookup", "read", "verify", "connect"} <= set(outcome.stages)


def test_the_run_ends_where_nobody_holds_a_block(peers, runtime_dir, api, open_core):
    peers.spawn().call(publish, str(runtime_dir))
    other = block_keys([bytes([i]) * 32 for i in range(30)] + [b"x" * 32] * 10)
    fetched = fetch_in_groups(open_core(), pages_on(api, 2), [other[:20], other[20:35], other[35:]])
    assert (fetched.found.blocks, fetched.outcome.blocks) == (30, 30)
    assert (fetched.reason, fetched.outcome.reason) == (MissReason.NOT_PUBLISHED, MissReason.NONE)
    assert fetch_in_groups(open_core(), pages_on(api, 2), [[b"y" * 44]]).outcome.blocks == 0


def test_a_wrong_block_ends_the_hit_there_whichever_group_it_is_in(peers, runtime_dir, api, open_core):
    peer = peers.spawn()
    peer.call(publish, str(runtime_dir))
    for block in (30, 9, 0):
        peer.call(scribble, PAGES - 1 - block)
        outcome = fetch_in_groups(open_core(), pages_on(api, 2)).outcome
        assert (outcome.blocks, outcome.reason) == (block, MissReason.DIGEST_MISMATCH)


def test_another_owner_continues_where_the_first_is_wrong(peers, runtime_dir, api, open_core):
    first, second = peers.spawn(), peers.spawn()
    first.call(publish, str(runtime_dir))
    second.call(publish, str(runtime_dir))
    first.call(scribble, PAGES - 1 - 12)
    second.call(scribble, PAGES - 1 - 3)
    local = pages_on(api, 2)
    outcome = fetch_in_groups(open_core(), local).outcome
    assert len(outcome.sources) <= 2
    assert outcome.blocks in {3, 12, PAGES}  # each owner is asked once
    assert same_bytes(local, pages_on(api, 1), outcome.blocks)


def test_an_epoch_that_moves_after_the_copies_makes_it_a_miss(peers, runtime_dir, api, open_core):
    peers.spawn().call(publish, str(runtime_dir))
    core = open_core()

    def groups():
        yield KEYS[:20]
        open_core().bump_epoch()
        yield KEYS[20:]

    outcome = fetch_in_groups(core, pages_on(api, 2), groups()).outcome
    assert (outcome.blocks, outcome.reason) == (0, MissReason.EPOCH_CHANGED)


def test_an_owner_that_dies_after_the_copies_makes_it_a_miss(peers, runtime_dir, api, open_core):
    peer = peers.spawn()
    peer.call(publish, str(runtime_dir))

    def groups():
        yield KEYS[:20]
        peer.kill()
        yield KEYS[20:]

    outcome = fetch_in_groups(open_core(), pages_on(api, 2), groups()).outcome
    assert (outcome.blocks, outcome.reason) == (0, MissReason.OWNER_GONE)


def test_a_deadline_that_passes_meanwhile_leaves_what_is_proven(peers, runtime_dir, api, open_core):
    peers.spawn().call(publish, str(runtime_dir))
    deadline, local = Deadline(10), pages_on(api, 2)

    def groups():
        yield KEYS[:20]
        deadline.cancel()
        yield KEYS[20:]

    outcome = fetch_in_groups(open_core(), local, groups(), deadline).outcome
    assert (outcome.blocks, outcome.reason) == (20, MissReason.DEADLINE)
    assert same_bytes(local, pages_on(api, 1), 20)


def test_an_error_meanwhile_leaves_no_copy_behind(peers, runtime_dir, api, open_core, monkeypatch):
    peers.spawn().call(publish, str(runtime_dir))
    waited = []
    original = HostTransfer.wait
    monkeypatch.setattr(HostTransfer, "wait", lambda transfer: (waited.append(1), original(transfer))[1])

    def groups():
        yield KEYS[:20]
        raise InvalidInputError("bad keys")

    with pytest.raises(InvalidInputError, match="bad keys"):
        fetch_in_groups(open_core(), pages_on(api, 2), groups())
    assert waited


def test_a_card_that_fails_is_a_miss_whichever_copy_it_was(peers, runtime_dir, api, open_core, monkeypatch):
    peers.spawn().call(publish, str(runtime_dir))
    waits, original = [], HostTransfer.wait

    def wait(transfer):
        if waits and not waits.pop():
            raise TransferError("the card failed", scheme="cuda_ipc")
        original(transfer)

    core = open_core()
    monkeypatch.setattr(HostTransfer, "wait", wait)
    for good in range(len(GROUPS)):
        waits[:] = [False, *[True] * good]
        outcome = fetch_in_groups(core, pages_on(api, 2)).outcome
        assert (outcome.blocks, outcome.reason) == (0, MissReason.OWNER_GONE)
        assert "the card failed" in outcome.detail
        assert fetch_in_groups(core, pages_on(api, 2)).outcome.blocks == PAGES


def test_an_answer_remembered_is_forgotten_with_the_first_write_and_with_its_owner(peers, runtime_dir, api, open_core):
    first, core = peers.spawn(), open_core()
    first.call(publish, str(runtime_dir))
    for _ in range(3):
        assert fetch_in_groups(core, pages_on(api, 2)).outcome.blocks == PAGES
        assert core.fetcher.lookup(KEYS[:20])[0].blocks == 20
        assert core.fetcher.lookup(KEYS)[0].blocks == PAGES
    second = peers.spawn()
    second.call(publish, str(runtime_dir))
    assert len(core.fetcher.lookup(KEYS)[0].owners) == 2
    first.kill()
    assert len(core.fetcher.lookup(KEYS)[0].owners) == 1
    assert fetch_in_groups(core, pages_on(api, 2)).outcome.blocks == PAGES
    second.kill()
    assert core.fetcher.lookup(KEYS)[0].blocks == 0
    core.bump_epoch()
    assert core.fetcher.lookup(KEYS)[:2][1] is MissReason.NOT_PUBLISHED
