"""What asyncio does of a fetch to a card itself, and what it leaves to a thread; host memory is the card's."""

import asyncio
import itertools
import threading
import time

import numpy as np
import pytest
from cuda_jobs import KEYS, PAGES, pages_on, publish, same_bytes, scribble

from kvmarket.calls import Calls
from kvmarket.card_fetch import TURN_S, CardFetches
from kvmarket.deadline import Deadline
from kvmarket.errors import DeadlineExceededError, InvalidInputError, MarketClosedError
from kvmarket.fetch import Fetcher
from kvmarket.report import MissReason
from kvmarket.testing.host_cuda import HostTransfer


@pytest.fixture
def completed_on(monkeypatch):
    """The threads that completed fetches."""
    threads = []
    for name in ("complete", "fetch"):
        original = getattr(Fetcher, name)

        def noted(*args, original=original):
            threads.append(threading.current_thread())
            return original(*args)

        monkeypatch.setattr(Fetcher, name, noted)
    return threads


@pytest.fixture
def fetches(open_core):
    core = open_core()
    calls = Calls(1, core.require_open)
    yield CardFetches(core, calls)
    calls.shut_down()


@pytest.fixture
def owner(peers, runtime_dir):
    owner = peers.spawn()
    owner.call(publish, str(runtime_dir))
    return owner


@pytest.fixture
def busy_card(monkeypatch):
    """A card that ends copies only after a while."""
    ends = time.monotonic() + 0.3
    original = HostTransfer.wait

    def wait(transfer):
        time.sleep(max(0.0, ends - time.monotonic()))
        original(transfer)

    monkeypatch.setattr(HostTransfer, "ended", property(lambda _: time.monotonic() >= ends))
    monkeypatch.setattr(HostTransfer, "wait", wait)


async def fetch(fetches, local, deadline=None):
    return await fetches.fetch(iter([KEYS]), local, deadline or Deadline(10))


async def test_only_over_a_connection_that_is_open_is_it_done_on_the_loop(fetches, owner, api, completed_on):
    here = threading.current_thread()
    for on_the_loop in (False, True, True):
        local = pages_on(api, 2)
        outcome = (await fetch(fetches, local)).outcome
        assert (outcome.blocks, outcome.blocks_verified, outcome.reason) == (PAGES, PAGES, MissReason.NONE)
        assert same_pages(local, api)
        assert (completed_on.pop() is here) == on_the_loop


def same_pages(local, api):
    """Tell whether block i is in page i; `publish` has it in the i-th page from the end."""
    return same_bytes(local, pages_on(api, 1), PAGES)


@pytest.fixture
def launched(monkeypatch, api):
    """(pages, whether on the event loop's thread) of every launch."""
    launches, here = [], threading.current_thread()
    original = type(api).copy

    def copy(self, source, pages, *args):
        launches.append((len(pages), threading.current_thread() is here))
        return original(self, source, pages, *args)

    monkeypatch.setattr(type(api), "copy", copy)
    return launches


IN_GROUPS = KEYS[:8], KEYS[8:16], KEYS[16:]


@pytest.mark.usefixtures("owner")
@pytest.mark.parametrize("all_here", [True, False])
async def test_so_many_blocks_are_launched_on_the_loop_and_the_rest_on_a_thread(
    fetches, api, completed_on, launched, all_here
):
    here = threading.current_thread()
    fetches._blocks_on_loop = PAGES + 1 if all_here else 16
    begun = [(8, True), (8, True), (PAGES - 16, all_here)]
    for expected, on_the_loop in (([(PAGES, False)], False), (begun, all_here), (begun, all_here)):
        local = pages_on(api, 2)
        outcome = (await fetches.fetch(iter(IN_GROUPS), local, Deadline(10))).outcome
        assert (outcome.blocks, outcome.blocks_verified, outcome.reason) == (PAGES, PAGES, MissReason.NONE)
        assert same_pages(local, api)
        assert launched == expected
        assert (completed_on.pop() is here) == on_the_loop
        launched.clear()


async def test_others_have_their_turn_between_groups(fetches, owner, api):
    await fetch(fetches, pages_on(api, 2))
    turns = []

    def groups():
        for group in (KEYS[first : first + 8] for first in range(0, PAGES, 8)):
            time.sleep(2 * TURN_S)
            turns.append("hashed")
            yield group

    running = asyncio.create_task(fetches.fetch(groups(), pages_on(api, 2), Deadline(10)))
    while not running.done():
        await asyncio.sleep(0)
        turns.append("other")
    assert (await running).outcome.blocks == PAGES
    hashed = [number for number, turn in enumerate(turns) if turn == "hashed"]
    assert len(hashed) == PAGES // 8
    assert all(after - before > 1 for before, after in itertools.pairwise(hashed[1:])), turns


async def test_what_is_not_compared_with_digests_is_left_to_a_thread(fetches, owner, api, completed_on):
    """Its launches do not wait for each other, so the loop might have to wait for one."""
    await fetch(fetches, pages_on(api, 2))
    fetches._core.fetcher.verify = "none"
    assert (await fetches.fetch(iter(IN_GROUPS), pages_on(api, 2), Deadline(10))).outcome.blocks == PAGES
    assert completed_on.pop() is not threading.current_thread()


