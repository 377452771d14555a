"""What UCX for pages on cards must do: the suite of transports for CUDA memory, with an owner that serves over UCX."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from kvmarket.testing.cuda_owner import CudaRegionOwner
from kvmarket.testing.cuda_suite import CudaConformance
from kvmarket.testing.region_owner import Lent
from kvmarket.transport.ucx_cuda import CudaUcxTransport

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvmarket.region.pages import PageLayout
    from kvmarket.testing.cuda_owner import Card


class UcxCudaOwner(CudaRegionOwner):
    """Serves its regions over UCX; its descriptors name no memory that a reader could map instead."""

    def __init__(self, *, real: bool) -> None:
        super().__init__(real=real)
        self.transport = CudaUcxTransport(os.environ, lambda: self.card.api, addresses=("127.0.0.1",))
        self.endpoints = self.transport.serve(self.incarnation)

    def lend(self, layout: PageLayout, sizes: Sequence[int], pages: Sequence[bytes]) -> Lent:
        lent = super().lend(layout, sizes, pages)
        self.transport.lend(self._regions[-1])
        return Lent(lent.owner, replace(lent.descriptor, cuda=(), endpoints={"ucx_cuda": self.endpoints}))

    def close(self) -> None:
        self.transport.stop_serving()
        super().close()
        self.transport.close()


class UcxCudaConformance(CudaConformance):
    """The suite. Needs ucxx."""

    @pytest.fixture
    def owner(self) -> Iterator[UcxCudaOwner]:
        owner = UcxCudaOwner(real=self.real)
        yield owner
        owner.close()

    @pytest.fixture
    def transport(self, card: Card) -> Iterator[CudaUcxTransport]:
        transport = CudaUcxTransport(os.environ, lambda: card.api, addresses=("127.0.0.1",))
        yield transport
        transport.close()

    def unreachable(self, lent: Lent) -> list[tuple[Lent, str]]:
        return [(Lent(lent.owner, replace(lent.descriptor, endpoints={})), "does not listen")]

    def vanish(self, owner: Any) -> None:
        owner.transport.stop_serving()
