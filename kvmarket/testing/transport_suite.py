"""What every transport must do, as tests.

Subclass `TransportConformance`; define the fixtures `transport` and `owner` and the hooks that say what "out of reach"
and "gone" mean for the backend. Owners in other processes come from `kvmarket.testing.peers`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest

from kvmarket.deadline import Deadline
from kvmarket.errors import PeerGoneError, TransferError, TransportError, TransportUnavailableError
from kvmarket.region.pages import PagedMemory, PageLayout, copy_pages
from kvmarket.report import MissReason
from kvmarket.testing.region_owner import make_memory, page_bytes_of, pattern_page, random_layout, value_at
from kvmarket.transport import ReadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvmarket.region.descriptor import RegionDescriptor
    from kvmarket.testing.region_owner import Lent
    from kvmarket.transport import Connection, Transport

PAGES, PAGE_BYTES = 12, 1000
LARGE_PAGES, LARGE_PAGE_BYTES = 96, 256 << 10
"""A region that no backend should read in one group."""
PATIENCE_S = 20.0


def random_pages(rng: np.random.Generator, count: int, nbytes: int) -> list[bytes]:
    """Return pages of random bytes."""
    return [rng.integers(0, 256, nbytes, np.uint8).tobytes() for _ in range(count)]


def read_into(
    connection: Connection, pages: Sequence[int], generations: np.ndarray, local: PagedMemory, **options: Any
) -> Any:
    """Read `pages` to the first pages of `local`."""
    request = ReadRequest(np.array(pages, np.int64), generations, local, np.arange(len(pages)))
    return connection.read(request, **{"deadline": Deadline(PATIENCE_S), **options})


class TransportConformance(ABC):
    """The suite. A subclass defines the fixtures `transport` and `owner`, and the hooks below."""

    @pytest.fixture
    @abstractmethod
    def transport(self) -> Transport:
        """The backend under test."""

    @pytest.fixture
    @abstractmethod
    def owner(self) -> Any:
        """A `RegionOwner`, or something with its methods: within reach of `transport`."""

    @abstractmethod
    def during_copy(self, action: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """While entered, run `action` once in the first copy: after its bytes moved, before they are checked again."""

    @abstractmethod
    def unreachable(self, lent: Lent) -> list[tuple[Lent, str]]:
        """Return owners out of reach, each with a word that the refusal must contain."""

    @abstractmethod
    def vanish(self, owner: Any) -> None:
        """End the owner's incarnation as roughly as it may end in this transport's world."""

    # ---- bytes

    @pytest.mark.parametrize("seed", range(12))
    def test_pages_arrive_exactly_whatever_the_layouts(self, transport: Transport, owner: Any, seed: int) -> None:
        rng = np.random.default_rng(seed)
        packed_there, packed_here = seed % 3 == 1, seed % 3 == 2
        content = random_pages(rng, PAGES, PAGE_BYTES)
        there = _packed(PAGES, PAGE_BYTES) if packed_there else random_layout(rng, PAGES, PAGE_BYTES)
        here = _packed(PAGES, PAGE_BYTES) if packed_here else random_layout(rng, PAGES, PAGE_BYTES)
        lent = owner.lend(*there, content)
        local = make_memory(*here)
        sources = rng.integers(0, PAGES, int(rng.integers(1, PAGES + 1)))
        targets = rng.permutation(PAGES)[: len(sources)]
        generations = owner.validate(0, list(range(PAGES)))[sources]
        before = [memory.copy() for memory in local.memories]
        with _connected(transport, lent) as connection:
            report = connection.read(ReadRequest(sources, generations, local, targets), deadline=Deadline(PATIENCE_S))
        assert report.refused == {}
        assert (report.pages, report.nbytes) == (len(sources), len(sources) * PAGE_BYTES)
        assert report.transport == transport.scheme
        assert report.path
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            assert page_bytes_of(local, target) == content[source]
            for view in local.views(target):
                view[:] = 0xAB
        for memory, old in zip(local.memories, before, strict=True):
            assert (memory == old).all(), "bytes outside the target pages were touched"

    def test_nothing_to_read_is_fine(self, transport: Transport, owner: Any) -> None:
        lent = owner.lend(*_packed(1, 8), [b"12345678"])
        with _connected(transport, lent) as connection:
            report = read_into(connection, [], np.empty(0, np.uint64), make_memory(*_packed(1, 8)))
        assert (report.pages, report.nbytes, report.refused) == (0, 0, {})

    def test_connections_are_used_from_many_threads(self, transport: Transport, owner: Any) -> None:
        rng = np.random.default_rng(5)
        content = random_pages(rng, PAGES, PAGE_BYTES)
        lent = owner.lend(*random_layout(rng, PAGES, PAGE_BYTES), content)
        generations = owner.validate(0, list(range(PAGES)))
        wrong: list[int] = []

        def work(connection: Connection, seed: int) -> None:
            order = np.random.default_rng(seed).permutation(PAGES)
            for _ in range(20):
                local = make_memory(*_packed(PAGES, PAGE_BYTES))
                report = read_into(connection, order.tolist(), generations[order], local)
                if report.refused or any(page_bytes_of(local, i) != content[page] for i, page in enumerate(order)):
                    wrong.append(seed)

        with _connected(transport, lent) as connection:
            threads = [threading.Thread(target=work, args=(connection, seed)) for seed in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert wrong == []

    # ---- generations

    def test_only_readable_pages_of_the_announced_generation_are_read(self, transport: Transport, owner: Any) -> None:
        lent = owner.lend(*_packed(4, 64), [bytes([i]) * 64 for i in range(4)])
        first = owner.validate(0, [0, 1, 2])
        owner.invalidate(0, [1])
        second = owner.validate(0, [2])
        never, odd = np.array([0, 1], np.uint64)
        cases = [(0, first[0], True), (1, first[1], False), (2, first[2], False), (2, second[0], True)]
        cases += [(3, never, False), (1, first[1] + odd, False), (0, first[0] + np.uint64(2), False)]
        with _connected(transport, lent) as connection:
            for page, generation, readable in cases:
                local = make_memory(*_packed(1, 64))
                report = read_into(connection, [page], np.array([generation], np.uint64), local)
                assert report.refused == ({} if readable else {0: MissReason.STALE_GENERATION}), (page, generation)
                assert report.pages == int(readable)
                if readable:
                    assert page_bytes_of(local, 0) == bytes([page]) * 64

    def test_pages_that_the_region_does_not_have_are_refused(self, transport: Transport, owner: Any) -> None:
        lent = owner.lend(*_packed(2, 64), [b"a" * 64, b"b" * 64])
        generations = owner.validate(0, [0, 1])
        with _connected(transport, lent) as connection:
            for page in (2, 10**6, -1):
                report = read_into(connection, [0, page], generations, make_memory(*_packed(2, 64)))
                assert report.refused == {1: MissReason.STALE_GENERATION}

    def test_a_page_changed_while_it_is_read_is_torn(self, transport: Transport, owner: Any) -> None:
        lent = owner.lend(*_packed(3, 64), [b"a" * 64, b"b" * 64, b"c" * 64])
        generations = owner.validate(0, [0, 1, 2])
        arrived: list[int] = []

        def overwrite() -> None:
            owner.invalidate(0, [1])
            owner.write(0, 1, b"X" * 64)
            owner.validate(0, [1])

        local = make_memory(*_packed(3, 64))
        with _connected(transport, lent) as connection, self.during_copy(overwrite):
            report = read_into(connection, [0, 1, 2], generations, local, on_group=_collect(arrived))
        assert report.refused == {1: MissReason.TORN}
        assert sorted(arrived) == [0, 2]
        assert (page_bytes_of(local, 0), page_bytes_of(local, 2)) == (b"a" * 64, b"c" * 64)

    def test_a_page_under_constant_rewriting_is_never_wrong(self, transport: Transport, owner: Any) -> None:
        pages, nbytes = 16, 64 << 10
        lent = owner.lend(*_packed(pages, nbytes), [bytes(nbytes)] * pages)
        local = make_memory(*_packed(pages, nbytes))
        good = refused = 0
        owner.start_rewriting(0)
        with _connected(transport, lent) as connection:
            end = time.monotonic() + PATIENCE_S
            while time.monotonic() < end and not (good > 20 * pages and refused > 5 * pages):
                arrived: list[int] = []
                asked = owner.generations(0)
                report = read_into(connection, range(pages), asked, local, on_group=_collect(arrived))
                for page in arrived:
                    data = local.views(page)[0]
                    assert (data == value_at(int(asked[page]))).all(), "an accepted page holds other bytes"
                good, refused = good + len(arrived), refused + len(report.refused)
        owner.stop_rewriting()
        assert good > 0, "no page was ever accepted"
        assert refused > 0, "no page was ever refused"

    # ---- groups, deadlines

    def test_groups_tell_every_page_that_arrived_once_and_in_order(self, transport: Transport, owner: Any) -> None:
        lent, generations = self._large(owner)
        arrived: list[int] = []
        threads: set[int] = set()
        local = make_memory(*_packed(LARGE_PAGES, LARGE_PAGE_BYTES))

        def on_group(indices: np.ndarray) -> None:
            threads.add(threading.get_ident())
            for index in indices.tolist():  # the bytes are there when the callback runs, not only at the end
                assert page_bytes_of(local, index) == _large_page(index)
            arrived.extend(indices.tolist())

        with _connected(transport, lent) as connection:
            report = read_into(connection, range(LARGE_PAGES), generations, local, on_group=on_group)
        assert report.refused == {}
        assert arrived == list(range(LARGE_PAGES))
        assert len(threads) == 1

    def test_a_refused_page_ends_the_read_after_its_group(self, transport: Transport, owner: Any) -> None:
        lent, generations = self._large(owner)
        owner.invalidate(0, [0])
        arrived: list[int] = []
        local = make_memory(*_packed(LARGE_PAGES, LARGE_PAGE_BYTES))
        with _connected(transport, lent) as connection:
            report = read_into(connection, range(LARGE_PAGES), generations, local, on_group=_collect(arrived))
        assert report.refused[0] is MissReason.STALE_GENERATION
        assert LARGE_PAGES - 1 in report.refused, "pages beyond the group were read, and one of them was not needed"
        assert sorted([*arrived, *report.refused]) == list(range(LARGE_PAGES)), "each page is delivered or refused"
        assert report.pages == len(arrived)

    def test_an_expired_deadline_reads_nothing(self, transport: Transport, owner: Any) -> None:
        lent, generations = self._large(owner)
        arrived: list[int] = []
        local = make_memory(*_packed(LARGE_PAGES, LARGE_PAGE_BYTES))
        with _connected(transport, lent) as connection:
            report = read_into(
                connection, range(LARGE_PAGES), generations, local, deadline=Deadline(0), on_group=_collect(arrived)
            )
        assert arrived == []
        assert report.refused == dict.fromkeys(range(LARGE_PAGES), MissReason.DEADLINE)
        assert all((memory == 0xAB).all() for memory in local.memories)

    def test_a_deadline_that_is_cancelled_ends_the_read_early(self, transport: Transport, owner: Any) -> None:
        lent, generations = self._large(owner)
        deadline, arrived = Deadline(PATIENCE_S), []
        local = make_memory(*_packed(LARGE_PAGES, LARGE_PAGE_BYTES))

        def on_group(indices: np.ndarray) -> None:
            arrived.extend(indices.tolist())
            deadline.cancel()

        with _connected(transport, lent) as connection:
            report = read_into(connection, range(LARGE_PAGES), generations, local, deadline=deadline, on_group=on_group)
            still = [memory.copy() for memory in local.memories]
            time.sleep(0.05)
        assert report.refused, "the read went on to the end"
        assert set(report.refused.values()) == {MissReason.DEADLINE}
        assert sorted([*arrived, *report.refused]) == list(range(LARGE_PAGES))
        assert all((memory == old).all() for memory, old in zip(local.memories, still, strict=True))

    # ---- reach

    def test_owners_out_of_reach_are_refused_with_the_reason(self, transport: Transport, owner: Any) -> None:
        lent = owner.lend(*_packed(1, 64), [b"a" * 64])
        for elsewhere, word in self.unreachable(lent):
            with pytest.raises(TransportUnavailableError, match=word) as caught:
                transport.connect(elsewhere.owner, elsewhere.descriptor)
            assert caught.value.scheme == transport.scheme
            assert caught.value.peer

    def test_a_probe_that_reads_other_bytes_is_no_connection(self, transport: Transport, owner: Any) -> None:
        lent = owner.lend(*_packed(1, 64), [b"a" * 64])
        other = replace(lent.descriptor, probe=bytes(64))
        with pytest.raises(PeerGoneError):
            transport.connect(lent.owner, other)

    def test_another_incarnation_is_no_connection(self, transport: Transport, owner: Any) -> None:
        lent = owner.lend(*_packed(1, 64), [b"a" * 64])
        with pytest.raises(TransportError):
            transport.connect(replace(lent.owner, incarnation=bytes(16)), lent.descriptor)

    def test_an_owner_that_is_gone_cannot_be_connected_to(self, transport: Transport, owner: Any) -> None:
        lent = owner.lend(*_packed(1, 64), [b"a" * 64])
        owner.validate(0, [0])
        self.vanish(owner)
        with pytest.raises(TransportError):
            transport.connect(lent.owner, lent.descriptor)

    def test_reading_from_an_owner_that_is_gone_ends_and_is_never_wrong(self, transport: Transport, owner: Any) -> None:
        lent, generations = self._large(owner)
        local = make_memory(*_packed(LARGE_PAGES, LARGE_PAGE_BYTES))
        arrived: list[int] = []
        with _connected(transport, lent) as connection:
            self.vanish(owner)
            began = time.monotonic()
            with contextlib.suppress(PeerGoneError, TransferError):
                read_into(
                    connection, range(LARGE_PAGES), generations, local, deadline=Deadline(2), on_group=_collect(arrived)
                )
        assert time.monotonic() - began < 4
        assert all(page_bytes_of(local, page) == _large_page(page) for page in arrived)

    def test_closing_twice_is_fine(self, transport: Transport, owner: Any) -> None:
        lent = owner.lend(*_packed(1, 64), [b"a" * 64])
        connection = transport.connect(lent.owner, lent.descriptor)
        connection.close()
        connection.close()
        transport.close()
        transport.close()

    def test_what_it_can_do_is_told(self, transport: Transport) -> None:
        assert transport.scheme
        assert "host" in transport.capabilities.memory or "cuda" in transport.capabilities.memory

    def test_freshness_is_a_hint_about_the_first_check(self, transport: Transport, owner: Any) -> None:
        lent = owner.lend(*_packed(2, 64), [b"a" * 64] * 2)
        generations = owner.validate(0, [0, 1])
        owner.invalidate(0, [1])
        with _connected(transport, lent) as connection:
            fresh = connection.fresh(np.array([0, 1]), generations)
        assert fresh.dtype == bool
        assert fresh[0], "a page that would be read must not be taken for stale"

    @staticmethod
    def _large(owner: Any) -> tuple[Lent, np.ndarray]:
        return owner.lend_pattern(LARGE_PAGES, LARGE_PAGE_BYTES), owner.validate(0, list(range(LARGE_PAGES)))


def _large_page(page: int) -> bytes:
    return pattern_page(page, LARGE_PAGE_BYTES)


def _packed(num_pages: int, page_bytes: int) -> tuple[PageLayout, list[int]]:
    return PageLayout.packed(num_pages, page_bytes), [num_pages * page_bytes]


def _collect(arrived: list[int]) -> Callable[[np.ndarray], None]:
    return lambda indices: arrived.extend(indices.tolist())


@contextlib.contextmanager
def _connected(transport: Transport, lent: Lent) -> Iterator[Connection]:
    connection = transport.connect(lent.owner, lent.descriptor)
    try:
        yield connection
    finally:
        connection.close()


@contextlib.contextmanager
def after_mapped_copy(action: Callable[[], None]) -> Iterator[None]:
    """`TransportConformance.during_copy` for backends that read mapped memory with `copy_pages`."""
    calls = []

    def copy_then_act(*args: Any) -> None:
        copy_pages(*args)
        calls.append(args)
        if len(calls) == 1:
            action()

    with mock.patch("kvmarket.transport.mapped.copy_pages", copy_then_act):
        yield
    assert calls, "nothing was copied"


def without_memories(lent: Lent) -> RegionDescriptor:
    """Return the descriptor of the same region in memory that only its own process can read."""
    return replace(lent.descriptor, memories=())
