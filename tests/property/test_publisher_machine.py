"""Publishing in place against a model: whatever is readable holds the bytes of the block it is announced as."""

import contextlib
import logging
import os

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmarket.deadline import Deadline
from kvmarket.errors import RegistryUnavailableError
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.metrics import Metrics
from kvmarket.publish import Publisher
from kvmarket.region.generations import readable
from kvmarket.region.pages import PagedMemory
from kvmarket.region.region import LentRegion
from kvmarket.registry.memory import MemoryRegistry
from kvmarket.testing.samples import SPEC

PAGES = 6
KEYS = [bytes([number]) * 44 for number in range(10)]
pages = st.integers(0, PAGES - 1)
NAMESPACE = Namespace(ModelIdentity("m"), SPEC)


class FailingRegistry(MemoryRegistry):
    """Refuses to be written to while `broken`."""

    broken = False

    def announce(self, *args):
        self._check()
        return super().announce(*args)

    def withdraw(self, *args):
        self._check()
        return super().withdraw(*args)

    def _check(self):
        if self.broken:
            raise RegistryUnavailableError("broken for a while")


class PublisherMachine(RuleBasedStateMachine):
    @initialize()
    def make(self):
        self.registry = FailingRegistry()
        self.registry.open_namespace(NAMESPACE.digest, {})
        self.owner = self.registry.register_owner(os.urandom(16))
        self.bytes = np.zeros((PAGES, 64), np.uint8)
        self.region = LentRegion(0, self.owner.incarnation, PagedMemory.packed(self.bytes), (), SPEC.fingerprint)
        self.publisher = Publisher(NAMESPACE, self.registry, self.owner, self.region, Metrics(), with_digests=True)
        self.offered = {}
        self.lost = set()
        self.outdated = False

    @rule(key=st.sampled_from(KEYS), page=pages, delay_s=st.sampled_from((0.0, 0.002)))
    def compute_and_offer(self, key, page, delay_s):
        """What an engine does: free a page, compute into it, offer it, maybe before the old record is withdrawn."""
        if key in self.offered:
            return
        self.publisher.retract([page], delay_s=delay_s)
        self.offered = {other: where for other, where in self.offered.items() if where != page}
        self.bytes[page] = key[0]
        self.publisher.offer([key], [page])
        self.offered[key] = page
        if self.registry.broken or self.outdated:
            self.lost.add(key)
        if self.outdated and not self.registry.broken:
            self.lost |= set(self.offered)
        self.settle()
        self.outdated &= self.registry.broken

    @rule(key=st.sampled_from(KEYS), page=pages)
    def offer_again(self, key, page):
        """A block that is offered already is left alone, wherever else it is said to be."""
        if key in self.offered:
            self.publisher.offer([key], [page])
            self.settle()

    @rule(freed=st.lists(pages, max_size=4), delay_s=st.sampled_from((0.0, 0.002)))
    def retract(self, freed, delay_s=0.0):
        self.publisher.retract(freed, delay_s=delay_s)
        for page in freed:
            self.bytes[page] = 255
        self.offered = {key: page for key, page in self.offered.items() if page not in freed}
        self.settle()

    @rule()
    def forget_all(self):
        self.publisher.forget_all()
        self.offered.clear()
        self.outdated = False
        self.settle()

    @rule()
    def another_process_bumps_the_epoch(self):
        self.registry.bump_epoch(NAMESPACE.digest)
        self.outdated = True
        self.lost |= set(self.offered)  # unreachable from now on; forgotten when this process notices

    @rule()
    def this_process_bumps_the_epoch(self):
        self.publisher.forget_all(self.registry.bump_epoch(NAMESPACE.digest))
        self.offered.clear()
        self.lost.clear()
        self.outdated = False

    @precondition(lambda self: not self.registry.broken)
    @rule()
    def the_registry_breaks(self):
        self.registry.broken = True

    @precondition(lambda self: self.registry.broken)
    @rule()
    def the_registry_recovers(self):
        self.registry.broken = False

    def settle(self):
        with contextlib.suppress(RegistryUnavailableError):
            self.publisher.flush(Deadline(10))
        forgotten = {key for key in self.offered if self.publisher.page_of(key) is None}
        assert forgotten <= self.lost, "a block was dropped that nothing had happened to"
        for key in forgotten:
            del self.offered[key]
        self.lost &= set(self.offered)

    @invariant()
    def what_is_readable_is_right(self):
        values = self.region.generations.values
        for key in KEYS:
            found = self.registry.lookup(NAMESPACE.digest, [key]).records
            for record in found:
                page = np.array([record["page"]])
                if readable(values, page, np.array([record["generation"]], np.uint64))[0]:
                    assert (self.bytes[page[0]] == key[0]).all()
                    assert self.offered.get(key) == page[0]

    @invariant()
    def what_is_offered_is_found(self):
        for key, page in self.offered.items():
            if key not in self.lost:
                record = self.registry.lookup(NAMESPACE.digest, [key]).records[0]
                assert record["page"] == page
                assert record["generation"] == self.region.generations.values[page]

    def teardown(self):
        if hasattr(self, "publisher"):
            self.publisher.close()
            values = self.region.generations.values
            assert not ((values & np.uint64(1) == 0) & (values != 0)).any(), "closed, and still readable"
            self.region.close()


class TestPublisher(PublisherMachine.TestCase):
    settings = settings(max_examples=60, stateful_step_count=25, deadline=None)

    @pytest.fixture(autouse=True)
    def no_warnings_kept(self, caplog):
        """Captured warnings hold errors, those hold frames, and those hold regions."""
        caplog.set_level(logging.CRITICAL, "kvmarket.publish")
