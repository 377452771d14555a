"""The arena against a model, under every policy: leaf-first, nothing pinned or leased goes, no slot twice or lost."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmarket.errors import InvalidInputError
from kvmarket.region.arena import Arena
from kvmarket.region.eviction import POLICIES
from kvmarket.region.leases import LEASE_S, PageLeases

PAGE_BYTES = 64
nodes = st.lists(st.integers(0, 2), min_size=1, max_size=6)
seconds = st.integers(1, 12)


def prefix_keys(path):
    """Block keys of a prefix in a tree: the key of a block names all blocks before it."""
    return [bytes(path[: depth + 1]) for depth in range(len(path))]


def parents(keys):
    return [None, *keys[:-1]]


class ArenaMachine(RuleBasedStateMachine):
    policy = ""

    @initialize(slots=st.integers(6, 14))
    def make(self, slots):
        self.arena = Arena(slots * PAGE_BYTES + 7, PAGE_BYTES, policy=self.policy)
        self.arena.leases = PageLeases(slots, clock=lambda: self.now)
        self.slots = slots
        self.now = 0.0
        self.held, self.used = {}, {}
        self.pins, self.expiry = {}, {}
        self.leases = {}
        self.uses = 0

    def pinned(self):
        return {key for key, until in self.pins.items() if until > self.now}

    def leased(self):
        return {slot for slots, until in self.leases.values() if until > self.now for slot in slots}

    @rule(path=nodes, ttl=st.none() | seconds, partly=st.booleans())
    def publish(self, path, ttl, partly):
        keys = prefix_keys(path)
        absent = [key for key in keys if key not in self.held]
        pinned, leased, before = self.pinned(), self.leased(), dict(self.held)
        until = math.inf if ttl is None else self.now + ttl
        placed = self.arena.place(keys, parents(keys), self.now, until=until, partly=partly)
        for key, slot in placed.evicted:
            assert self.held.pop(key) == slot
            assert key not in keys, "a prefix must not evict itself"
            assert key not in pinned, "a pinned block was evicted"
            assert slot not in leased, "a block was evicted under a lease"
            assert not [other for other in self.held if other[:-1] == key], "a block went before its child"
            self.check_order(key, keys, pinned, leased)
            del self.used[key], self.expiry[key]
            self.pins.pop(key, None)
        assert len(placed.new) == len(absent) or placed.missing
        if placed.missing:
            spared = {key for key in before if key in keys or key in pinned or before[key] in leased}
            inner = {key for key in before if any(s != key and s[: len(key)] == key for s in spared)}
            still_read = len(leased - set(before.values()))
            assert len(absent) > self.slots - len(spared | inner) - still_read, (
                "something could still have been evicted"
            )
            assert not placed.new or (partly and set(self.held) <= spared | inner)
        assert [keys[row] for row in placed.new] == absent[: len(placed.new)]
        assert not set(placed.slots) & leased, "a slot was given away under a lease"
        assert not set(placed.slots) & set(self.held.values()), "a slot in use was given away"
        assert len(placed.slots) == len(set(placed.slots)) == len(placed.new)
        if placed.slots:
            assert self.arena.leases.hold(placed.slots[:1]) == 0, "a lease of what is being written"
            self.arena.leases.take_uses()
        self.arena.filled(placed.slots)
        self.held.update({keys[row]: slot for row, slot in zip(placed.new, placed.slots, strict=True)})
        present = [key for key in keys if key in self.held]
        self.use(present)
        for key in present if placed.new or partly or not absent else []:  # a publish that failed extends nothing
            self.expiry[key] = max(self.expiry.get(key, 0), until)

    def check_order(self, victim, keys, pinned, leased):
        """Under LRU, what goes is the least recently used of all that may go."""
        if self.policy != "lru":
            return
        spared = {key for key in self.held if key in keys or key in pinned or self.held[key] in leased}
        there = [*self.held, victim]
        leaves = {key for key in self.held if not any(other[:-1] == key for other in there)} - spared
        assert self.used[victim] <= min([self.used[key] for key in leaves], default=self.uses)

    @rule(path=nodes)
    def touch(self, path):
        keys = prefix_keys(path)
        self.arena.touch(keys)
        self.use([key for key in keys if key in self.held])

    @rule(path=nodes, duration=seconds)
    def pin(self, path, duration):
        keys = prefix_keys(path)
        count = next((i for i, key in enumerate(keys) if key not in self.held), len(keys))
        if len(self.pinned() | set(keys[:count])) > self.slots // 2:
            with pytest.raises(InvalidInputError, match="ARENA_BYTES"):
                self.arena.pin(keys, self.now + duration, self.now)
            return
        assert self.arena.pin(keys, self.now + duration, self.now) == count
        for key in keys[:count]:
            self.pins[key] = max(self.pins.get(key, 0), self.now + duration)

    @rule(path=nodes)
    def unpin(self, path):
        self.arena.end_pins(self.now)
        keys = prefix_keys(path)
        assert self.arena.unpin(keys) == len(self.pinned() & set(keys))
        for key in keys:
            self.pins.pop(key, None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def lease(self, data):
        slots = data.draw(st.lists(st.sampled_from(sorted(self.held.values())), min_size=1, max_size=3, unique=True))
        number = self.arena.leases.hold(slots)
        assert bool(number) == (len(self.leased()) + len(slots) <= self.slots // 2)
        self.uses += 1
        for key, slot in self.held.items():
            if slot in slots:
                self.used[key] = self.uses
        if number:
            self.leases[number] = slots, self.now + LEASE_S

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end_lease(self, data):
        number = data.draw(st.sampled_from(sorted(self.leases)))
        self.arena.leases.release(number)
        del self.leases[number]

    @rule(path=nodes)
    def withdraw_a_subtree(self, path):
        """As a publisher does, which never keeps a block whose parent it gave up."""
        root = bytes(path)
        keys = [key for key in self.held if key[: len(root)] == root]
        self.gone(keys, self.arena.release(keys))
        assert self.arena.release(keys) == []

    @rule(passed=seconds)
    def time_passes(self, passed):
        self.now += passed
        due = [key for key, until in self.expiry.items() if until <= self.now]
        assert (self.arena.next_expiry() <= self.now) == bool(due)
        self.gone(due, self.arena.expire(self.now))

    @rule()
    def clear(self):
        self.gone(list(self.held), self.arena.clear())

    def gone(self, keys, released):
        assert sorted(released) == sorted((key, self.held.pop(key)) for key in keys)
        for key in keys:
            del self.used[key], self.expiry[key]
            self.pins.pop(key, None)

    def use(self, keys):
        self.uses += 1
        for key in keys:
            self.used[key] = self.uses

    @invariant()
    def the_arena_holds_what_the_model_holds(self):
        assert {key: self.arena.slot(key) for key in self.held} == self.held
        assert len(self.arena) == len(self.held) <= self.arena.capacity == self.slots
        assert set(self.held.values()) | set(self.arena._free) == set(range(self.slots)), "a slot was lost"
        assert len(self.held) + len(self.arena._free) == self.slots
        assert self.arena.slot(b"unknown") is None

    @invariant()
    def no_block_without_its_parent(self):
        """Leaf-first: a block whose parent was evicted could never be found."""
        for key in self.held:
            assert len(key) == 1 or key[:-1] in self.held

    def teardown(self):
        if hasattr(self, "arena"):
            self.arena.close()


class LruMachine(ArenaMachine):
    policy = "lru"


class S3FifoMachine(ArenaMachine):
    policy = "s3fifo"


TestLru, TestS3Fifo = LruMachine.TestCase, S3FifoMachine.TestCase
TestLru.settings = TestS3Fifo.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_every_policy_is_tried():
    assert {LruMachine.policy, S3FifoMachine.policy} == set(POLICIES)


def test_an_arena_too_small_for_a_page_names_the_setting():
    with pytest.raises(InvalidInputError, match="KVMARKET_ARENA_BYTES"):
        Arena(63, 64)
