"""A fetch over UCX between two processes that print what UCX tells; the result is a line of JSON on stdout.

UCX_PROTO_INFO=y python tests/gpu/gpu_ucx_told.py RUNTIME_DIR
"""

import json
import os
import sys
from types import SimpleNamespace

import gpu_jobs as jobs

from kvmarket.testing.peers import PeerPool

PAGES = 160
"""5 MiB: two messages."""


def publish(state, runtime_dir):
    jobs.open_core(state, runtime_dir, transport="ucx", ucx_addresses="127.0.0.1")
    jobs.lend(state, PAGES, 1)
    jobs.offer(state, list(range(PAGES)))


def main():
    runtime_dir, state = sys.argv[1], SimpleNamespace()
    with PeerPool() as pool:
        pool.spawn().call(publish, runtime_dir, timeout_s=60)
        jobs.open_core(state, runtime_dir, transport="ucx", ucx_addresses="127.0.0.1")
        path, blocks, right = jobs.fetch_here(state, PAGES, 1)
        print("\n" + json.dumps({"path": path, "blocks": blocks, "pages": PAGES, "right": right}), flush=True)
    os._exit(0)  # UCX's destructors wait for a peer that is gone


if __name__ == "__main__":
    main()
