"""Publishing and fetching between processes on a card: through the registry, with torch's tensors, in place."""

import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import gpu_jobs as jobs
import numpy as np
import pytest

from kvmarket.config import MarketConfig
from kvmarket.core import MarketCore
from kvmarket.cuda import cuda_pages
from kvmarket.deadline import Deadline
from kvmarket.errors import InvalidInputError
from kvmarket.region.pages import PagedMemory, PageLayout
from kvmarket.report import MissReason

PAGES = 40


@pytest.fixture
def publisher(peers, runtime_dir):
    peer = peers.spawn()
    peer.call(jobs.open_core, str(runtime_dir))
    peer.call(jobs.lend, PAGES, 1, timeout_s=60)
    return peer


@pytest.fixture
def reader(runtime_dir):
    cores = []

    def make(**settings):
        config = MarketConfig(runtime_dir=str(runtime_dir), registry_bytes=16 << 20, **settings)
        cores.append(MarketCore(jobs.namespace(), config))
        return cores[-1]

    yield make
    for core in cores:
        core.close()


def fetch(core, torch, count, salt=b"", local_pages=None):
    tensors = [
        torch.zeros((2, PAGES, jobs.TOKENS, jobs.HEADS, jobs.WIDTH), dtype=torch.float16, device="cuda")
        for _ in range(jobs.LAYERS)
    ]
    torch.cuda.synchronize()
    found, reason, detail = core.fetcher.lookup(jobs.keys_of(count, salt))
    local = cuda_pages(jobs.engine_layout(PAGES), tensors)
    pages = np.arange(found.blocks) if local_pages is None else local_pages[: found.blocks]
    outcome = core.fetcher.read(found, local, pages, Deadline(20))
    return tensors, outcome, (reason, detail)


def test_a_process_that_only_asks_what_is_fresh_gets_no_context(publisher, peers, runtime_dir):
    publisher.call(jobs.offer, list(range(PAGES)))
    scheduler = peers.spawn()
    fresh, contexts = scheduler.call(jobs.ask_what_is_fresh, str(runtime_dir), PAGES, timeout_s=60)
    assert (fresh, any(contexts)) == (PAGES, False)
    assert scheduler.call(jobs.fetch_here, PAGES, 1, timeout_s=60) == ("kernel(cuda_ipc)", PAGES, True)
    assert scheduler.call(jobs.contexts)[0], "the question can be answered with yes"


@pytest.mark.parametrize("transport", ["auto", "cuda_ipc"])
def test_blocks_of_torch_tensors_are_fetched_in_place(publisher, reader, torch, transport):
    pages = np.random.default_rng(0).permutation(PAGES)
    publisher.call(jobs.offer, pages.tolist())
    core = reader(transport=transport)
    tensors, outcome, _ = fetch(core, torch, PAGES)
    assert (outcome.blocks, outcome.reason, outcome.detail) == (PAGES, MissReason.NONE, "")
    expected = jobs.engine_tensors(torch, PAGES, 1)
    order = torch.tensor(pages, device="cuda")
    for found, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(found, wanted[:, order])
    assert outcome.transfers[0].transport == "cuda_ipc"
    assert outcome.transfers[0].path == "kernel(cuda_ipc)"
    assert outcome.blocks_verified == PAGES


def test_every_page_is_verified_when_asked(publisher, reader, torch):
    publisher.call(jobs.offer, list(range(PAGES)))
    _, outcome, _ = fetch(reader(verify="full"), torch, PAGES)
    assert (outcome.blocks, outcome.blocks_verified) == (PAGES, PAGES)


def test_bytes_changed_behind_the_owners_back_are_refused(publisher, reader, torch):
    publisher.call(jobs.offer, list(range(PAGES)))
    publisher.call(jobs.scribble, 5)
    _, outcome, _ = fetch(reader(verify="full"), torch, PAGES)
    assert (outcome.blocks, outcome.reason) == (5, MissReason.DIGEST_MISMATCH)


def test_pages_are_readable_only_behind_their_kernels(publisher, reader, torch):
    pages = [3, 1, 4]
    ended = publisher.call(jobs.publish_behind_a_long_kernel, pages, 2_000_000_000)
    assert not ended, "the kernel was over at once: the test shows nothing"
    core = reader()
    _, outcome, _ = fetch(core, torch, 3, b"late")
    generations = publisher.call(jobs.generations)
    assert not publisher.call(jobs.stream_ended), "too slow to show anything"
    assert outcome.blocks == 0
    assert all(generations[pages] % 2 == 1)
    publisher.call(jobs.flush, timeout_s=40)
    assert publisher.call(jobs.stream_ended)
    tensors, outcome, _ = fetch(core, torch, 3, b"late")
    assert outcome.blocks == 3
    assert all(bool((tensor[:, :3] == 7).all()) for tensor in tensors)


