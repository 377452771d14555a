"""Two readers against a writer that overwrites the very pages they read, with generations as the only protection."""

from dataclasses import replace

import market_jobs as jobs
import numpy as np

SECONDS = 3.0
ROUNDS = 8  # at most: on a busy machine one may show too little
ENOUGH_PAGES = 100


def test_no_reader_ever_adopts_other_bytes(peers, config, tmp_path):
    board = tmp_path / "newest"
    board.write_bytes(bytes(8))
    config = replace(config, verify="none", fetch_deadline_s=2.0)
    writer, *readers = (peers.spawn() for _ in range(3))
    for peer in (writer, *readers):
        peer.call(jobs.open_market, config, "model", jobs.TORN_SPEC)
    versions = adopted = torn = 0
    for _ in range(ROUNDS):
        writer.start(jobs.republish_for, SECONDS + 0.3, str(board))
        for reader in readers:
            reader.start(jobs.read_versions_for, SECONDS, str(board))
        results = [reader.result(timeout_s=30) for reader in readers]
        versions += writer.result(timeout_s=30)
        adopted += sum(result[0] for result in results)
        wrong = sum(result[1] for result in results)
        torn = sum(result[2].get("blocks_refused{reason=torn}", 0) for result in results)  # since the market opened
        stale = sum(result[2].get("blocks_refused{reason=stale_generation}", 0) for result in results)
        longest_s = max(result[3] for result in results)
        print(f"{versions} versions, {adopted} adopted, {wrong} wrong, {torn} torn, {stale} stale, {longest_s:.3f} s")
        assert wrong == 0
        assert longest_s < config.fetch_deadline_s + 1.0
        if adopted > ENOUGH_PAGES and torn:
            break
    assert adopted > ENOUGH_PAGES, "hardly anything was read: the test showed nothing"
    assert torn > 0, "no read was ever torn: the test showed nothing"


def test_the_pattern_tells_versions_and_pages_apart():
    first, second = jobs.version_kv(1), jobs.version_kv(2)
    assert first.view(np.uint8).shape == (jobs.TORN_BLOCKS, jobs.TORN_SPEC.page_bytes)
    assert len(np.unique(np.concatenate([first, second]))) == 2 * jobs.TORN_BLOCKS
