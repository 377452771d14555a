"""What the vLLM tests do to an engine from inside its process, by `Replica.call`: inspection and faults. Tests only."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from kvmarket.deadline import Deadline
from kvmarket_vllm.inspect import roles

INDEX_AT = slice(8, 12)  # where a registry key holds the index of its block


def flush(engine):
    """Wait until the registry has taken everything this replica offers."""
    market = roles(engine)[0].market
    if market is not None:
        market.publisher.flush(Deadline(10.0))


def flush_kept(engine):
    """Wait until the registry (and the disk) has taken everything this replica keeps; returns what its arena counts."""
    kept = roles(engine)[0].market.kept
    kept.arena._publisher.flush(Deadline(10.0))
    if kept._disk is not None:
        assert kept._disk.flush(Deadline(10.0))
    return kept.core.metrics.snapshot()


def promoted(engine, *, blocks):
    """Wait until so many blocks have come back from disk and are announced; return how many it were."""
    kept = None
    end = time.monotonic() + 10
    while time.monotonic() < end:
        market = roles(engine)[0].market
        kept = market.kept if market is not None else None
        if kept is not None and kept.core.metrics.snapshot().get("disk_blocks_promoted", 0) >= blocks:
            kept.arena._publisher.flush(Deadline(10.0))
            break
        time.sleep(0.01)
    return kept.core.metrics.snapshot().get("disk_blocks_promoted", 0) if kept is not None else 0


def offered(engine):
    """Return how many blocks this replica offers to peers right now."""
    market = roles(engine)[0].market
    return len(market.publisher._page_of) if market is not None else 0


def readable(engine):
    """Return how many pages peers may read right now."""
    market = roles(engine)[0].market
    values = market.region.generations.values
    return int(((values & np.uint64(1) == 0) & (values > 0)).sum())


def corrupt(engine, *, index):
    """Change the KV of block `index` of the prompt offered last, and nothing else: its generation and record stay."""
    corrupt_market(roles(engine)[0].market, index)


def corrupt_market(market, index):
    """`corrupt`, for the market of one rank."""
    pages = [page for key, page in market.publisher._page_of.items() if int.from_bytes(key[INDEX_AT], "big") == index]
    for view in market.region.pages.views(pages[-1]):
        view.view(np.float32)[:] *= -1.0


def tear_copies(engine, *, every, blind=False):
    """Let the owner reuse pages in the middle of every `every`-th copy this replica makes of them.

    The copy stops half-way until the owner's engine has taken one of the pages back and had a moment to write to it.
    With `blind`, the look at the generations after the copy is made to see what the first one saw.
    """
    from kvmarket.transport import mapped

    copy_pages, read_group = mapped.copy_pages, mapped.MappedConnection._read_group
    counts = {"copies": 0, "torn": 0}
    engine.torn_copies = counts
    live = [None]

    def copy_slowly(source, source_pages, target, target_pages):
        half = len(source_pages) // 2
        copy_pages(source, source_pages[:half], target, target_pages[:half])
        counts["copies"] += 1
        if counts["copies"] % every == 0:
            counts["torn"] += _wait_for_reuse(live[0], source_pages)
        copy_pages(source, source_pages[half:], target, target_pages[half:])

    def read_known_group(self, *arguments):
        live[0] = self._generations
        if blind:
            self._generations = live[0].copy()
        try:
            return read_group(self, *arguments)
        finally:
            self._generations = live[0]

    mapped.copy_pages, mapped.MappedConnection._read_group = copy_slowly, read_known_group


def _wait_for_reuse(generations, pages):
    before = generations[pages].copy()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        if (generations[pages] != before).any():
            time.sleep(0.01)  # the page is unreadable; now it is also written to
            return 1
        time.sleep(0.0005)
    return 0


def torn_copies(engine):
    """Return what `tear_copies` has done."""
    return engine.torn_copies


def kill_owner(engine, *, pid, where, meeting, party):
    """Have the next load of this replica kill the owner, once: in the middle of its ``copy``, or before its ``read``.

    `party` replicas do so together: each waits in `meeting`, a directory, until all have come that far.
    """
    from kvmarket.transport import mapped

    owner = os.pidfd_open(pid)
    fetcher = roles(engine)[0].market.core.fetcher
    holder, name = (mapped, "copy_pages") if where == "copy" else (fetcher, "read")
    original = getattr(holder, name)
    once = threading.Lock()  # several threads may copy

    def kill():
        if not once.acquire(blocking=False):
            return
        began = time.monotonic()
        Path(meeting, str(os.getpid())).touch()
        while len([*Path(meeting).iterdir()]) < party and time.monotonic() < began + 10.0:
            time.sleep(0.0005)
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(owner, signal.SIGKILL)
        dead, _, _ = select.select([owner], [], [], 10.0)
        os.close(owner)
        engine.kvmarket_killing = (bool(dead), time.monotonic() - began)

    def copy_half(source, source_pages, target, target_pages):
        half = len(source_pages) // 2
        original(source, source_pages[:half], target, target_pages[:half])
        mapped.copy_pages = original
        kill()
        original(source, source_pages[half:], target, target_pages[half:])

    def read_after(*arguments):
        fetcher.read = original
        kill()
        return original(*arguments)

    engine.kvmarket_killing = (False, 0.0)
    setattr(holder, name, copy_half if where == "copy" else read_after)


def killing(engine):
    """Return whether `kill_owner` has killed, and the seconds that took away from the request."""
    return engine.kvmarket_killing


def mapped_peers(engine):
    """Return the inodes of peers' KV caches that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[4] for line in lines if "memfd:kvmarket:vllm-kv-cache" in line and " r--s " in line})


