"""Markets over CUDA memory, with host memory in its place: registry, choice of transport, events, digests."""

import threading
import time

import numpy as np
import pytest
from cuda_jobs import KEYS, PAGES, SPEC, fetch, pages_on, publish, same_bytes, scribble

from kvmarket.arena_publish import ArenaPublisher
from kvmarket.completion import completion
from kvmarket.config import MarketConfig
from kvmarket.deadline import Deadline
from kvmarket.digest import page_digests
from kvmarket.errors import DeadlineExceededError, InvalidInputError, MarketClosedError, MissingExtraError
from kvmarket.publish import QUEUE_MAX
from kvmarket.reach import make_transports
from kvmarket.region.pages import PagedMemory
from kvmarket.report import MissReason


@pytest.mark.parametrize(
    ("settings", "verified"),
    [
        ({}, {PAGES}),
        ({"transport": "cuda_ipc", "verify": "full"}, {PAGES}),
        ({"verify": "sampled"}, {2, 3}),
        ({"verify": "none"}, {0}),
    ],
)
def test_blocks_travel_between_processes(  # noqa: PLR0917 - fixtures
    peers, runtime_dir, api, open_core, settings, verified
):
    peers.spawn().call(publish, str(runtime_dir))
    local, expected = pages_on(api, 2), pages_on(api, 1)
    outcome = fetch(open_core(**settings), local)
    assert (outcome.blocks, outcome.reason, outcome.detail) == (PAGES, MissReason.NONE, "")
    assert same_bytes(local, expected, PAGES)
    assert outcome.transfers[0].path == "kernel(cuda_ipc)"
    assert outcome.blocks_verified in verified


def test_a_process_that_only_asks_what_is_fresh_maps_nothing(peers, runtime_dir, api, open_core, monkeypatch):
    peer = peers.spawn()
    peer.call(publish, str(runtime_dir))
    core, opened = open_core(), []
    original = api.open
    monkeypatch.setattr(api, "open", lambda *args: opened.append(args) or original(*args))
    found, _, _ = core.fetcher.lookup(KEYS)
    assert core.fetcher.fresh(found).blocks == PAGES
    assert opened == []
    assert fetch(core, pages_on(api, 2)).blocks == PAGES
    assert opened


def test_bytes_changed_behind_the_owners_back_are_refused(peers, runtime_dir, api, open_core):
    peer = peers.spawn()
    peer.call(publish, str(runtime_dir))
    peer.call(scribble, PAGES - 1 - 5)
    outcome = fetch(open_core(verify="full"), pages_on(api, 2))
    assert (outcome.blocks, outcome.reason) == (5, MissReason.DIGEST_MISMATCH)


def test_a_host_target_is_a_miss_that_says_why(peers, runtime_dir, open_core):
    peers.spawn().call(publish, str(runtime_dir))
    local = PagedMemory.packed(np.zeros((PAGES, SPEC.page_bytes), np.uint8))
    outcome = fetch(open_core(), local)
    assert (outcome.blocks, outcome.reason) == (0, MissReason.UNREACHABLE)
    assert "cuda memory only" in outcome.detail


def test_markets_of_one_process_share_without_a_handle(api, open_core):
    owner = open_core()
    pages = pages_on(api, 1)
    publisher = owner.publisher(owner.lend(pages))
    publisher.offer(KEYS, list(range(PAGES))[::-1])
    publisher.flush(Deadline(10))
    local = pages_on(api, 2)
    outcome = fetch(open_core(), local)
    assert outcome.blocks == PAGES
    assert outcome.transfers[0].path == "kernel(same process)"
    assert same_bytes(local, pages, PAGES)


@pytest.mark.parametrize("transport", ["shm", "inproc"])
def test_cuda_memory_needs_a_transport_that_reads_it(api, open_core, transport):
    with pytest.raises(InvalidInputError, match="use auto, cuda_ipc or ucx"):
        open_core(transport=transport).lend(pages_on(api, 1))


def test_asking_for_cuda_by_name_without_cupy_names_the_extra(monkeypatch):
    def missing():
        raise MissingExtraError("cupy", "cuda13")

    monkeypatch.setattr("kvmarket.reach.load_cuda", missing)
    with pytest.raises(MissingExtraError, match=r"kvmarket\[cuda13\]"):
        make_transports(MarketConfig(transport="cuda_ipc"), {})
    assert [transport.scheme for transport in make_transports(MarketConfig(), {})][:3] == ["inproc", "shm", "cuda_ipc"]


class Kernel:
    """Ends when told to."""

    def __init__(self):
        self.ended = threading.Event()

    def query(self):
        return self.ended.is_set()


@pytest.fixture
def offered(api, open_core):
    core = open_core()
    region = core.lend(pages_on(api, 1))
    return region, core.publisher(region), core


