import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmarket.hashing import HASH_ALGORITHMS, TOKEN_ID_MAX, hash_blocks
from kvmarket.registry.records import HEAD_BYTES, MANY_KEYS, RUN_BLOCKS, block_key, block_keys

token_ids = st.integers(0, TOKEN_ID_MAX)
prompts = st.lists(token_ids, min_size=1, max_size=60)
block_sizes = st.integers(1, 16)
algorithms = st.sampled_from(HASH_ALGORITHMS)
roots = st.binary(min_size=1, max_size=40)


@given(prompts, block_sizes, roots, algorithms)
def test_a_longer_prompt_continues_the_hashes(tokens, block_size, root, algorithm):
    hashes = hash_blocks(tokens, block_size, root=root, algorithm=algorithm)
    assert len(hashes) == len(tokens) // block_size
    assert len(set(hashes)) == len(hashes)
    longer = hash_blocks([*tokens, *tokens], block_size, root=root, algorithm=algorithm)
    assert longer[: len(hashes)] == hashes


@given(prompts, block_sizes, roots, algorithms, st.data())
def test_a_change_changes_its_block_and_every_later_one(tokens, block_size, root, algorithm, data):
    position = data.draw(st.integers(0, len(tokens) - 1))
    other = list(tokens)
    other[position] = data.draw(token_ids.filter(lambda token: token != tokens[position]))
    before = hash_blocks(tokens, block_size, root=root, algorithm=algorithm)
    after = hash_blocks(other, block_size, root=root, algorithm=algorithm)
    block = position // block_size
    assert before[:block] == after[:block]
    assert all(a != b for a, b in zip(before[block:], after[block:], strict=True))


@given(prompts, block_sizes, algorithms, st.tuples(roots, roots).filter(lambda pair: pair[0] != pair[1]))
def test_another_root_changes_every_block(tokens, block_size, algorithm, pair):
    first, second = (hash_blocks(tokens, block_size, root=root, algorithm=algorithm) for root in pair)
    assert not set(first) & set(second)


@given(st.lists(st.binary(max_size=5), min_size=1, max_size=8), st.data())
def test_extra_keys_change_their_block_and_every_later_one(keys, data):
    tokens = list(range(4 * len(keys)))
    plain = hash_blocks(tokens, 4, root=b"r")
    keyed = hash_blocks(tokens, 4, root=b"r", extra_keys=keys)
    first = next((i for i, key in enumerate(keys) if key), len(keys))
    assert plain[:first] == keyed[:first]
    assert not set(plain[first:]) & set(keyed[first:])
    position = data.draw(st.integers(0, len(keys) - 1))
    other = [*keys[:position], keys[position] + b"x", *keys[position + 1 :]]
    changed = hash_blocks(tokens, 4, root=b"r", extra_keys=other)
    assert changed[:position] == keyed[:position]
    assert not set(changed[position:]) & set(keyed[position:])


@given(st.lists(st.binary(min_size=16, max_size=32), min_size=1, max_size=3 * RUN_BLOCKS, unique=True), st.data())
def test_registry_keys_do_not_depend_on_where_one_starts(hashes, data):
    keys = block_keys(hashes)
    start = data.draw(st.integers(0, len(hashes)))
    assert block_keys(hashes, start) == keys[start:]
    assert [block_key(hashes, index) for index in range(len(hashes))] == keys
    assert len(set(keys)) == len(keys)
    for index, key in enumerate(keys):
        assert key.endswith(hashes[index])
        assert key[:HEAD_BYTES] == hashes[index - index % RUN_BLOCKS][:HEAD_BYTES]


@pytest.mark.parametrize("more", [0, 5])
@pytest.mark.parametrize("start", [0, 1, RUN_BLOCKS, RUN_BLOCKS + 3])
def test_many_registry_keys_made_at_once_are_those_of_single_blocks(start, more):
    """Hashes of one length are; others, and few, are not."""
    hashes = [number.to_bytes(2, "big") * 16 for number in range(start + MANY_KEYS + more)]
    for asked in (hashes, [*hashes[:-1], b"longer" * 8], hashes[:-1]):
        keys = block_keys(asked, start)
        assert keys == [block_key(asked, index) for index in range(start, len(asked))]
        assert {type(key) for key in keys} == {bytes}