def test_pages_retracted_before_their_kernel_ended_stay_unreadable(publisher, reader, torch):
    publisher.call(jobs.publish_behind_a_long_kernel, [3, 1, 4], 1_000_000_000)
    publisher.call(jobs.retract, [1])
    publisher.call(jobs.flush, timeout_s=40)
    generations = publisher.call(jobs.generations)
    assert (generations[[3, 1, 4]] % 2).tolist() == [0, 1, 0]
    _, outcome, _ = fetch(reader(), torch, 3, b"late")
    assert outcome.blocks == 1


def test_the_owner_may_die_at_any_moment(publisher, reader, torch):
    publisher.call(jobs.offer, list(range(PAGES)))
    core = reader()
    expected = jobs.engine_tensors(torch, PAGES, 1)
    blocks = []
    for number in range(30):
        if number == 10:
            publisher.kill()
        tensors, outcome, _ = fetch(core, torch, PAGES)
        blocks.append(outcome.blocks)
        for found, wanted in zip(tensors, expected, strict=True):
            assert torch.equal(found[:, : outcome.blocks], wanted[:, : outcome.blocks])
    assert blocks[:10] == [PAGES] * 10
    assert blocks[10:] == [0] * 20
    assert bool((torch.ones(1000, device="cuda") == 1).all()), "this process's card still works"


def test_a_host_target_is_a_miss_that_says_why(publisher, reader):
    publisher.call(jobs.offer, [0, 1])
    core = reader()
    found, _, _ = core.fetcher.lookup(jobs.keys_of(2))
    local = PagedMemory.packed(np.zeros((2, jobs.SPEC.page_bytes), np.uint8))
    outcome = core.fetcher.read(found, local, np.arange(2), Deadline(5))
    assert (outcome.blocks, outcome.reason) == (0, MissReason.UNREACHABLE)
    assert "cuda" in outcome.detail


def test_cuda_memory_is_not_lent_over_shared_memory(reader, torch):
    core = reader(transport="shm")
    tensors = jobs.engine_tensors(torch, 4, 1)
    with pytest.raises(InvalidInputError, match="KVMARKET_TRANSPORT"):
        core.lend(cuda_pages(jobs.engine_layout(4), tensors))


def test_two_markets_of_one_process_share_without_a_handle(reader, torch):
    owner, core = reader(), reader()
    tensors = jobs.engine_tensors(torch, PAGES, 2)
    publisher = owner.publisher(owner.lend(cuda_pages(jobs.engine_layout(PAGES), tensors)))
    publisher.offer(jobs.keys_of(PAGES), list(range(PAGES)), after=torch.cuda.current_stream())
    publisher.flush(Deadline(20))
    found, outcome, _ = fetch(core, torch, PAGES)
    assert outcome.blocks == PAGES
    assert outcome.transfers[0].path == "kernel(same process)"
    assert all(torch.equal(a, b) for a, b in zip(found, tensors, strict=True))


