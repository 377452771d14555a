"""A read on a card against an owner that rewrites its pages at any moment: nothing wrong is ever taken for good."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmarket.announced import Announced
from kvmarket.deadline import Deadline
from kvmarket.region.cuda import CudaPagedMemory
from kvmarket.region.pages import PageLayout
from kvmarket.report import MissReason
from kvmarket.testing.host_cuda import HostCuda, HostTransfer
from kvmarket.transport.cuda_stream import IN_FLIGHT, CudaStream
from kvmarket.verification import Verification

PAGES, PAGE_BYTES = 32, 16

ADD, END, REWRITE, OPEN, CANCEL = "add", "end", "rewrite", "open", "cancel"
actions = st.lists(
    st.one_of(
        st.tuples(st.just(ADD), st.integers(1, 6)),
        st.tuples(st.just(END), st.just(0)),
        st.tuples(st.sampled_from([REWRITE, OPEN]), st.integers(0, PAGES - 1)),
        st.tuples(st.just(CANCEL), st.just(0)),
    ),
    max_size=24,
)


class Card(HostCuda):
    """Ends its copies when told to."""

    def __init__(self):
        super().__init__()
        self.under_way, self.most = [], 0

    def copy(self, *args):
        card = self

        class Transfer(HostTransfer):
            over = False
            ended = property(lambda transfer: transfer.over)

            def wait(self):
                self.over = True
                if self in card.under_way:
                    card.under_way.remove(self)
                super().wait()

        transfer = Transfer(super().copy(*args)._copy, self)
        self.under_way.append(transfer)
        self.most = max(self.most, len(self.under_way))
        return transfer


@pytest.fixture
def memories():
    card, layout = Card(), PageLayout.packed(PAGES, PAGE_BYTES)
    arrays = [card.allocate(PAGES * PAGE_BYTES, 0) for _ in range(2)]
    yield SimpleNamespace(
        card=card,
        source=CudaPagedMemory.of(card, layout, arrays[:1]),
        local=CudaPagedMemory.of(card, layout, arrays[1:]),
        there=arrays[0].reshape(PAGES, PAGE_BYTES),
        here=arrays[1].reshape(PAGES, PAGE_BYTES),
    )
    card.close()


@pytest.mark.parametrize("mode", ["full", "none"])
@settings(  # the fixture has no state that a test does not set
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(actions=actions, group=st.integers(1, PAGES))
def test_what_is_not_refused_is_what_was_announced(memories, mode, actions, group):
    card, there, here = memories.card, memories.there, memories.here
    card.under_way, card.most = [], 0
    there[:] = np.random.default_rng(1).integers(0, 256, there.shape)
    announced, generations, deadline = there.copy(), np.full(PAGES, 2, np.uint64), Deadline(60)
    digests = card.digests(memories.source, np.arange(PAGES))
    stream = CudaStream("path", memories.local, memories.source, generations, group_bytes=group * PAGE_BYTES)
    checks, added, goes_on = [], 0, True

    for action, number in actions:
        if action == ADD and goes_on and added < PAGES:
            pages = np.arange(added, min(added + number, PAGES))
            known = Announced(pages, np.full(len(pages), 2, np.uint64), digests[pages].copy())
            checks.append((added, Verification(mode, known, memories.local, pages, "sum128")))
            goes_on = stream.add(checks[-1][1].request, deadline)
            added += len(pages)
        elif action == END and card.under_way:
            card.under_way[0].over = True
        elif action == OPEN:  # the owner has begun to write
            generations[number] |= 1
            there[number, ::2] ^= 0xFF
        elif action == REWRITE:  # and is done
            generations[number] |= 1
            there[number] ^= 0x55
            generations[number] += 1
        elif action == CANCEL:
            deadline.cancel()
    report = stream.finish()

    refused = dict(report.refused)
    for first, check in checks:
        refused |= {first + index: MissReason.DIGEST_MISMATCH for index in check.mismatched}
    assert set(refused) <= set(range(added)), "pages that nobody asked for"
    assert report.pages == added - len(report.refused), "each page is delivered or refused"
    good = [page for page in range(added) if page not in refused]
    assert (here[good] == announced[good]).all()
    assert MissReason.DIGEST_MISMATCH not in refused.values(), "the generations tell by themselves"
    if mode == "full":
        assert sum(check.blocks for _, check in checks) == report.pages, "each delivered page was verified"
    untouched = [page for page in range(added) if generations[page] == 2]
    if not any(action == CANCEL for action, _ in actions) and len(untouched) == added:
        assert refused == {}
    assert not card.under_way
    assert card.most <= IN_FLIGHT + 1
