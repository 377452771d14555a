"""Pages "on a card", with host memory in its place, over UCX: packed, sent, spread; the suite of transports."""

import os
import time

import numpy as np
import pytest

from kvmarket.deadline import Deadline
from kvmarket.errors import TransferError, TransportUnavailableError
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import PageLayout
from kvmarket.testing.host_cuda import HostCuda
from kvmarket.testing.ucx_cuda_suite import UcxCudaConformance, UcxCudaOwner
from kvmarket.transport import ReadRequest, ucx_cuda
from kvmarket.transport.ucx_cuda import CudaUcxTransport
from kvmarket.transport.ucx_cuda_staging import CardStaging

pytestmark = pytest.mark.timeout(120)


class TestStagedOnHost(UcxCudaConformance):
    real = False


@pytest.fixture
def owner():
    owner = UcxCudaOwner(real=False)
    yield owner
    owner.close()


def test_bytes_that_go_through_the_host_are_said_to_and_can_be_refused(owner, monkeypatch):
    layout = PageLayout.packed(4, 65_536)
    lent = owner.lend(layout, [4 * 65_536], [bytes([page]) * 65_536 for page in range(4)])
    api = HostCuda()
    transport = CudaUcxTransport(os.environ, lambda: api, addresses=("127.0.0.1",), require="no_host_bounce")
    try:
        with pytest.raises(TransportUnavailableError, match="no_host_bounce"):
            transport.connect(lent.owner, lent.descriptor)
        monkeypatch.setattr(ucx_cuda, "reaches_cuda", lambda lanes: True)
        assert "host_bounce" not in transport.connect(lent.owner, lent.descriptor).path
    finally:
        transport.close()
        api.close()


@pytest.mark.parametrize(
    ("lanes", "peermem", "reached"),
    [
        ([("cuda_ipc", "cuda"), ("tcp", "lo")], False, True),
        ([("cuda_ipc", ""), ("tcp", "lo")], False, False),
        ([("tcp", "lo"), ("cma", "memory")], True, False),
        ([("rc_mlx5", "mlx5_0:1")], True, True),
        ([("rc_mlx5", "mlx5_0:1")], False, False),
    ],
)
def test_which_lanes_reach_gpu_memory(lanes, peermem, reached, tmp_path, monkeypatch):
    monkeypatch.setattr(ucx_cuda, "PEERMEM", tmp_path if peermem else tmp_path / "nothing")
    assert ucx_cuda.reaches_cuda(tuple(lanes)) is reached


def test_staging_buffers_are_bounded_and_used_again(monkeypatch):
    monkeypatch.setattr("kvmarket.transport.ucx_cuda_staging.BYTES_MAX", 1 << 20)
    monkeypatch.setattr("kvmarket.transport.ucx_cuda_staging.WAIT_S", 0.05)
    api = HostCuda()
    staging = CardStaging(api)
    large = staging.take(5 << 20, 0)  # one larger than all, when there is no other
    with pytest.raises(TransferError, match="became free"):
        staging.take(1, 0)
    staging.give_back(large)
    assert staging.take(5 << 20, 0) is large
    address = api.pointer(large)
    assert len(staging.view(address + 5, 7)) == 7
    with pytest.raises(TransferError, match="no staging buffer"):
        staging.view(address + len(large) - 1, 2)
    staging.give_back(large)
    api.close()


