"""The arena against a model: leaf-first eviction, no slot twice, nothing lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvmarket.errors import InvalidInputError
from kvmarket.region.arena import Arena

PAGE_BYTES = 64
nodes = st.lists(st.integers(0, 2), min_size=1, max_size=6)


def prefix_keys(path):
    """Block keys of a prefix in a tree: the key of a block names all blocks before it."""
    return [bytes(path[: depth + 1]) for depth in range(len(path))]


class ArenaMachine(RuleBasedStateMachine):
    @initialize(slots=st.integers(6, 12))
    def make(self, slots):
        self.arena = Arena(slots * PAGE_BYTES + 7, PAGE_BYTES)
        self.slots = slots
        self.held = {}
        self.clock = 0
        self.used = {}

    @rule(path=nodes)
    def publish(self, path):
        keys = prefix_keys(path)
        new = [key for key in keys if key not in self.held]
        self.arena.touch(keys)
        slots, evicted = self.arena.reserve(new)
        for key, slot in evicted:
            assert self.held.pop(key) == slot
            assert key not in keys, "a prefix must not evict itself"
            oldest = min([self.used[other] for other in self.held if other not in keys], default=self.used[key])
            assert self.used[key] <= oldest, "not the least recently used"
        assert len(slots) == len(set(slots)) == len(new)
        assert not set(slots) & set(self.held.values()), "a slot in use was given away"
        self.held.update(zip(new, slots, strict=True))
        self.arena.touch(keys)
        self._use(keys)

    @rule(path=nodes)
    def touch(self, path):
        keys = prefix_keys(path)
        self.arena.touch(keys)
        self._use([key for key in keys if key in self.held])

    @rule(path=nodes)
    def withdraw_a_subtree(self, path):
        """As a publisher does, which never keeps a block whose parent it gave up."""
        root = bytes(path)
        keys = [key for key in self.held if key[: len(root)] == root]
        assert sorted(self.arena.release(keys)) == sorted(self.held.pop(key) for key in keys)
        assert self.arena.release(keys) == []

    @rule()
    def clear(self):
        assert sorted(self.arena.clear()) == sorted(self.held.values())
        self.held.clear()

    @rule()
    def ask_for_too_much(self):
        with pytest.raises(InvalidInputError, match="ARENA_BYTES"):
            self.arena.reserve([bytes([9, i]) for i in range(self.slots + 1)])

    def _use(self, keys):
        self.clock += 1
        for key in keys:
            self.used[key] = self.clock

    @invariant()
    def the_arena_holds_what_the_model_holds(self):
        assert {key: self.arena.slot(key) for key in self.held} == self.held
        assert len(self.arena) == len(self.held) <= self.arena.capacity == self.slots
        assert self.arena.slot(b"unknown") is None

    @invariant()
    def no_block_without_its_parent(self):
        """Leaf-first: a block whose parent was evicted could never be found."""
        for key in self.held:
            assert len(key) == 1 or key[:-1] in self.held

    def teardown(self):
        if hasattr(self, "arena"):
            self.arena.close()


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_an_arena_too_small_for_a_page_names_the_setting():
    with pytest.raises(InvalidInputError, match="KVMARKET_ARENA_BYTES"):
        Arena(63, 64)
