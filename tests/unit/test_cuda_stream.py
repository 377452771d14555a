"""A read on a card whose pages come in parts: which of them share a launch, and what becomes of them."""

from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from kvmarket.announced import Announced
from kvmarket.deadline import Deadline
from kvmarket.errors import TransferError
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import PageLayout
from kvmarket.report import MissReason
from kvmarket.testing.host_cuda import HostCuda
from kvmarket.transport import ReadRequest, cuda_ipc
from kvmarket.transport.cuda_ipc import CudaIpcConnection
from kvmarket.transport.cuda_stream import GROWTH, CudaStream
from kvmarket.verification import Verification

PAGES, PAGE_BYTES = 24, 64
PART = 3


class BusyCard(HostCuda):
    """Takes down what it copies. While it fails, so do all copies that are waited for."""

    def __init__(self):
        super().__init__()
        self.copied, self.busy, self.failing = [], True, False

    def copy(self, source, source_pages, target, target_pages, digest=None):
        self.copied.append(source_pages.tolist())
        transfer = super().copy(source, source_pages, target, target_pages, digest)
        transfer.wait = partial(self._wait, transfer.wait)
        return transfer

    def _wait(self, wait):
        if self.failing:
            raise TransferError("the card failed", scheme="cuda_ipc")
        wait()


@pytest.fixture
def card():
    card = BusyCard()
    yield card
    card.close()


@pytest.fixture
def scene(card):
    """Memories of both sides, generations, and what was announced of pages in an order of their own."""

    layout = PageLayout.packed(PAGES, PAGE_BYTES)
    scene = SimpleNamespace(
        generations=np.full(PAGES, 2, np.uint64),
        order=np.random.default_rng(5).permutation(PAGES),
        deadline=Deadline(10),
        checks=[],
    )
    scene.source, scene.local = (
        CudaPagedMemory.of(card, layout, [card.allocate(PAGES * PAGE_BYTES, 0)]) for _ in range(2)
    )
    scene.source.memories[0][:] = np.random.default_rng(6).integers(0, 256, PAGES * PAGE_BYTES, np.uint8)
    scene.digests = card.digests(scene.source, scene.order)
    scene.stream = CudaStream("path", scene.local, scene.source, scene.generations)
    return scene


def add(scene, first, count=PART, mode="full"):
    """Add pages `first`, `first` + 1, ... of the order, to be verified as a fetch has it done."""
    part = slice(first, first + count)
    announced = Announced(scene.order[part].copy(), np.full(count, 2, np.uint64), scene.digests[part].copy())
    check = Verification(mode, announced, scene.local, np.arange(PAGES)[part], "sum128")
    scene.checks.append(check)
    return scene.stream.add(check.request, scene.deadline)


def arrived(scene, count):
    here, there = (memory.memories[0].reshape(PAGES, PAGE_BYTES) for memory in (scene.local, scene.source))
    return (here[:count] == there[scene.order[:count]]).all()


def launched(card):
    return [len(pages) for pages in card.copied]


