"""Forked children and many threads."""

import contextlib
import os
import threading
import time
import traceback

import market_jobs as jobs
import numpy as np
import pytest

from kvmarket import (
    MarketClosedError,
    MarketConfig,
    MarketCore,
    Marketplace,
    ModelIdentity,
    Namespace,
    RegistryError,
)
from kvmarket.deadline import Deadline
from kvmarket.region.memory import SharedMemory
from kvmarket.region.pages import PagedMemory
from kvmarket.registry import block_keys
from kvmarket.testing.samples import SPEC, sample_kv, sample_tokens

TOKENS = sample_tokens(1, 10)
KV = sample_kv(TOKENS)


def in_a_fork(action):
    """Run `action` in a forked child; return what it printed, or fail with its traceback."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = "fine " + str(action())
        except BaseException:  # noqa: BLE001 - the child must end here whatever happens
            text = traceback.format_exc()
        os.write(writer, text.encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    assert text.startswith("fine "), text
    return text.removeprefix("fine ")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_forked_child_does_not_end_its_parents_ownership(config, peers):
    async with Marketplace("model", SPEC, config=config) as market:
        await market.publish(TOKENS, KV)
        in_a_fork(lambda: None)
        reader = peers.spawn()
        reader.call(jobs.open_market, config)
        report, equal = reader.call(jobs.fetch, 1, 10)
        assert equal
        assert report.blocks_adopted == 10
        assert (await market.publish(sample_tokens(2, 2), sample_kv(sample_tokens(2, 2)))).blocks == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_forked_child_opens_a_market_of_its_own(config):
    async with Marketplace("model", SPEC, config=config) as market:
        await market.publish(TOKENS, KV)

        def child():
            class State:
                pass

            state = State()
            jobs.open_market(state, config)
            report, equal = jobs.fetch(state, 1, 10)
            assert equal
            assert report.transport == "shm", "what was inherited is not the parent's memory"
            assert jobs.publish(state, 7, 3).blocks == 3
            report_own, equal = jobs.fetch(state, 7, 3)
            assert equal
            jobs.close_market(state)
            return report.blocks_adopted, report_own.blocks_adopted

        assert in_a_fork(child) == "(10, 3)"
        assert (await market.fetch(TOKENS)).report.blocks_adopted == 10
        assert not (await market.fetch(sample_tokens(7, 3))).report.hit


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_forked_child_never_reads_its_copy_of_private_memory(config):
    """The copy would not change any more, while the generations, which are shared, go on."""
    async with Marketplace("model", SPEC, config=config) as market:
        pages = KV.copy()
        publisher = market.core.publisher(market.core.lend(PagedMemory.packed(pages)))
        publisher.offer(market._keys(TOKENS, None), list(range(10)))
        publisher.flush(Deadline(5))

        def child():
            class State:
                pass

            state = State()
            jobs.open_market(state, config)
            report, _ = jobs.fetch(state, 1, 10)
            jobs.close_market(state)
            return report.reason

        assert in_a_fork(child) == "unreachable"
        assert (await market.fetch(TOKENS)).report.blocks_adopted == 10


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_a_forked_child_cannot_use_or_close_its_parents_market(config, peers):
    async with Marketplace("model", SPEC, config=config) as market:
        await market.publish(TOKENS, KV)

        def child():
            with pytest.raises(MarketClosedError, match="belongs to the parent"):
                market._keys(TOKENS, None)
            with pytest.raises(RegistryError):
                market.core.registry.epoch(market.namespace.digest)
            market.core.close()

        in_a_fork(child)
        reader = peers.spawn()
        reader.call(jobs.open_market, config)
        assert reader.call(jobs.fetch, 1, 10)[0].blocks_adopted == 10


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forks_at_any_moment(config):
    """While other threads read and write the registry: nobody hangs, and every child can open a market."""
    core = MarketCore(Namespace(ModelIdentity("model"), SPEC), config)
    memory = SharedMemory(4 * SPEC.page_bytes)
    publisher = core.publisher(core.lend(PagedMemory.packed(memory.array.reshape(4, -1)), [memory]))
    keys = block_keys([bytes([block]) * 32 for block in range(4)])
    stop, errors = threading.Event(), []

    def work():
        try:
            while not stop.is_set():
                publisher.offer(keys, [0, 1, 2, 3])
                publisher.flush(Deadline(10))
                assert core.fetcher.lookup(keys)[1] in {"none", "not_published"}
                publisher.retract([0, 1, 2, 3])
        except Exception as error:  # noqa: BLE001 - the test reports it
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()

    def child():
        with contextlib.closing(MarketCore(Namespace(ModelIdentity("model"), SPEC), config)) as own:
            return own.fetcher.lookup(keys)[0].epoch

    epochs = {in_a_fork(child) for _ in range(20)}
    stop.set()
    for thread in threads:
        thread.join()
    core.close()
    memory.close()
    assert errors == []
    assert len(epochs) == 1


def test_engines_use_the_core_from_many_threads(config):
    """Publishing, retracting, looking up and reading at once; every block adopted is right."""
    namespace = Namespace(ModelIdentity("model"), SPEC)
    core = MarketCore(namespace, config)
    num_pages, chains = 64, 8
    memory = SharedMemory(num_pages * SPEC.page_bytes)
    pages = memory.array.reshape(num_pages, -1)
    region = core.lend(PagedMemory.packed(pages), [memory])
    publisher = core.publisher(region)
    kv = {seed: sample_kv(sample_tokens(seed, 4)) for seed in range(chains)}
    keys = {seed: block_keys([bytes([seed, block]) * 16 for block in range(4)]) for seed in range(chains)}
    wrong, adopted, stop = [], [0], threading.Event()

    def write(seed):
        mine = list(range(seed * 4, seed * 4 + 4))
        for _ in range(40):
            publisher.retract(mine)
            pages[mine] = kv[seed]
            publisher.offer(keys[seed], mine)
            publisher.flush(Deadline(10))
            time.sleep(0.01)

    def read(seed):
        rng = np.random.default_rng(seed)
        out = np.empty((4, SPEC.page_bytes), np.uint8)
        while not stop.is_set():
            chain = int(rng.integers(chains))
            found, _, _ = core.fetcher.lookup(keys[chain])
            outcome = core.fetcher.read(found, PagedMemory.packed(out), np.arange(4), Deadline(5))
            adopted[0] += outcome.blocks
            if (out[: outcome.blocks] != kv[chain][: outcome.blocks]).any():
                wrong.append(chain)

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(chains)]
    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    core.close()
    core.close()
    memory.close()
    assert wrong == []
    assert adopted[0] > 100


async def test_many_marketplaces_of_one_process(config):
    markets = [Marketplace("model", SPEC, config=config) for _ in range(12)]
    for number, market in enumerate(markets):
        await market.publish(sample_tokens(number, 3), sample_kv(sample_tokens(number, 3)))
    for market in markets:
        for number in range(12):
            result = await market.fetch(sample_tokens(number, 3))
            assert (result.kv == sample_kv(sample_tokens(number, 3))).all()
    for closing in markets:
        await closing.aclose()
    assert list((config.directory / "owners").iterdir()) == []


def test_threads_of_a_process_end_with_the_market(config):
    before = set(threading.enumerate())
    core = MarketCore(Namespace(ModelIdentity("model"), SPEC), config)
    memory = SharedMemory(4 * SPEC.page_bytes)
    core.publisher(core.lend(PagedMemory.packed(memory.array.reshape(4, -1)), [memory]))
    core.close()
    memory.close()
    assert {thread for thread in set(threading.enumerate()) - before if thread.name != "kvmarket-populate"} == set()


def test_settings_of_the_environment_are_the_default(monkeypatch, config):
    monkeypatch.setenv("KVMARKET_RUNTIME_DIR", config.runtime_dir)
    monkeypatch.setenv("KVMARKET_TENANT", "acme")
    core = MarketCore(Namespace(ModelIdentity("model"), SPEC))
    assert core.config == MarketConfig(runtime_dir=config.runtime_dir, tenant="acme")
    core.close()
