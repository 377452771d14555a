import subprocess
import sys

import numpy as np
import pytest

from kvmarket.errors import ConfigError, InvalidInputError, MissingExtraError
from kvmarket.hashing import HASH_ALGORITHMS, TOKEN_ID_MAX, hash_blocks, hash_function, token_array

ROOT = bytes(range(32))
TOKENS = [7, 0, 1, TOKEN_ID_MAX, 5, 6, 7, 8, 9]
GOLDEN = {  # h[0] and h[1] of TOKENS in blocks of 4 from ROOT; a change here makes every older process miss
    "sha256": (
        "5b7ca139e7ddb2ddab956b6cbf9eb6a2e8132807502b30835010df60b7afa22b "
        "bd84d5047c610afe605b3211c254e3992abfa05ca232bc2453152d5a0b07814c"
    ),
    "blake3": (
        "53b204fceb4f09ecc53a9c1e0c21a34a34794ccc16bd91d96cfb082e448c2b78 "
        "e27925378a1fabe70b8423e8ab2ad4500b6258d3ae2572a084728738e9c562e7"
    ),
    "xxh3_128": "a8667a0a8830bd3c5a091713596b6d45 e32b9311b15a0cce5d9c0892861263bf",
    "xxh3_64": "1613fd0673075aa3 ff1d96703e793dd6",
}


@pytest.fixture(params=HASH_ALGORITHMS)
def algorithm(request):
    if request.param == "blake3":
        pytest.importorskip("blake3")
    return request.param


def test_the_hashes_are_pinned(algorithm):
    hashes = hash_blocks(TOKENS, 4, root=ROOT, algorithm=algorithm)
    assert [value.hex() for value in hashes] == GOLDEN[algorithm].split()


def test_extra_keys_are_pinned():
    hashes = hash_blocks(TOKENS, 4, root=ROOT, extra_keys=[b"", b"image"])
    assert hashes[0].hex() == GOLDEN["sha256"].split()[0], "no key is no change"
    assert hashes[1].hex() == "2a64cf46e7b659d07a0df160016d68f76664462e69346436fef02b97f384df40"


def test_all_kinds_of_token_lists_give_the_same_hashes(algorithm):
    torch = pytest.importorskip("torch")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    expected = hash_blocks(tokens, 4, root=ROOT, algorithm=algorithm)
    kinds = [
        tuple(tokens),
        *(np.array(tokens, dtype) for dtype in ("u1", "i2", "u4", "i8", ">i4", ">u8")),
        np.repeat(np.array(tokens), 2)[::2],
        torch.tensor(tokens),
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor([tokens, tokens]).T[:, 0],
        [np.int64(token) for token in tokens],
    ]
    for kind in kinds:
        assert hash_blocks(kind, 4, root=ROOT, algorithm=algorithm) == expected


def test_hashes_do_not_depend_on_the_process(algorithm):
    code = (
        "from kvmarket.hashing import hash_blocks;"
        f"print(*(h.hex() for h in hash_blocks({TOKENS}, 4, root={ROOT!r}, algorithm={algorithm!r})))"
    )
    for seed in ("0", "1", "random"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == GOLDEN[algorithm].split()


def test_the_input_is_not_modified():
    tokens = np.array([1, 2, 3, 4], ">i8")
    hash_blocks(tokens, 2, root=ROOT)
    assert tokens.dtype == ">i8"
    assert tokens.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "empty"),
        (np.empty(0, np.int64), "empty"),
        ("hello", "tokenise"),
        (b"raw", "tokenise"),
        ([[1, 2], [3, 4]], "one dimension"),
        ([[1, 2], [3]], "one array"),
        (5, "one dimension"),
        (None, "one dimension"),
        ([1, -1], "within"),
        ([TOKEN_ID_MAX + 1], "within"),
        ([2**70], "integers"),
        ([1.0, 2.0], "integers"),
        ([1.5], "integers"),
        ([float("nan")], "integers"),
        (["1"], "integers"),
        ([None], "integers"),
        ([True, False], "integers"),
        ([1 + 0j], "integers"),
    ],
)
def test_bad_tokens_are_refused(tokens, message):
    with pytest.raises(InvalidInputError, match=message):
        token_array(tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "complex64"])
def test_tensors_of_other_types_are_refused(dtype):
    torch = pytest.importorskip("torch")
    with pytest.raises(InvalidInputError, match="integers"):
        token_array(torch.ones(4, dtype=getattr(torch, dtype)))


@pytest.mark.parametrize(
    "options",
    [
        {"extra_keys": [b"a"]},
        {"extra_keys": [b"a"] * 3},
        {"extra_keys": [b"a", "b"]},
        {"extra_keys": [b"a", None]},
        {"block_size": 0},
        {"block_size": -4},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(InvalidInputError):
        hash_blocks(TOKENS, **{"block_size": 4, "root": ROOT, **options})


def test_unknown_algorithms_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"'md5'.*sha256"):
        hash_function("md5")


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kvmarket\[blake3\]'") as caught:
        hash_function("blake3")
    assert caught.value.extra == "blake3"
    assert isinstance(caught.value, ImportError)
