"""Markets over CUDA memory, with host memory in its place: registry, choice of transport, events, digests."""

import threading
import time

import numpy as np
import pytest

from kvmarket.arena_publish import ArenaPublisher
from kvmarket.completion import completion
from kvmarket.config import MarketConfig
from kvmarket.core import MarketCore
from kvmarket.deadline import Deadline
from kvmarket.errors import InvalidInputError, MissingExtraError
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.reach import make_transports
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import PagedMemory, PageLayout, Segment
from kvmarket.registry import block_keys
from kvmarket.report import MissReason
from kvmarket.spec import KVCacheSpec
from kvmarket.testing.host_cuda import HostCuda, HostTransfer

PAGES = 40
SPEC = KVCacheSpec(2, 2, 8, "float16", 4, layout="LKNHC")
HALF = SPEC.page_bytes // 4
SPACE = Namespace(ModelIdentity("m"), SPEC, "sha256")
KEYS = block_keys([bytes([i]) * 32 for i in range(PAGES)])
LAYOUT = PageLayout(
    PAGES, tuple(Segment(layer, kv * PAGES * HALF, HALF, HALF) for layer in range(2) for kv in range(2))
)


def pages_on(api, seed):
    rng = np.random.default_rng(seed)
    arrays = [api.allocate(2 * PAGES * HALF, 0) for _ in range(2)]
    for array in arrays:
        array[:] = rng.integers(0, 256, len(array), np.uint8)
    return CudaPagedMemory.of(api, LAYOUT, arrays)


def publish(state, runtime_dir):
    import kvmarket.reach

    state.api = HostCuda()
    kvmarket.reach.load_cuda = lambda: state.api
    state.core = MarketCore(SPACE, MarketConfig(runtime_dir=runtime_dir, registry_bytes=16 << 20))
    state.pages = pages_on(state.api, 1)
    state.publisher = state.core.publisher(state.core.lend(state.pages))
    state.publisher.offer(KEYS, list(range(PAGES))[::-1])
    state.publisher.flush(Deadline(10))


def scribble(state, page):
    state.pages.views(page)[2][3] ^= 1


@pytest.fixture
def api(monkeypatch):
    api = HostCuda()
    monkeypatch.setattr("kvmarket.reach.load_cuda", lambda: api)
    yield api
    api.close()


@pytest.fixture
def open_core(api, runtime_dir):
    cores = []

    def make(**settings):
        config = MarketConfig(runtime_dir=str(runtime_dir), registry_bytes=16 << 20, **settings)
        cores.append(MarketCore(SPACE, config))
        return cores[-1]

    yield make
    for core in cores:
        core.close()


def fetch(core, local):
    found, _, _ = core.fetcher.lookup(KEYS)
    return core.fetcher.read(found, local, np.arange(found.blocks), Deadline(10))


def same_bytes(local, expected, count):
    return all(
        (a == b).all()
        for page in range(count)
        for a, b in zip(local.views(page), expected.views(PAGES - 1 - page), strict=True)
    )


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


# ---- hashing, looking up and copying at once

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