@pytest.mark.parametrize("groups", [IN_GROUPS, [KEYS]])
async def test_closing_waits_for_a_fetch_between_its_turns(fetches, owner, api, groups):
    await fetch(fetches, pages_on(api, 2))
    api.busy = True
    running = asyncio.create_task(fetches.fetch(iter(groups), pages_on(api, 2), Deadline(10)))
    await asyncio.sleep(0)
    assert not running.done()

    def refuse():
        raise MarketClosedError("closed")

    fetches._calls._require_open = refuse
    await fetches._calls.end()
    assert running.done() or not fetches._calls._running
    assert (await running).outcome.blocks == PAGES


async def test_who_gives_up_between_turns_leaves_no_transaction_and_no_call(fetches, owner, api):
    await fetch(fetches, pages_on(api, 2))
    local = pages_on(api, 2)
    running = asyncio.create_task(fetches.fetch(iter(IN_GROUPS), local, Deadline(10)))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert fetches._core.registry._file._active == 0
    assert not fetches._calls._running
    assert not fetches._calls.full
    assert (await fetch(fetches, local)).outcome.blocks == PAGES


async def test_where_all_threads_are_busy_nothing_is_begun(fetches, owner, api):
    await fetch(fetches, pages_on(api, 2))
    busy = asyncio.create_task(fetches._calls.read(lambda: time.sleep(0.2), Deadline(10)))
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceededError):
        await fetch(fetches, pages_on(api, 2), Deadline(0.05))
    await busy
    assert (await fetch(fetches, pages_on(api, 2))).outcome.blocks == PAGES


@pytest.mark.parametrize("blocks_on_loop", [16, PAGES + 1])
async def test_a_look_up_that_fails_leaves_no_copy_and_no_transaction(fetches, owner, api, blocks_on_loop):
    fetches._blocks_on_loop = blocks_on_loop
    await fetch(fetches, pages_on(api, 2))

    def groups():
        yield KEYS[:8]
        yield KEYS[8:16]
        raise InvalidInputError("bad keys")

    local = pages_on(api, 2)
    with pytest.raises(InvalidInputError, match="bad keys"):
        await fetches.fetch(groups(), local, Deadline(10))
    assert fetches._core.registry._file._active == 0
    assert (await fetch(fetches, local)).outcome.blocks == PAGES


async def test_a_wrong_block_is_refused_on_the_loop_and_the_rest_is_sought_on_a_thread(
    fetches, owner, api, completed_on
):
    await fetch(fetches, pages_on(api, 2))
    owner.call(scribble, PAGES - 1 - 9)
    fetched = await fetch(fetches, pages_on(api, 2))
    assert (fetched.outcome.blocks, fetched.outcome.reason) == (9, MissReason.DIGEST_MISMATCH)
    assert completed_on.pop() is not threading.current_thread()


async def test_an_owner_that_dies_behind_the_copy_is_noticed_on_the_loop(fetches, owner, api, monkeypatch):
    await fetch(fetches, pages_on(api, 2))
    original = HostTransfer.wait
    monkeypatch.setattr(HostTransfer, "wait", lambda transfer: (original(transfer), owner.kill())[0])
    outcome = (await fetch(fetches, pages_on(api, 2))).outcome
    assert (outcome.blocks, outcome.reason) == (0, MissReason.OWNER_GONE)


async def test_a_busy_card_keeps_no_event_loop(fetches, owner, api, completed_on, request):
    await fetch(fetches, pages_on(api, 2))
    request.getfixturevalue("busy_card")
    local, began = pages_on(api, 2), time.monotonic()
    running = asyncio.create_task(fetch(fetches, local))
    ticks = 0
    while not running.done():
        await asyncio.sleep(0.005)
        ticks += 1
    assert ticks > 5
    assert time.monotonic() - began > 0.1
    assert (await running).outcome.blocks == PAGES
    assert completed_on[-1] is not threading.current_thread()


@pytest.mark.parametrize("how", ["cancelled", "late"])
async def test_whoever_gives_up_waits_until_the_card_has_written(fetches, owner, api, request, how):
    await fetch(fetches, pages_on(api, 2))
    local = pages_on(api, 2)
    request.getfixturevalue("busy_card")
    calls = fetches._calls
    occupied = asyncio.create_task(calls.run(calls.readers, lambda: time.sleep(0.4), Deadline(10)))
    await asyncio.sleep(0)
    running = asyncio.create_task(fetch(fetches, local, Deadline(0.05 if how == "late" else 10)))
    await asyncio.sleep(0.02)
    if how == "cancelled":
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    else:
        assert (await running).outcome.blocks in {0, PAGES}
    for memory in local.memories:
        memory[:] = 0xEE
    await occupied
    await asyncio.sleep(0.1)
    assert all(np.all(memory == 0xEE) for memory in local.memories), "the card wrote afterwards"