def test_a_card_that_is_busy_gets_the_rest_in_few_launches(card, scene):
    for first in range(0, PAGES, PART):
        assert add(scene, first)
    assert not scene.stream.ended
    assert launched(card) == [PART, GROWTH * PART]
    scene.stream.flush()
    report = scene.stream.finish()
    assert launched(card) == [PART, GROWTH * PART, PAGES - (1 + GROWTH) * PART]
    assert [page for pages in card.copied for page in pages] == scene.order.tolist()
    assert (report.pages, report.refused) == (PAGES, {})
    assert arrived(scene, PAGES)
    assert [check.blocks for check in scene.checks] == [PART] * (PAGES // PART)
    assert not any(check.mismatched for check in scene.checks)


def test_an_idle_card_gets_each_part_at_once(card, scene):
    card.busy = False
    for first in range(0, PAGES, PART):
        assert add(scene, first)
        assert card.copied[-1] == scene.order[first : first + PART].tolist()
    assert scene.stream.ended
    assert scene.stream.finish().pages == PAGES
    assert arrived(scene, PAGES)


def test_what_waits_goes_when_the_card_is_idle_again(card, scene):
    add(scene, 0)
    add(scene, PART)
    assert launched(card) == [PART]
    card.busy = False
    add(scene, 2 * PART)
    assert launched(card) == [PART, 2 * PART]
    assert scene.stream.finish().pages == 3 * PART


def test_wrong_and_torn_pages_of_a_shared_launch_are_told_apart(card, scene):
    for first in range(0, PAGES, PART):
        add(scene, first)
    scene.source.memories[0].reshape(PAGES, PAGE_BYTES)[scene.order[13]] ^= 1
    scene.stream.flush()
    scene.generations[scene.order[20]] = 3
    report = scene.stream.finish()
    assert report.refused == {20: MissReason.TORN}
    mismatched = {number: check.mismatched for number, check in enumerate(scene.checks) if check.mismatched}
    assert mismatched == {13 // PART: {13 % PART}}
    assert report.pages == PAGES - 1


def test_a_page_that_is_stale_ends_the_read_behind_those_that_wait(card, scene):
    scene.generations[scene.order[16]] = 3
    for first in range(0, 15, PART):
        assert add(scene, first)
    assert not add(scene, 15)
    report = scene.stream.finish()
    assert report.refused == {16: MissReason.STALE_GENERATION}
    assert arrived(scene, 16)
    assert scene.checks[5].blocks == 2


def test_a_torn_page_spares_the_card_what_waits_behind_it(card, scene):
    add(scene, 0)
    add(scene, PART)
    scene.generations[scene.order[1]] = 3
    card.busy = False
    assert not add(scene, 2 * PART)
    report = scene.stream.finish()
    assert launched(card) == [PART]
    assert report.refused == dict.fromkeys([1, *range(PART, 3 * PART)], MissReason.TORN)
    assert report.pages == PART - 1


def test_what_waits_when_the_deadline_passes_is_not_read(card, scene):
    add(scene, 0)
    add(scene, PART)
    scene.deadline.cancel()
    report = scene.stream.finish()
    assert launched(card) == [PART]
    assert report.refused == dict.fromkeys(range(PART, 2 * PART), MissReason.DEADLINE)
    assert arrived(scene, PART)


@pytest.mark.parametrize("mode", ["sampled", "none"])
def test_parts_of_which_not_all_are_digested_go_by_themselves(card, scene, mode):
    for first in range(0, PAGES, PART):
        add(scene, first, mode=mode)
    report = scene.stream.finish()
    assert (report.pages, report.refused) == (PAGES, {})
    assert len(card.copied) == PAGES // PART
    assert arrived(scene, PAGES)


def test_launches_have_a_size_that_they_do_not_exceed(card, scene):
    scene.stream = CudaStream("path", scene.local, scene.source, scene.generations, group_bytes=7 * PAGE_BYTES)
    add(scene, 0, 10)
    for first in range(10, 22, PART):
        add(scene, first)
    assert scene.stream.finish().pages == 22
    assert max(launched(card)) <= 7
    assert [page for pages in card.copied for page in pages] == scene.order[:22].tolist()


def test_who_cancels_on_hearing_of_a_group_stops_those_behind_the_two_under_way(card, scene):
    arrived = []

    def on_group(indices):
        arrived.extend(indices.tolist())
        scene.deadline.cancel()

    scene.stream = CudaStream("path", scene.local, scene.source, scene.generations, on_group, 8 * PAGE_BYTES)
    request = ReadRequest(scene.order, scene.generations[scene.order], scene.local, np.arange(PAGES))
    scene.stream.add(request, scene.deadline)
    report = scene.stream.finish()
    assert launched(card) == [8, 8]
    assert arrived == list(range(16))
    assert report.refused == dict.fromkeys(range(16, PAGES), MissReason.DEADLINE)


def test_an_abandoned_read_starts_nothing_more(card, scene):
    add(scene, 0)
    add(scene, PART)
    scene.stream.abandon()
    assert launched(card) == [PART]
    assert scene.stream.ended


def test_a_card_that_fails_is_an_error_and_leaves_nothing_waiting(card, scene):
    for first in range(0, 4 * PART, PART):
        add(scene, first)
    card.failing = True
    with pytest.raises(TransferError, match="the card failed"):
        scene.stream.finish()
    assert scene.stream.ended


def test_a_read_on_a_card_that_fails_starts_nothing_more(card, scene):
    connection = CudaIpcConnection("path", scene.generations, "sum128", scene.source)
    request = ReadRequest(scene.order, scene.generations[scene.order], scene.local, np.arange(PAGES))
    card.busy, card.failing = False, True
    with mock.patch.object(cuda_ipc, "READ_GROUP_BYTES_MIN", PAGE_BYTES), pytest.raises(TransferError):
        connection.read(request, deadline=scene.deadline, on_group=lambda _: None)
    assert launched(card) == [PAGES // cuda_ipc.READ_GROUPS]
