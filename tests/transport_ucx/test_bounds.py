"""Limits on what is in flight: bytes of one owner and of all, and the buffers that messages arrive in."""

import threading
import time

import numpy as np
import pytest
from ucx_owners import PeerUcxOwner, end_all

from kvmarket.deadline import Deadline
from kvmarket.region.pages import PagedMemory, PageLayout, Segment
from kvmarket.testing.region_owner import page_bytes_of, pattern_page
from kvmarket.transport import ReadRequest, ucx, ucx_staging
from kvmarket.transport.ucx import UcxTransport
from kvmarket.transport.ucx_budget import ByteBudget
from kvmarket.transport.ucx_iov import _FEW, page_runs
from kvmarket.transport.ucx_staging import BUFFER_BYTES, PIECE_BYTES_MIN, wants_staging

MIB = 1 << 20
PAGES, PAGE_BYTES = 128, 256 << 10


@pytest.mark.without_ucxx
def test_a_budget_is_never_exceeded_and_what_was_not_got_is_not_kept():
    every = ByteBudget(10)
    first, second = ByteBudget(6, every), ByteBudget(6, every)
    assert first.take(6, Deadline(1))
    assert not first.take(1, Deadline(0.01))
    assert second.take(4, Deadline(1))
    assert not second.take(2, Deadline(0.01)), "there is room for one owner's, but not for all"
    assert (first.taken, second.taken, every.taken) == (6, 4, 10)
    first.give_back(6)
    assert second.take(2, Deadline(1))
    second.give_back(6)
    assert (first.taken, second.taken, every.taken) == (0, 0, 0)
    assert first.take(100, Deadline(1)), "more than all of it is had alone"
    assert not second.take(1, Deadline(0.01))


@pytest.mark.without_ucxx
def test_who_waits_for_room_goes_on_when_there_is_some():
    budget = ByteBudget(10)
    budget.take(10, Deadline(1))
    threading.Timer(0.05, budget.give_back, (10,)).start()
    began = time.monotonic()
    assert budget.take(10, Deadline(20))
    assert 0.04 < time.monotonic() - began < 10


class World:
    """An owner in another process, read over TCP by `transport`."""

    def __init__(self, peers, transport):
        self.owner, self.transport = PeerUcxOwner(peers.spawn(), {"UCX_TLS": "tcp"}), transport
        self.lent = self.owner.lend_pattern(PAGES, PAGE_BYTES)
        self.generations = self.owner.validate(0, list(range(PAGES)))
        self.connection = transport.connect(self.lent.owner, self.lent.descriptor)

    def read(self, layout=None):
        """Read all pages into new memory; tell whether they are right."""
        layout = layout or PageLayout.packed(PAGES, PAGE_BYTES)
        local = PagedMemory(layout, (np.zeros(PAGES * PAGE_BYTES, np.uint8),))
        pages = np.arange(PAGES)
        report = self.connection.read(ReadRequest(pages, self.generations, local, pages), deadline=Deadline(30.0))
        return report.pages == PAGES and all(
            page_bytes_of(local, page) == pattern_page(page, PAGE_BYTES) for page in range(PAGES)
        )


@pytest.fixture
def worlds(peers, monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp")
    made = []

    def make(count, **options):
        transport = UcxTransport({}, **options)
        made.extend(World(peers, transport) for _ in range(count))
        return made

    yield make
    end_all(made)


def test_bytes_in_flight_of_one_owner_and_of_all_are_bounded(worlds, monkeypatch):
    """Twelve reads of two groups each would have 192 MiB in flight."""
    monkeypatch.setattr(ucx, "PEER_BYTES_MAX", 20 * MIB)
    monkeypatch.setattr(ucx, "ALL_BYTES_MAX", 24 * MIB)
    made = worlds(3)
    transport = made[0].transport
    take, seen, right = ByteBudget.take, [], []

    def take_and_note(budget, nbytes, deadline):
        taken = take(budget, nbytes, deadline)
        seen.append((transport._budget.taken, *(each.taken for each in transport._budgets.values())))
        return taken

    monkeypatch.setattr(ByteBudget, "take", take_and_note)
    threads = [threading.Thread(target=lambda one=one: right.append(one.read())) for one in made * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert right == [True] * 12
    assert max(every for every, *_ in seen) == 24 * MIB, "never more, and as much as there may be"
    assert max(max(each) for _, *each in seen if each) <= 20 * MIB
    assert transport._budget.taken == 0
    assert not any(budget.taken for budget in transport._budgets.values())


def test_buffers_are_bounded_and_come_back(worlds, monkeypatch):
    """Eight reads at once share one buffer; what finds none goes straight into its pages."""
    monkeypatch.setattr(ucx_staging, "BUFFERS_MAX", 1)
    half = PAGE_BYTES // 2
    scattered = PageLayout(PAGES, (Segment(0, 0, half, half), Segment(0, PAGES * half, half, half)))
    (world,) = worlds(1, stage=True)
    staging, right = world.transport.staging, []
    threads = [threading.Thread(target=lambda: right.append(world.read(scattered))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert right == [True] * 8
    assert len(staging.made) == 1
    assert staging.in_use == 0
    assert staging.take(BUFFER_BYTES + 1) is None


def test_short_scattered_pieces_are_staged_over_rdma_only():
    rdma, tcp = (("rc_verbs", "mlx5_0:1"), ("tcp", "eth0")), (("tcp", "eth0"),)
    short = np.array([[0, 4096], [8192, 4096]], np.uint64)
    assert wants_staging(rdma, short)
    assert not wants_staging(tcp, short)
    assert not wants_staging(rdma, short[:1])
    assert not wants_staging(rdma, np.array([[0, PIECE_BYTES_MIN]] * 2, np.uint64))


@pytest.mark.without_ucxx
@pytest.mark.parametrize("pages", [[3], [0, 1], [1, 0, 2], [5, 6, 7]])
def test_few_pieces_are_found_where_many_are(pages):
    layout = PageLayout(8, (Segment(0, 0, 16, 16), Segment(1, 0, 32, 16)))
    bases = np.array([1 << 63, 4096], np.uint64)
    assert len(pages) * 2 <= _FEW
    few = page_runs(layout, bases, np.array(pages))
    many = page_runs(layout, bases, np.array(pages * _FEW))
    count = len(few.iov)
    assert few.iov.tolist() == many.iov[:count].tolist()
    assert few.memory.tolist() == many.memory[:count].tolist()
