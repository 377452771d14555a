"""What GPU tests do inside a vLLM replica; see `kvmarket.testing.vllm_replica.Replica.call`."""

import os
import select
import signal

import numpy as np

from kvmarket_vllm.inspect import roles


def kill_owner_in_copy(engine, *, pid):
    """Have the next copy of this replica's card kill the process `pid` between its launch and the wait for it."""
    api = roles(engine)[0].market.region.pages.api
    copy = api.copy
    owner = os.pidfd_open(pid)

    def copy_then_kill(*args):
        del api.copy  # what hid the class's own
        transfer = copy(*args)
        signal.pidfd_send_signal(owner, signal.SIGKILL)
        select.select([owner], [], [], 10.0)
        os.close(owner)
        engine.kvmarket_killed = True
        return transfer

    engine.kvmarket_killed = False
    api.copy = copy_then_kill


def killed(engine):
    """Tell whether that happened."""
    return engine.kvmarket_killed


def readable(engine):
    """Return how many pages peers may read right now."""
    values = roles(engine)[0].market.region.generations.values
    return int(((values & np.uint64(1) == 0) & (values > 0)).sum())


def layout(engine):
    """Return (pages, bytes per page, segments per page, memories, kind) of the lent KV cache."""
    pages = roles(engine)[0].market.region.pages
    return (
        pages.layout.num_pages,
        pages.layout.page_bytes,
        len(pages.layout.segments),
        len(pages.memories),
        pages.kind,
    )


def corrupt(engine, *, pages):
    """Change bytes of the pages offered first, behind everybody's back."""
    market = roles(engine)[0].market
    for page in list(market.publisher._page_of.values())[:pages]:
        for view in market.region.pages.views(page):
            view[:] ^= 1
    market.region.pages.api.cupy.cuda.runtime.deviceSynchronize()