def test_reads_of_any_size_arrive_and_are_digested(owner):
    page_bytes, count = 1 << 20, 21  # more than two chunks
    rng = np.random.default_rng(1)
    pages = [rng.bytes(page_bytes) for _ in range(count)]
    lent = owner.lend(PageLayout.packed(count, page_bytes), [count * page_bytes], pages)
    generations = np.asarray(owner.validate(0, range(count)), np.uint64)
    transport = CudaUcxTransport(os.environ, lambda: owner.card.api, addresses=("127.0.0.1",))
    try:
        connection = transport.connect(lent.owner, lent.descriptor)
        local = owner.card.memory(PageLayout.packed(count, page_bytes), [count * page_bytes])
        digests = {}
        order = rng.permutation(count)
        request = ReadRequest(
            order, generations[order], local, np.arange(count), np.ones(count, bool),
            lambda indices, found: digests.update(zip(indices.tolist(), found.tolist(), strict=True)),
        )  # fmt: skip
        report = connection.read(request, deadline=Deadline(20))
        assert (report.pages, report.refused) == (count, {})
        assert all(bytes(local.views(slot)[0]) == pages[page] for slot, page in enumerate(order.tolist()))
        assert digests == dict(enumerate(owner.card.api.digests(local, np.arange(count)).tolist()))
        assert report.path.endswith("host_bounce")
    finally:
        transport.close()


@pytest.fixture
def reader():
    """A transport with cards of its own."""
    api = HostCuda()
    transport = CudaUcxTransport(os.environ, lambda: api, addresses=("127.0.0.1",))
    yield transport
    transport.close()
    api.close()


def lent_pages(owner, count, page_bytes=1 << 20):
    pages = [bytes([page + 1]) * page_bytes for page in range(count)]
    lent = owner.lend(PageLayout.packed(count, page_bytes), [count * page_bytes], pages)
    return lent, np.asarray(owner.validate(0, range(count)), np.uint64)


def read_all(reader, lent, generations):
    count, page_bytes = len(generations), lent.descriptor.layout.page_bytes
    local = CudaPagedMemory.of(
        reader.cuda, PageLayout.packed(count, page_bytes), [reader.cuda.allocate(count * page_bytes, 0)]
    )
    connection = reader.connect(lent.owner, lent.descriptor)
    request = ReadRequest(np.arange(count), generations, local, np.arange(count))
    return connection.read(request, deadline=Deadline(20)), local


def in_use(transport):
    return transport._budget.taken, len(transport.card_staging._used)


def test_a_read_does_not_wait_for_the_bytes_of_groups_that_it_has_yet_to_spread(owner, reader, monkeypatch):
    monkeypatch.setattr(ucx_cuda, "GROUP_BYTES_MIN", 1 << 20)
    monkeypatch.setattr(ucx_cuda, "BOUNCED_BYTES", 1 << 20)
    monkeypatch.setattr(reader, "_peer_bytes_max", 1 << 20)  # one group at a time has them all
    lent, generations = lent_pages(owner, 9)
    report, local = read_all(reader, lent, generations)
    assert (report.pages, report.refused) == (9, {})
    assert [local.views(page)[0][0] for page in range(9)] == list(range(1, 10))
    assert report.seconds < 5
    assert in_use(reader) == (0, 0)


@pytest.mark.parametrize("step", ["launch", "wait"])
def test_a_group_that_cannot_be_spread_ends_the_read_and_leaves_nothing_taken(owner, reader, monkeypatch, step):
    monkeypatch.setattr(ucx_cuda, "GROUP_BYTES_MIN", 1 << 20)
    launch, launched = reader.cuda.copy, []

    def fails(*args):
        launched.append(args)
        transfer = launch(*args)
        if len(launched) == 3:
            if step == "launch":
                raise TransferError("the card failed", scheme="cuda_ipc")
            transfer.wait = never_ends
        return transfer

    def never_ends():
        raise TransferError("the card failed", scheme="cuda_ipc")

    monkeypatch.setattr(reader.cuda, "copy", fails)
    lent, generations = lent_pages(owner, 16)
    with pytest.raises(TransferError, match="the card failed"):
        read_all(reader, lent, generations)
    assert len(launched) < 16
    lost = step == "wait"  # the card may still read that buffer
    assert in_use(reader) == (0, int(lost))


def test_who_waits_for_a_silent_peer_sleeps(owner, reader):
    lent, generations = lent_pages(owner, 4)
    assert read_all(reader, lent, generations)[0].pages == 4
    driver = reader.driver

    def owe():
        driver.reads += 1  # as while a reader's pages are being packed

    driver.call(owe, 5)
    time.sleep(0.05)
    began = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - began < 0.1