def reset_during_copy(engine):
    """Have everybody told to forget, once, while this replica copies what it found before."""
    from kvmarket.transport import mapped

    core, copy_pages = roles(engine)[0].market.core, mapped.copy_pages
    once = threading.Lock()  # several threads may copy

    def copy_then_reset(*arguments):
        mapped.copy_pages = copy_pages
        copy_pages(*arguments)
        if once.acquire(blocking=False):
            core.registry.bump_epoch(core.namespace.digest)

    mapped.copy_pages = copy_then_reset


def abort_while_loading(engine, *, prompt, busy, whom):
    """Abort a request while its load is on the loader's thread (``leader``), or one that waits for it (``follower``).

    Returns the tokens of the requests that went on, by name, and whether the aborted one's blocks were held until its
    load was over and free afterwards.
    """
    fetcher = roles(engine)[0].market.core.fetcher
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    entered, release, read = threading.Event(), threading.Event(), fetcher.read
    answers = {}

    def step_until(reached):
        end = time.monotonic() + 20.0
        while not reached():
            assert time.monotonic() < end, f"{whom}: stuck with {list(scheduler.requests)}"
            answers.update({out.request_id: out.outputs[0].token_ids for out in engine.step() if out.finished})

    def read_when_told(*arguments):
        entered.set()
        release.wait(20.0)
        return read(*arguments)

    def add(name, tokens, max_tokens):
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        return engine.add_request(name, {"prompt_token_ids": tokens}, params) or name

    fetcher.read = read_when_told
    try:
        add("busy", busy, 400)  # decodes meanwhile: loads of a busy engine run on the thread
        step_until(lambda: scheduler.running)
        ids = {"leader": add("leader", prompt, 8)}
        step_until(entered.is_set)
        ids["follower"] = add("follower", prompt, 8)
        engine.step()
        free = pool.get_num_free_blocks()
        engine.abort_request([whom])
        for _ in range(3):
            engine.step()
        held = ids[whom] in scheduler.requests and pool.get_num_free_blocks() <= free
        release.set()
        step_until(lambda: ids[whom] not in scheduler.requests)
        engine.abort_request(["busy"])
        step_until(lambda: not scheduler.has_requests())
    finally:
        release.set()
        fetcher.read = read
    everything_free = pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # the null block is never free
    return {name: tuple(tokens) for name, tokens in answers.items()}, held, everything_free


def hold_registry(engine, *, seconds):
    """Hold the registry's write lock, as a process does that is stopped in the middle of a write."""
    file = roles(engine)[0].market.core.registry._file
    held = threading.Event()

    def hold():
        with file.write():
            held.set()
            time.sleep(seconds)

    threading.Thread(target=hold, daemon=True).start()
    assert held.wait(5.0)
