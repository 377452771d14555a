"""Eviction policies by themselves: who goes first, and what a scan does to what is popular."""

import random

import pytest

from kvmarket.errors import InvalidInputError
from kvmarket.region.eviction import POLICIES, make_policy
from kvmarket.region.leases import LEASE_S, PageLeases

CAPACITY, BLOCKS = 400, 4


def prefix(kind, number, blocks=BLOCKS):
    return [f"{kind}-{number}-{block}".encode() for block in range(blocks)]


def ask(policy, keys, capacity=CAPACITY):
    """Use a prefix and add what is missing of it; returns how many leading blocks were there."""
    hit = next((i for i, key in enumerate(keys) if key not in policy), len(keys))
    policy.touch(keys)
    for key in keys[:hit]:
        policy.protect(key)
    while len(policy) > capacity - (len(keys) - hit):
        assert policy.evict() is not None
    for key in keys[:hit]:
        policy.unprotect(key)
    parents = [None, *keys[:-1]]
    for i in range(len(keys) - 1, hit - 1, -1):
        policy.insert(keys[i], parents[i])
    return hit


@pytest.mark.parametrize("name", POLICIES)
def test_a_scan_of_ten_times_the_capacity(name):
    """LRU loses all that was popular before the scan; S3-FIFO keeps nearly all of it."""
    rng, policy = random.Random(3), make_policy(name, CAPACITY)
    popular = 60  # prefixes, in an arena of 100
    weights = [1 / (rank + 1) for rank in range(popular)]
    for number in rng.choices(range(popular), weights, k=3000):
        ask(policy, prefix("hot", number))
    for number in range(10 * CAPACITY // BLOCKS):
        ask(policy, prefix("scan", number))
    kept = sum(key in policy for number in range(popular) for key in prefix("hot", number)) / (popular * BLOCKS)
    print(name, "kept", kept)
    assert len(policy) == CAPACITY
    assert (kept == 0) if name == "lru" else (kept > 0.75)


@pytest.mark.parametrize("name", POLICIES)
def test_zipf_with_a_scan_mixed_in(name):
    """Every second request is never repeated: the popular ones still hit, more often under S3-FIFO."""
    ratios = {}
    for policy_name in ("lru", name):
        rng, policy = random.Random(5), make_policy(policy_name, CAPACITY)
        asked = hits = 0
        for number, rank in enumerate(rng.choices(range(300), [1 / (r + 1) for r in range(300)], k=6000)):
            hits += ask(policy, prefix("hot", rank))
            asked += BLOCKS
            ask(policy, prefix("scan", number))
        ratios[policy_name] = hits / asked
    print(ratios)
    assert ratios["lru"] > 0.3
    assert name == "lru" or ratios[name] > ratios["lru"] + 0.05


@pytest.mark.parametrize("name", POLICIES)
def test_a_prefix_goes_from_its_end(name):
    policy = make_policy(name, 100)
    keys = prefix("a", 0, blocks=6)
    ask(policy, keys, 100)
    assert [policy.evict() for _ in range(6)] == keys[::-1]
    assert policy.evict() is None


@pytest.mark.parametrize("name", POLICIES)
def test_a_protected_leaf_keeps_its_whole_prefix(name):
    policy = make_policy(name, 100)
    keys, others = prefix("a", 0), prefix("b", 0)
    ask(policy, keys, 100)
    ask(policy, others, 100)
    policy.protect(keys[-1])
    assert {policy.evict() for _ in range(BLOCKS)} == set(others)
    assert policy.evict() is None
    policy.unprotect(keys[-1])
    assert [policy.evict() for _ in range(BLOCKS)] == keys[::-1]


@pytest.mark.parametrize("name", POLICIES)
def test_a_parent_that_arrives_after_its_child_goes_after_it(name):
    policy = make_policy(name, 100)
    policy.insert(b"child", b"parent")
    policy.insert(b"parent", None)
    for _ in range(4):
        policy.touch([b"child"])
    assert [policy.evict(), policy.evict()] == [b"child", b"parent"]


@pytest.mark.parametrize("name", POLICIES)
def test_what_comes_and_goes_leaves_nothing_in_the_order(name):
    policy = make_policy(name, 100)
    for number in range(5000):
        policy.insert(b"%d" % number, None)
        policy.remove(b"%d" % number)
    assert len(policy) == 0
    assert all(len(vars(policy).get(queue, ())) <= 100 for queue in ("_heap", "_small", "_main", "_ghosts"))


def test_s3_fifo_takes_back_at_once_what_it_let_go_too_early():
    policy = make_policy("s3fifo", 20)
    policy.insert(b"again", None)
    assert policy.evict() == b"again"
    policy.insert(b"again", None)
    for number in range(40):
        ask(policy, [b"%d" % number], 20)
    assert b"again" in policy


def test_a_policy_that_there_is_not():
    with pytest.raises(InvalidInputError, match="'mru'; there are: lru, s3fifo"):
        make_policy("mru", 10)
    policy = make_policy("lru", 10)
    policy.insert(b"a", None)
    with pytest.raises(InvalidInputError, match="already"):
        policy.insert(b"a", None)


def test_leases_end_or_run_out():
    now = 0.0
    leases = PageLeases(8, clock=lambda: now)
    first, second = leases.hold([1, 2]), leases.hold([2, 3])
    assert leases.held() == {1, 2, 3}
    assert leases.hold([4, 5]) == 0, "half of the pages at most"
    leases.release(first)
    leases.release(first)
    assert leases.held() == {2, 3}
    assert not leases.claim(2)
    assert leases.claim(1)
    assert leases.hold([1]) == 0
    leases.unclaim([1])
    assert leases.hold([1])
    now = LEASE_S
    assert leases.held() == set()
    assert leases.claim(2)
    leases.release(second)
    assert leases.take_uses() == [[1, 2], [2, 3], [4, 5], [1], [1]]
    assert leases.take_uses() == []
