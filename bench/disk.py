"""The disk tier's log beside plain files of the same bytes: writing, and reading back, by whole prefixes.

"plain" is one file per run, written and read with the same calls and no checksums: the difference is what the log
adds. Reads come from the page cache, unless the system lets go of it. Aim: the log writes and reads at half of the
plain rate or more; the rest is one digest of every page.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash
from common import log

from kvmarket.disk_log import DiskLog, StoredBlock


def timed_log(directory: Path, pages: np.ndarray, out: np.ndarray) -> tuple[float, float]:
    """Return the seconds of writing all pages, digests included, and of reading and proving them."""
    count, page_bytes = pages.shape
    store = DiskLog(directory, 4 * pages.nbytes + (64 << 20), page_bytes, bytes(16))
    keys = [b"%044d" % number for number in range(count)]
    began = time.perf_counter()
    for key, parent, page in zip(keys, [None, *keys[:-1]], pages, strict=True):
        store.append(StoredBlock(key, parent, xxhash.xxh3_128_digest(page.data)), page)
    written = time.perf_counter()
    good = sum(store.read(key, [row]) for key, row in zip(keys, out, strict=True))
    read = time.perf_counter()
    if good != count or (out != pages).any():
        raise SystemExit("the log did not give back what was written")
    store.clear(bytes(16))
    store.close()
    return written - began, read - written


def timed_plain(path: Path, pages: np.ndarray, out: np.ndarray) -> tuple[float, float]:
    """Return the same for one plain file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    nbytes = pages.shape[1]
    began = time.perf_counter()
    for row, page in enumerate(pages):
        os.pwritev(fd, [page.data], row * nbytes)
    written = time.perf_counter()
    for row, page in enumerate(out):
        os.preadv(fd, [page.data], row * nbytes)
    read = time.perf_counter()
    os.close(fd)
    path.unlink()
    return written - began, read - written


def measure(directory: Path, page_bytes: int, nbytes: int, rounds: int) -> dict[str, float]:
    """Return medians of interleaved rounds, in GB/s, and the ratios."""
    count = nbytes // page_bytes
    pages = np.random.default_rng(1).integers(0, 256, (count, page_bytes), np.uint8)
    out = np.zeros_like(pages)
    ours, plain = [], []
    for number in range(rounds):
        ours.append(timed_log(directory / f"log-{number}", pages, out))
        plain.append(timed_plain(directory / "plain", pages, out))
    rates = {}
    for at, name in enumerate(("write", "read")):
        mine, theirs = (statistics.median(each[at] for each in runs) for runs in (ours, plain))
        rates[f"{name}_gbps"] = round(pages.nbytes / mine / 1e9, 3)
        rates[f"{name}_plain_gbps"] = round(pages.nbytes / theirs / 1e9, 3)
        rates[f"{name}_ratio"] = round(theirs / mine, 3)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small, for tests")
    parser.add_argument("--directory", help="where to write; default: the directory for temporary files")
    arguments = parser.parse_args()
    nbytes, rounds = (4 << 20, 2) if arguments.quick else (256 << 20, 7)
    result: dict[str, object] = {"bench": "disk", "quick": arguments.quick}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for page_bytes in (32 << 10, 1 << 20):
            log(f"pages of {page_bytes} bytes, {nbytes >> 20} MiB, {rounds} rounds")
            result[f"pages_{page_bytes >> 10}k"] = measure(Path(directory), page_bytes, nbytes, rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
