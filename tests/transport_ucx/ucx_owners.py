"""Owners that serve through UCX, with `RegionOwner`'s methods, and readers; in this process or in a peer."""

import asyncio
import os
import signal
import time
from dataclasses import replace

import numpy as np

from kvmarket import MarketConfig, Marketplace
from kvmarket.deadline import Deadline
from kvmarket.errors import TransportError
from kvmarket.region.pages import PagedMemory
from kvmarket.testing.networks import enter_network
from kvmarket.testing.region_owner import Lent, RegionOwner, page_bytes_of, pattern_page
from kvmarket.testing.samples import SPEC, sample_kv, sample_tokens
from kvmarket.transport import ReadRequest
from kvmarket.transport.ucx import UcxTransport

BLOCKS = 12


def publish_in_peer(state, settings):
    """Keep a marketplace open in a peer that has published one prompt."""

    async def run():
        tokens = sample_tokens(1, BLOCKS)
        state.market = Marketplace("model", SPEC, config=MarketConfig(**settings))
        await state.market.publish(tokens, sample_kv(tokens))

    state.loop = asyncio.new_event_loop()
    state.loop.run_until_complete(run())
    return [region.describe().memories != () for region in state.market.core._regions]


class UcxRegionOwner(RegionOwner):
    """A region owner with a UCX listener. Its descriptors name no shared memory that a reader could map instead."""

    def __init__(self, addresses=("127.0.0.1",), **options):
        super().__init__()
        self.transport = UcxTransport(os.environ, addresses=tuple(addresses), **options)
        self.endpoints = self.transport.serve(self.incarnation)

    def lend(self, layout, sizes, pages):
        lent = super().lend(layout, sizes, pages)
        self.transport.lend(self._regions[-1])
        descriptor = replace(lent.descriptor, memories=(), endpoints={"ucx": self.endpoints})
        return Lent(lent.owner, descriptor)

    def sessions(self):
        return len(self.transport._server.sessions)

    def cpu_seconds(self, wall_s):
        """CPU time that this process uses while it does nothing for `wall_s`."""
        before = time.process_time()
        time.sleep(wall_s)
        return time.process_time() - before

    def close(self):
        self.transport.stop_serving()
        super().close()
        self.transport.close()


def in_ucx_peer(state, environ, addresses, method, *args):
    if not hasattr(state, "owner"):
        network = environ.pop("network", None)
        if network is not None:
            enter_network(network)
        os.environ.update(environ)
        state.owner = UcxRegionOwner(addresses)
    return getattr(state.owner, method)(*args)


class UcxReader:
    """Reads regions of a `lend_pattern` owner and says what came of it, for a process of its own."""

    def __init__(self, **options):
        self.transport = UcxTransport(os.environ, **options)
        self.connections = {}

    def connect(self, lent):
        self.connections[lent.descriptor.region_id] = self.transport.connect(lent.owner, lent.descriptor)
        return self.connections[lent.descriptor.region_id].path

    def read(self, lent, generations, deadline_s):
        """Read all pages; return (seconds, pages, refused, error, wrong pages)."""
        layout = lent.descriptor.layout
        local = PagedMemory.packed(np.zeros((layout.num_pages, layout.page_bytes), np.uint8))
        arrived = []
        pages = np.arange(layout.num_pages)
        request = ReadRequest(pages, generations, local, pages)
        began, error, refused = time.monotonic(), "", {}
        try:
            report = self.connections[lent.descriptor.region_id].read(
                request, deadline=Deadline(deadline_s), on_group=lambda indices: arrived.extend(indices.tolist())
            )
            refused = report.refused
        except TransportError as problem:
            error = type(problem).__name__
        seconds = time.monotonic() - began
        wrong = [page for page in arrived if page_bytes_of(local, page) != pattern_page(page, layout.page_bytes)]
        return seconds, len(arrived), {str(reason) for reason in refused.values()}, error, wrong


def in_reading_peer(state, environ, method, *args):
    if not hasattr(state, "reader"):
        network = environ.pop("network", None)
        if network is not None:
            enter_network(network)
        options = environ.pop("options", {})
        os.environ.update(environ)
        state.reader = UcxReader(**options)
    return getattr(state.reader, method)(*args)


class PeerUcxOwner:
    """A `UcxRegionOwner` in another process."""

    def __init__(self, peer, environ=None, addresses=("127.0.0.1",)):
        self.peer, self.environ, self.addresses = peer, environ or {}, addresses

    def __getattr__(self, method):
        return lambda *args: self.peer.call(in_ucx_peer, self.environ, self.addresses, method, *args)


class PeerUcxReader:
    """A `UcxReader` in another process."""

    def __init__(self, peer, environ=None):
        self.peer, self.environ = peer, environ or {}

    def __getattr__(self, method):
        return lambda *args: self.peer.call(in_reading_peer, self.environ, method, *args)

    def start(self, method, *args):
        """Begin a call; `result` waits for it."""
        self.peer.start(in_reading_peer, self.environ, method, *args)

    def result(self):
        return self.peer.result()


def end_all(worlds):
    """Close the `transport` of each, and let an `owner` that a test stopped go on, so that it can be reaped."""
    for world in worlds:
        if world.owner.peer.running:
            world.owner.peer.signal(signal.SIGCONT)
        world.transport.close()