def generations(region, pages):
    return region.generations.values[list(pages)].tolist()


def test_pages_are_readable_only_behind_their_kernels(api, offered):
    region, publisher, core = offered
    kernel = Kernel()
    announced = publisher.offer(KEYS[:3], [0, 1, 2], after=kernel, wait=True)
    time.sleep(0.05)
    assert [value % 2 for value in generations(region, range(3))] == [1, 1, 1]
    assert not announced.done()
    assert fetch(core, pages_on(api, 2)).blocks == 0
    kernel.ended.set()
    assert announced.result(5) == 3
    assert fetch(core, pages_on(api, 2)).blocks == 3


def test_retracted_pages_stay_unreadable_when_their_kernel_ends(offered):
    region, publisher, _ = offered
    kernel = Kernel()
    announced = publisher.offer(KEYS[:3], [0, 1, 2], after=kernel, wait=True)
    publisher.retract([1])
    kernel.ended.set()
    assert announced.result(5) == 2
    assert [value % 2 for value in generations(region, range(3))] == [0, 1, 0]


def test_an_older_kernel_does_not_make_a_page_readable_that_a_newer_one_fills(offered):
    region, publisher, _ = offered
    older, newer = Kernel(), Kernel()
    first = publisher.offer(KEYS[:1], [0], after=older, wait=True)
    publisher.retract([0])
    second = publisher.offer(KEYS[:1], [0], after=newer, wait=True)
    older.ended.set()
    assert first.result(5) == 0
    assert generations(region, [0])[0] % 2 == 1
    newer.ended.set()
    assert second.result(5) == 1
    assert generations(region, [0])[0] % 2 == 0


def test_a_page_offered_anew_without_a_kernel_keeps_that_generation(offered):
    region, publisher, _ = offered
    kernel = Kernel()
    publisher.offer(KEYS[:1], [0], after=kernel)
    publisher.retract([0])
    publisher.offer(KEYS[:1], [0])
    before = generations(region, [0])
    kernel.ended.set()
    publisher.flush(Deadline(5))
    assert before[0] % 2 == 0
    assert generations(region, [0]) == before


def test_blocks_ahead_of_a_kernel_do_not_wait_for_it(offered):
    _, publisher, _ = offered
    kernel = Kernel()
    ahead = publisher.offer(KEYS[:1], [0], wait=True)
    behind = publisher.offer(KEYS[1:2], [1], after=kernel, wait=True)
    assert ahead.result(5) == 1
    assert not behind.done()
    kernel.ended.set()
    assert behind.result(5) == 1


def test_blocks_behind_a_kernel_do_not_wait_for_it(offered):
    _, publisher, _ = offered
    kernel = Kernel()
    slow = publisher.offer(KEYS[:1], [0], after=kernel, wait=True)
    assert publisher.offer(KEYS[1:2], [1], after=lambda: True, wait=True).result(5) == 1
    assert publisher.offer(KEYS[2:3], [2], wait=True).result(5) == 1
    assert not slow.done()
    kernel.ended.set()
    assert slow.result(5) == 1


def test_a_flush_waits_for_kernels_of_what_was_offered_before_it_and_for_no_other(offered):
    _, publisher, _ = offered
    before, behind = Kernel(), Kernel()
    slow = publisher.offer(KEYS[:1], [0], after=before, wait=True)
    flushed = publisher.offer([], [], wait=True)
    publisher.offer(KEYS[1:2], [1], after=behind)
    time.sleep(0.05)
    assert not flushed.done()
    before.ended.set()
    flushed.result(5)
    assert slow.result(0) == 1


def test_a_delayed_block_is_neither_readable_nor_asked_about_before_its_time(offered):
    region, publisher, _ = offered
    asked = []
    began = time.monotonic()
    delayed = publisher.offer(KEYS[:1], [0], after=lambda: not asked.append(time.monotonic()), delay_s=0.2, wait=True)
    assert publisher.offer(KEYS[1:2], [1], after=lambda: True, wait=True).result(5) == 1
    assert time.monotonic() - began < 0.2
    assert generations(region, [0])[0] % 2 == 1
    assert delayed.result(5) == 1
    assert len(asked) == 1
    assert asked[0] - began >= 0.2


def test_known_digests_are_announced_for_the_pages_that_are_left(offered, api):
    """They are those of what a reader verified; a page retracted meanwhile takes its own along, and no other's."""
    region, publisher, core = offered
    kernel = Kernel()
    digests = page_digests(region.pages, np.arange(3))
    announced = publisher.offer(
        KEYS[:3], [0, 1, 2], after=kernel, digests=[digests[0], bytes(16), digests[2]], wait=True
    )
    publisher.retract([1])
    assert publisher.offer(KEYS[1:2], [1], wait=True).result(5) == 1
    kernel.ended.set()
    assert announced.result(5) == 2
    assert fetch(core, pages_on(api, 3)).blocks == 3


