"""`TransportConformance` for CUDA memory, on a real card or on the host's stand-in.

class TestOnCard(CudaConformance):
    real = True
    @pytest.fixture
    def owner(self, peers):
        return PeerCudaOwner(peers.spawn(), real=True)
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from kvmarket.registry.host import boot_id, pid_namespace
from kvmarket.testing.cuda_owner import Card
from kvmarket.testing.region_owner import Lent
from kvmarket.testing.transport_suite import TransportConformance
from kvmarket.transport.cuda_ipc import CudaIpcTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmarket.transport import Transport


class CudaConformance(TransportConformance):
    """The suite, with targets in CUDA memory.

    Attributes:
        real: use cupy and the first card.
    """

    real: bool

    @pytest.fixture(autouse=True)
    def card(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
        """This process's card; the suite makes its targets on it."""
        card = Card(real=self.real)
        monkeypatch.setattr("kvmarket.testing.transport_suite.make_memory", card.memory)
        yield card
        card.close()

    @pytest.fixture
    def transport(self, card: Card) -> Transport:
        return CudaIpcTransport(boot_id(), pid_namespace(), lambda: card.api)

    def during_copy(self, action: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        where = "cuda_lanes.LaneTransfer" if self.real else "host_cuda.HostTransfer"
        return _after_first_wait(f"kvmarket.{'transport' if self.real else 'testing'}.{where}.wait", action)

    def unreachable(self, lent: Lent) -> list[tuple[Lent, str]]:
        return [
            (Lent(replace(lent.owner, boot_id="elsewhere", host="far"), lent.descriptor), "far is another host"),
            (Lent(replace(lent.owner, pid_namespace=1), lent.descriptor), "PID namespace"),
            (Lent(lent.owner, replace(lent.descriptor, cuda=())), "private"),
        ]

    def vanish(self, owner: Any) -> None:
        owner.peer.kill()


@contextlib.contextmanager
def _after_first_wait(wait: str, action: Callable[[], None]) -> Iterator[None]:
    calls: list[object] = []
    owner, _, name = wait.rpartition(".")
    module, _, kind = owner.rpartition(".")
    original = getattr(getattr(__import__(module, fromlist=[kind]), kind), name)

    def wait_then_act(transfer: Any) -> None:
        original(transfer)
        calls.append(transfer)
        if len(calls) == 1:
            action()

    with mock.patch(wait, wait_then_act):
        yield
    assert calls, "nothing was copied"
