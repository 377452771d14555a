"""Remembered keys are those of a fresh calculation, whatever was asked before."""

import sys
import threading

import numpy as np
import pytest

from kvmarket import prefix_keys
from kvmarket.hashing import hash_blocks, token_array
from kvmarket.prefix_keys import PrefixKeys
from kvmarket.registry import block_keys

ROOT, SIZE = b"r" * 32, 4


def fresh(tokens, extra_keys=None):
    return block_keys(hash_blocks(tokens, SIZE, root=ROOT, extra_keys=extra_keys))


@pytest.fixture
def hashed(monkeypatch):
    """How many tokens each call of the hash function was given."""
    counts = []

    def count(tokens, *args, **kwargs):
        counts.append(len(tokens))
        return hash_blocks(tokens, *args, **kwargs)

    monkeypatch.setattr(prefix_keys, "hash_blocks", count)
    return counts


@pytest.mark.parametrize("seed", range(20))
def test_keys_are_those_of_a_fresh_calculation(seed):
    rng, keys = np.random.default_rng(seed), PrefixKeys(ROOT, SIZE, "sha256")
    prompts = [rng.integers(0, 3, rng.integers(1, 300)) for _ in range(4)]
    for _ in range(60):
        a, b = rng.integers(0, len(prompts), 2)
        tokens = np.concatenate([prompts[a][: rng.integers(1, 300)], prompts[b][: rng.integers(0, 40)]])
        assert keys.of(token_array(tokens)) == fresh(tokens)


def test_a_prompt_is_hashed_once_and_a_longer_one_from_there_on(hashed):
    keys, tokens = PrefixKeys(ROOT, SIZE, "sha256"), token_array(range(403))
    for count in (403, 403, 400, 17, 3):
        keys.of(tokens[:count])
    assert hashed == [403]
    longer = token_array([*range(402), *range(50)])
    assert keys.of(longer) == fresh(longer)
    assert hashed == [403, 52]


def test_what_callers_do_with_their_lists_and_arrays_changes_nothing():
    keys, tokens = PrefixKeys(ROOT, SIZE, "sha256"), token_array(range(40))
    keys.of(tokens).clear()
    keys.of(tokens).append(b"x")
    assert keys.of(token_array(range(40))) == fresh(range(40))
    tokens[0] = 7
    assert keys.of(tokens) == fresh(tokens)
    assert keys.of(token_array(range(40))) == fresh(range(40))


def test_extra_keys_are_never_mixed_with_plain_prompts(hashed):
    keys, tokens, extra = PrefixKeys(ROOT, SIZE, "sha256"), token_array(range(8)), [b"image", b""]
    assert keys.of(tokens) == fresh(tokens)
    assert keys.of(tokens, extra) == fresh(tokens, extra) != fresh(tokens)
    assert keys.of(tokens) == fresh(tokens)
    assert hashed == [8, 8]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(prefix_keys, "TOKENS_MAX", 100)
    keys = PrefixKeys(ROOT, SIZE, "sha256")
    for number in range(50):
        tokens = token_array([number, *range(500)])
        assert keys.of(tokens) == fresh(tokens)
    assert len(keys._prompts) == prefix_keys.PROMPTS_MAX
    assert {len(prompt.tokens) for prompt in keys._prompts} == {100}


def test_many_threads_get_their_own_keys(monkeypatch):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    keys, wrong = PrefixKeys(ROOT, SIZE, "sha256"), []

    def ask(number):
        for length in range(1, 120):
            tokens = token_array([*range(60), *range(number, number + length)])
            if keys.of(tokens) != fresh(tokens):
                wrong.append((number, length))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not wrong
