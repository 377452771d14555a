"""The endpoint of a real process, scraped over HTTP after real work: each family against what really happened."""

import sys
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("redis", reason="the extra 'redis' is not installed")
pytest.importorskip("prometheus_client", reason="the extra 'metrics' is not installed")

import market_jobs as jobs
from prometheus_client import parser

from kvmarket import Marketplace, metrics
from kvmarket.exporter import endpoint
from kvmarket.metric_families import FAMILIES, shown_name
from kvmarket.testing.redis_server import WHERE_FROM, RedisServer, find_server, free_port
from kvmarket.testing.samples import SPEC
from kvmarket.testing.waiting import until

BLOCKS = 12
PHASES = ("hash", "lookup", "connect", "read", "verify", "total")


class Scrape(dict):
    """Samples by name and label value: ``scrape["kvmarket_misses_total", "torn"]``."""

    def __init__(self, port):
        super().__init__()
        url = f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
        self.families = {family.name: family for family in parser.text_string_to_metric_families(text)}
        for family in self.families.values():
            for sample in family.samples:
                values = [value for label, value in sample.labels.items() if label != "le"]
                if "le" not in sample.labels:
                    self[(sample.name, *values)] = sample.value

    def count(self, name, *label):
        return self.get((f"kvmarket_{name}_total", *label), 0)


def served(config):
    port = free_port()
    return replace(config, metrics=str(port)), port


def opened(peers, config):
    peer = peers.spawn()
    peer.call(jobs.open_market, config)
    return peer


def make_stale(state):
    """Make pages unreadable while their records stay, as an owner that died half-way through a withdrawal would."""
    region = state.market.core._regions[0]
    region.generations.invalidate(
        region.page_numbers([state.market._arena._publisher.page_of(key) for key in keys(state)])
    )


def keys(state):
    return state.market._keys(jobs.sample_tokens(2, BLOCKS), None)


def sweep(state):
    return state.market.core.registry.sweep()


@pytest.mark.skipif(find_server() is None, reason=WHERE_FROM)
def test_every_family_says_what_happened(peers, config, tmp_path):
    with RedisServer(tmp_path) as server:
        base = replace(config, registry=f"{server.url}?lease_s=2&timeout_s=5")
        (reading, at), (publishing, owner_at) = served(base), served(base)
        reader, publisher = opened(peers, reading), opened(peers, publishing)
        for seed in (1, 2):
            publisher.call(jobs.publish, seed, BLOCKS)
        work_and_check(reader, publisher, at, owner_at)
        fence_and_check(peers, base, reader, at)
        server.kill()
        away_and_check(reader, at)
        server.start()
        back_and_check(reader, publisher, at, owner_at)
        reader.call(jobs.close_market)
        with pytest.raises(urllib.error.URLError, match="refused"):
            Scrape(at)


def work_and_check(reader, publisher, at, owner_at):
    assert reader.call(jobs.fetch, 1, BLOCKS)[0].blocks_adopted == BLOCKS
    assert reader.call(jobs.fetch, 1, BLOCKS + 2)[0].blocks_adopted == BLOCKS
    assert reader.call(jobs.fetch, 3, 4)[0].blocks_adopted == 0
    seen = Scrape(at)
    assert {shown_name(name).removesuffix("_total") for name in FAMILIES} == set(seen.families)
    for name, family in FAMILIES.items():
        assert seen.families[shown_name(name).removesuffix("_total")].type == family.kind
    assert seen.count("fetches") == 3
    assert seen.count("tokens_asked") == (2 * BLOCKS + 2 + 4) * SPEC.block_size
    assert seen.count("tokens_adopted") == 2 * BLOCKS * SPEC.block_size
    assert seen.count("fetch_ended", "not_published") == seen.count("misses", "not_published") == 2
    assert (seen.count("lookups"), seen["kvmarket_lookup_seconds_count",]) == (3, 3)
    assert seen.count("blocks_adopted") == seen.count("blocks_verified") == 2 * BLOCKS
    for label, value in (("transport", "shm"), ("path", "mmap(memfd)")):
        assert seen.count(f"{label}_reads", value) == 2
        assert seen.count(f"{label}_bytes", value) == 2 * BLOCKS * SPEC.page_bytes
    assert seen.count("tier_blocks", "engine") + seen.count("tier_blocks", "host") == 2 * BLOCKS
    assert [seen["kvmarket_fetch_seconds_count", phase] for phase in PHASES] == [3] * len(PHASES)
    assert 0 < seen["kvmarket_fetch_seconds_sum", "read"] <= seen["kvmarket_fetch_seconds_sum", "total"]
    assert (seen["kvmarket_marketplaces",], seen["kvmarket_registry_away",]) == (1, 0)

    publisher.call(make_stale)
    assert reader.call(jobs.fetch, 2, BLOCKS)[0].blocks_adopted == 0
    seen = Scrape(at)
    assert seen.count("blocks_refused", "stale_generation") == BLOCKS
    assert seen.count("fetch_ended", "stale_generation") == 1
    assert seen.count("misses", "stale_generation") == 0, "the registry did hold it"
    until(lambda: Scrape(at).count("stale_records_removed") == BLOCKS, "stale records are removed")

    theirs = Scrape(owner_at)
    assert theirs.count("blocks_announced") == 2 * BLOCKS
    assert theirs["kvmarket_offered_blocks",] == 2 * BLOCKS
    assert theirs["kvmarket_announce_seconds_count",] == 2
    assert (theirs["kvmarket_announce_queue",], theirs["kvmarket_announce_backlog",]) == (0, 0)
    assert theirs["kvmarket_epoch",] == seen["kvmarket_epoch",] > 0
    assert publisher.call(jobs.withdraw, 2, BLOCKS) == BLOCKS
    theirs = until(lambda: (now := Scrape(owner_at)).count("blocks_withdrawn") and now, "the records are withdrawn")
    assert theirs.count("blocks_withdrawn") == theirs["kvmarket_offered_blocks",] == BLOCKS
    until(lambda: Scrape(owner_at).count("lease_renewals") >= 2, "heartbeats")