def test_a_wrong_digest_is_refused_by_readers(offered, api):
    region, publisher, core = offered
    digests = page_digests(region.pages, np.arange(3))
    swapped = [digests[0], digests[2], digests[1]]
    assert publisher.offer(KEYS[:3], [0, 1, 2], after=lambda: True, digests=swapped, wait=True).result(5) == 3
    assert fetch(core, pages_on(api, 3)).blocks == 1


def test_a_kernel_that_fails_publishes_nothing_and_the_block_may_come_again(offered):
    region, publisher, _ = offered

    def failed():
        raise RuntimeError("an illegal memory access was encountered")

    assert publisher.offer(KEYS[:1], [0], after=failed, wait=True).result(5) == 0
    assert generations(region, [0])[0] % 2 == 1
    assert publisher.page_of(KEYS[0]) is None
    assert publisher.offer(KEYS[:1], [0], wait=True).result(5) == 1


def test_closing_does_not_wait_for_a_kernel_that_never_ends(offered):
    region, publisher, core = offered
    publisher.offer(KEYS[:1], [0], after=Kernel())
    began = time.monotonic()
    core.close()
    assert time.monotonic() - began < 3
    assert generations(region, [0])[0] % 2 == 1


def test_closing_answers_everybody_when_as_much_waits_as_may(offered):
    """What waits for kernels is bounded, and so is the queue behind it; nobody is left waiting for either."""
    _, publisher, core = offered
    kernel = Kernel()
    waiting = [publisher.offer(KEYS[:1], [0], after=kernel, wait=True)]
    for _ in range(2 * QUEUE_MAX):
        publisher.retract([0])
        waiting.append(publisher.offer(KEYS[:1], [0], after=kernel, wait=True))
    assert publisher.waiting["announce_queue"] <= 2 * QUEUE_MAX
    core.close()
    for future in waiting:
        assert isinstance(future.exception(5), DeadlineExceededError | MarketClosedError | None)


class Event:
    """cupy's."""

    done = True

    def synchronize(self):
        raise AssertionError("nobody should wait here")


class CupyStream:
    done = False

    def launch_host_func(self):
        raise AssertionError

    def record(self):
        return Event()


class TorchStream:
    def query(self):
        return False

    def record_event(self):
        kernel = Kernel()
        kernel.ended.set()
        return kernel


@pytest.mark.parametrize("after", [Event(), CupyStream(), TorchStream(), lambda: True])
def test_streams_mean_the_work_that_they_hold_now(after):
    assert completion(after)() is True


def test_other_things_are_no_events():
    with pytest.raises(InvalidInputError, match="int"):
        completion(3)


def test_pages_of_a_card_are_published_by_copy(api, open_core):
    owner, reader = open_core(arena_bytes=PAGES * SPEC.page_bytes), open_core()
    pages, local = pages_on(api, 1), pages_on(api, 2)
    arena = ArenaPublisher(owner, like=pages)
    new, announced = arena.put(KEYS[:30], pages)
    assert new == announced.result(10) == arena.offered(KEYS) == 30
    assert arena.put(KEYS[:30], pages)[0] == 0
    kept = pages_on(api, 1)
    for memory in pages.memories:
        memory[:] = 0  # the caller's again
    outcome = fetch(reader, local)
    assert (outcome.blocks, outcome.blocks_verified) == (30, 30)
    assert outcome.transfers[0].transport == "cuda_ipc"
    for page in range(30):
        assert all((a == b).all() for a, b in zip(local.views(page), kept.views(page), strict=True))
    assert arena.withdraw(KEYS) == 30
    assert fetch(reader, local).blocks == 0
    with pytest.raises(InvalidInputError, match="host"):
        arena.put(KEYS[:1], PagedMemory.packed(np.zeros((1, SPEC.page_bytes), np.uint8)))
    arena.close()


def test_digests_of_a_kind_that_cannot_be_compared_are_no_digests(api, open_core, monkeypatch):
    monkeypatch.setattr("kvmarket.core.default_digest", lambda kind: f"{kind}-of-tomorrow")
    owner = open_core()
    publisher = owner.publisher(owner.lend(pages_on(api, 1)))
    publisher.offer(KEYS, list(range(PAGES)))
    publisher.flush(Deadline(10))
    outcome = fetch(open_core(), pages_on(api, 2))
    assert (outcome.blocks, outcome.reason) == (0, MissReason.UNVERIFIED)
    assert "cuda-of-tomorrow" in outcome.detail
    outcome = fetch(open_core(verify="sampled"), pages_on(api, 2))
    assert (outcome.blocks, outcome.blocks_verified) == (PAGES, 0)
