"""Owners that serve through UCX, in this process or in a peer, with `RegionOwner`'s methods."""

import os
import time
from dataclasses import replace

from kvmarket.testing.region_owner import Lent, RegionOwner
from kvmarket.transport.ucx import UcxTransport


class UcxRegionOwner(RegionOwner):
    """A region owner with a UCX listener. Its descriptors name no shared memory that a reader could map instead."""

    def __init__(self, addresses=("127.0.0.1",)):
        super().__init__()
        self.transport = UcxTransport(os.environ, addresses=tuple(addresses))
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


def in_ucx_peer(state, environ, method, *args):
    if not hasattr(state, "owner"):
        os.environ.update(environ)
        state.owner = UcxRegionOwner()
    return getattr(state.owner, method)(*args)


class PeerUcxOwner:
    """A `UcxRegionOwner` in another process."""

    def __init__(self, peer, environ=None):
        self.peer, self.environ = peer, environ or {}

    def __getattr__(self, method):
        return lambda *args: self.peer.call(in_ucx_peer, self.environ, method, *args)