def fence_and_check(peers, base, reader, at):
    dying = opened(peers, base)
    dying.call(jobs.publish, 4, BLOCKS)
    dying.kill()
    until(lambda: reader.call(sweep), "somebody's lease ran out")
    assert Scrape(at).count("owners_fenced") == 1
    assert Scrape(at).count("leases_expired") == 0


def away_and_check(reader, at):
    assert reader.call(jobs.fetch, 1, BLOCKS)[0].blocks_adopted == 0
    seen = Scrape(at)
    assert seen["kvmarket_registry_away",] == 1
    assert seen.count("server_failures") >= 1
    assert seen.count("misses", "registry_unavailable") == 1


def back_and_check(reader, publisher, at, owner_at):
    until(lambda: Scrape(at)["kvmarket_registry_away",] == 0, "the server is back")
    theirs = until(lambda: (now := Scrape(owner_at)).count("blocks_reannounced") and now, "announced again")
    assert theirs.count("leases_expired") >= 1
    assert theirs.count("blocks_reannounced") == BLOCKS
    until(lambda: reader.call(jobs.fetch, 1, BLOCKS)[0].blocks_adopted == BLOCKS, "everything is found again")


def test_marketplaces_of_a_process_share_an_endpoint_and_the_last_one_ends_it(peers, config):
    config, port = served(config)
    peer = peers.spawn()
    assert peer.call(open_two, config) == port
    seen = Scrape(port)
    assert seen["kvmarket_marketplaces",] == 2
    assert (seen.count("blocks_announced"), seen["kvmarket_offered_blocks",]) == (2 * BLOCKS, 2 * BLOCKS)
    peer.call(close_first)
    seen = Scrape(port)
    assert seen["kvmarket_marketplaces",] == 1
    assert (seen.count("blocks_announced"), seen["kvmarket_offered_blocks",]) == (2 * BLOCKS, BLOCKS)
    peer.call(jobs.close_market)
    with pytest.raises(urllib.error.URLError, match="refused"):
        Scrape(port)


def open_two(state, config):
    jobs.open_market(state, config, "another model")
    jobs.publish(state, 1, BLOCKS)
    state.first = state.market
    jobs.open_market(state, config)
    jobs.publish(state, 1, BLOCKS)
    return endpoint("127.0.0.1", int(config.metrics)).port


def close_first(state):
    state.loop.run_until_complete(state.first.aclose())


def test_a_port_that_is_taken_costs_the_metrics_and_nothing_else(peers, config):
    config, port = served(config)
    first, second = opened(peers, config), peers.spawn()
    said = second.call(open_and_listen_to_the_log, config)
    assert said == [f'kvmarket: metrics are not served address=127.0.0.1:{port} error="Address already in use"']
    first.call(jobs.publish, 1, BLOCKS)
    assert second.call(jobs.fetch, 1, BLOCKS)[0].blocks_adopted == BLOCKS
    assert Scrape(port).count("blocks_announced") == BLOCKS
    second.call(jobs.close_market)
    assert Scrape(port)["kvmarket_marketplaces",] == 1


def open_and_listen_to_the_log(state, config):
    import logging

    said = []

    class Keep(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    logging.getLogger("kvmarket").addHandler(Keep())
    jobs.open_market(state, config)
    return said


async def test_where_nobody_exports_nothing_is_timed_and_little_is_counted(peers, config):
    """Every call of Python costs a fetch some 0.1 us, so they are counted here."""
    opened(peers, config).call(jobs.publish, 1, BLOCKS)
    async with Marketplace("model", SPEC, config=config) as market:
        await market.fetch(jobs.sample_tokens(1, BLOCKS))  # connects
        calls: Counter[str] = Counter()

        def count(frame, event, _arg):
            if event == "call" and frame.f_code.co_filename == metrics.__file__:
                calls[frame.f_code.co_name] += 1

        sys.setprofile(count)
        try:
            found = await market.fetch(jobs.sample_tokens(1, BLOCKS))
        finally:
            sys.setprofile(None)
        assert found.report.blocks_adopted == BLOCKS
        assert calls == {"add": 3, "add_read": 1}
        assert market.core.metrics.histograms() == {}
