"""Registry keys of prompts, remembered, so that prompts that begin alike are hashed once.

A prompt is usually looked up more than once: matched, fetched, published, and then again with what was said since.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmarket.hashing import hash_blocks
from kvmarket.registry.records import NOT_SEALED, RUN_BLOCKS, block_keys

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from kvmarket.secret import Sealer

PROMPTS_MAX = 8
GROUP_BLOCKS, GROUP_STEP, GROUP_BLOCKS_MAX, EQUAL_GROUPS = 2 * RUN_BLOCKS, RUN_BLOCKS, 8 * RUN_BLOCKS, 4
"""Of the first `EQUAL_GROUPS` groups of `PrefixKeys.groups`, what each further one has more, and of the largest. A card
copies 2 MiB in 1.4 us; hashing a block takes half of that or more, and a group some 40 us besides: so that the card
never waits, a group can be only a little larger than the one that is being copied meanwhile."""
TOKENS_MAX = 1 << 17
"""What goes beyond in a prompt is not remembered: 8 such prompts take some 12 MiB."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt: its tokens, (n,) uint32, and the hashes and keys of its full blocks."""

    tokens: np.ndarray
    hashes: list[bytes]
    keys: list[bytes]


class PrefixKeys:
    """Keys of the blocks of prompts in one namespace. Thread-safe.

    Args:
        root: the namespace's digest.
        block_size: tokens per block.
        algorithm: of the block hashes.
        seal: of a namespace with a secret.
    """

    def __init__(self, root: bytes, block_size: int, algorithm: str, seal: Sealer = NOT_SEALED) -> None:
        self._root, self._block_size, self._algorithm, self._seal = root, block_size, algorithm, seal
        self._lock = threading.Lock()
        self._prompts: list[_Prompt] = []

    def of(self, tokens: np.ndarray, extra_keys: Sequence[bytes] | None = None) -> list[bytes]:
        """Return the key of every full block of `tokens`. Errors as `kvmarket.hashing.hash_blocks`.

        Args:
            tokens: (n,) uint32, as `kvmarket.hashing.token_array` returns them.
            extra_keys: see `hash_blocks`; prompts with such are not remembered.
        """
        size, total = self._block_size, len(tokens) // self._block_size
        if extra_keys is not None:
            hashes = hash_blocks(tokens, size, root=self._root, algorithm=self._algorithm, extra_keys=extra_keys)
            return block_keys(hashes, seal=self._seal)
        if not total:
            return []
        known, shared = self._longest(tokens)
        if known is not None and shared == total:
            return known.keys[:shared]
        hashes, keys = ([], []) if known is None else (known.hashes[:shared], known.keys[:shared])
        self._extend(tokens, hashes, keys)
        self._remember(tokens, hashes, keys)
        return keys

    def _extend(self, tokens: np.ndarray, hashes: list[bytes], keys: list[bytes]) -> None:
        """Add to the hashes and keys of the first blocks of `tokens` those of all others."""
        size, have = self._block_size, len(hashes)
        parent = hashes[-1] if have else self._root
        hashes += hash_blocks(tokens[have * size :], size, root=parent, algorithm=self._algorithm)
        keys += block_keys(hashes, have, self._seal)

    def groups(self, tokens: np.ndarray) -> Iterator[list[bytes]]:
        """Yield what `of` returns in groups, small ones first, each as soon as it is known; arguments as of `of`.

        So a fetch can look up and copy the first blocks while the others are hashed.
        """
        total = len(tokens) // self._block_size
        if not total:
            return
        known, shared = self._longest(tokens)
        hashes, keys = ([], []) if known is None else (known.hashes[:shared], known.keys[:shared])
        for start, end in _bounds(total):
            if end > len(keys):
                self._extend(tokens[: end * self._block_size], hashes, keys)
            yield keys[start:end]
        if shared < total:
            self._remember(tokens, hashes, keys)

    def clear(self) -> None:
        """Forget all prompts."""
        with self._lock:
            self._prompts = []

    def _longest(self, tokens: np.ndarray) -> tuple[_Prompt | None, int]:
        """Return the remembered prompt that has the most leading blocks in common with `tokens`, and how many."""
        with self._lock:
            prompts = tuple(self._prompts)
        best: tuple[_Prompt | None, int] = (None, 0)
        for prompt in reversed(prompts):
            blocks = _common(prompt.tokens, tokens) // self._block_size
            if blocks > best[1]:
                best = prompt, blocks
            if blocks == len(tokens) // self._block_size:
                break
        return best

    def _remember(self, tokens: np.ndarray, hashes: list[bytes], keys: list[bytes]) -> None:
        blocks = min(len(hashes), TOKENS_MAX // self._block_size)
        if not blocks:
            return
        prompt = _Prompt(tokens[: blocks * self._block_size].copy(), hashes[:blocks], keys[:blocks])
        with self._lock:
            longer = [known for known in self._prompts if not _begins(prompt.tokens, known.tokens)]
            self._prompts = [*longer, prompt][-PROMPTS_MAX:]


def in_groups(keys: list[bytes]) -> Iterator[list[bytes]]:
    """Yield keys that are known in groups as large as those of `PrefixKeys.groups`."""
    for start, end in _bounds(len(keys)):
        yield keys[start:end]


def _bounds(total: int) -> Iterator[tuple[int, int]]:
    """Yield the first block of each group of `total` blocks, and the one behind its last."""
    start = number = 0
    while start < total:
        number += 1
        size = min(GROUP_BLOCKS + GROUP_STEP * max(0, number - EQUAL_GROUPS), GROUP_BLOCKS_MAX)
        end = min(start + size, total)
        yield start, end
        start = end


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many leading elements two arrays have in common."""
    count = min(len(a), len(b))
    if not count or a[0] != b[0]:
        return 0
    differ = a[:count] != b[:count]
    first = int(differ.argmax())
    return first if differ[first] else count


def _begins(tokens: np.ndarray, prefix: np.ndarray) -> bool:
    return _common(tokens, prefix) == len(prefix)
