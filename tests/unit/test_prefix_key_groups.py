"""Keys in groups are those that come at once."""

import numpy as np
import pytest

from kvmarket.prefix_keys import GROUP_BLOCKS, PrefixKeys, in_groups
from kvmarket.registry.records import RUN_BLOCKS

ROOT = b"r" * 32


def keys_in_groups(known, tokens):
    return [key for group in known.groups(tokens) for key in group]


@pytest.mark.parametrize("algorithm", ["sha256", "xxh3_128"])
@pytest.mark.parametrize("count", [0, 3, 4, 31, 128, 4 * GROUP_BLOCKS, 4003])
def test_groups_add_up(count, algorithm):
    tokens = np.random.default_rng(count).integers(0, 1000, count).astype("<u4")
    expected = PrefixKeys(ROOT, 4, algorithm).of(tokens)
    known = PrefixKeys(ROOT, 4, algorithm)
    assert keys_in_groups(known, tokens) == expected
    assert keys_in_groups(known, tokens) == expected, "remembered"
    assert known.of(tokens) == expected
    longer = np.concatenate((tokens, tokens))
    assert keys_in_groups(known, longer) == PrefixKeys(ROOT, 4, algorithm).of(longer), "part of it remembered"


def test_groups_hold_whole_runs_and_the_first_is_short():
    groups = list(PrefixKeys(ROOT, 1, "sha256").groups(np.zeros(3000, "<u4")))
    assert len(groups[0]) == GROUP_BLOCKS
    assert all(len(group) % RUN_BLOCKS == 0 for group in groups[:-1])
    assert max(map(len, groups)) == 4 * GROUP_BLOCKS
    assert list(in_groups([key for group in groups for key in group])) == groups
    assert list(in_groups([])) == []


def test_only_what_was_asked_for_is_hashed(monkeypatch):
    hashed = []

    def count(tokens, *args, **options):
        hashed.append(len(tokens))
        return original(tokens, *args, **options)

    from kvmarket import prefix_keys

    original = prefix_keys.hash_blocks
    monkeypatch.setattr(prefix_keys, "hash_blocks", count)
    next(PrefixKeys(ROOT, 1, "sha256").groups(np.zeros(3000, "<u4")))
    assert hashed == [GROUP_BLOCKS]