class Overwritten:
    """Reads pages that somebody overwrites all the time, and counts what came of it. Generations alone protect it."""

    def __init__(self, torch, runtime_dir):
        self.torch, spec = torch, jobs.stress_spec()
        config = MarketConfig(runtime_dir=str(runtime_dir), registry_bytes=16 << 20, verify="none")
        self.core = MarketCore(jobs.namespace(spec), config)
        self.keys, self.rng = jobs.keys_of(jobs.STRESS_PAGES), np.random.default_rng(2)
        self.out = torch.zeros((jobs.STRESS_PAGES, jobs.STRESS_WORDS), dtype=torch.int32, device="cuda")
        torch.cuda.synchronize()
        self.local = cuda_pages(PageLayout.packed(jobs.STRESS_PAGES, spec.page_bytes), [self.out])
        self.fetches = self.adopted = self.wrong = self.mixed = 0

    def fetch(self):
        chosen = self.rng.permutation(jobs.STRESS_PAGES)[: int(self.rng.integers(1, jobs.STRESS_PAGES + 1))]
        found, _, _ = self.core.fetcher.lookup([self.keys[page] for page in chosen])
        local = self.local
        if self.fetches % 2:  # the copy starts up to 3 ms behind the first look at the generations
            self.torch.cuda._sleep(int(self.rng.integers(1, 5_000_000)))
            local = replace(local, after=self.torch.cuda.current_stream().record_event())
        blocks = self.core.fetcher.read(found, local, np.arange(found.blocks), Deadline(5)).blocks
        low, high = self.out.amin(1), self.out.amax(1)
        uniform, first = (low == high).cpu().numpy(), low.cpu().numpy()
        self.wrong += int((~uniform[:blocks]).sum() + (first[:blocks] >> 16 != chosen[:blocks]).sum())
        self.mixed += int((~uniform[blocks : found.blocks]).sum())
        self.adopted += blocks
        self.fetches += 1
        self.out.fill_(-1)  # what is found there next time was read then
        self.torch.cuda.current_stream().synchronize()

    def run(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end or (not self.adopted and time.monotonic() < end + 20):
            self.fetch()

    def close(self):
        counted = self.core.metrics.snapshot()
        self.core.close()
        self.torn = counted.get("blocks_refused{reason=torn}", 0)
        self.stale = counted.get("blocks_refused{reason=stale_generation}", 0)

    def __str__(self):
        return (
            f"{self.fetches} fetches, {self.adopted} pages adopted, {self.wrong} of them wrong, {self.torn:.0f} torn "
            f"and {self.stale:.0f} stale refused, {self.mixed} pages not adopted held mixed bytes"
        )


@pytest.mark.timeout(240)
def test_pages_overwritten_while_they_are_read_are_never_adopted_torn(peers, runtime_dir, torch, request, capsys):
    """Two processes, for `--stress-s` seconds. Their kernels take turns on the card."""
    seconds = request.config.getoption("--stress-s")
    writer = peers.spawn()
    writer.start(jobs.overwrite, str(runtime_dir), seconds)
    reader = Overwritten(torch, runtime_dir)
    reader.run(seconds)
    versions = writer.result(timeout_s=60)
    reader.close()
    with capsys.disabled():
        print(f"\nstress, two processes: {seconds:.0f} s, {versions} rewrites, {reader}")
    assert reader.wrong == 0
    assert reader.adopted > 1000
    assert reader.torn > 0


@pytest.mark.timeout(240)
def test_kernels_that_overwrite_during_the_copy_are_caught(runtime_dir, torch, request, capsys):
    """One process, for a quarter of `--stress-s`: kernels of two streams of one context do run at the same time."""
    seconds, versions = request.config.getoption("--stress-s") / 4, []
    work = partial(jobs.overwrite, SimpleNamespace(), str(runtime_dir), seconds)
    writer = threading.Thread(target=lambda: versions.append(work()))
    writer.start()
    reader = Overwritten(torch, runtime_dir)
    reader.run(seconds)
    writer.join()
    reader.close()
    with capsys.disabled():
        print(f"\nstress, one process: {seconds:.0f} s, {versions} rewrites, {reader}")
    assert reader.wrong == 0
    assert reader.adopted > 100
    assert reader.torn > 0
    assert reader.mixed > 0, "no copy met a kernel that overwrites: the test shows nothing"


@pytest.mark.parametrize("blocks", [1, 30, PAGES])
async def test_the_facade_fetches_into_a_tensor_on_the_card(reader, runtime_dir, torch, blocks):
    """Whatever part of the prompt is published; the rest of the tensor is not said to be filled."""
    from kvmarket import Marketplace
    from kvmarket.identity import ModelIdentity
    from kvmarket.prefix_keys import PrefixKeys

    owner, tokens = reader(), np.arange(PAGES * jobs.TOKENS + 3)
    keys = PrefixKeys(jobs.namespace().digest, jobs.TOKENS, "sha256").of(tokens.astype("<u4"))
    tensors = jobs.engine_tensors(torch, PAGES, 3)
    publisher = owner.publisher(owner.lend(cuda_pages(jobs.engine_layout(PAGES), tensors)))
    publisher.offer(keys[:blocks], list(range(blocks)), after=torch.cuda.current_stream())
    publisher.flush(Deadline(20))
    config = MarketConfig(runtime_dir=str(runtime_dir), registry_bytes=16 << 20)
    out = torch.zeros((PAGES, jobs.SPEC.page_bytes), dtype=torch.uint8, device="cuda")
    async with Marketplace(ModelIdentity("gpu-test"), jobs.SPEC, config=config) as market:
        for _ in range(2):
            result = await market.fetch(tokens, out=out)
            report = result.report
            assert (report.blocks_adopted, report.blocks_verified) == (blocks, blocks)
            assert report.reason is (MissReason.NONE if blocks == PAGES else MissReason.NOT_PUBLISHED)
            assert report.first_missing_block == (None if blocks == PAGES else blocks)
        assert (await market.fetch(tokens + 1, out=out)).report.reason is MissReason.NOT_PUBLISHED
        with pytest.raises(InvalidInputError, match="full blocks"):
            await market.fetch(tokens, out=out[:1])
    expected = torch.stack([tensor.view(torch.uint8).view(2, PAGES, -1) for tensor in tensors])
    expected = expected.permute(2, 0, 1, 3).reshape(PAGES, -1)
    assert torch.equal(out[:blocks], expected[:blocks])
