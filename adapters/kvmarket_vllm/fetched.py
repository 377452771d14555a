"""Which blocks of a worker were fetched and not offered yet, and with which digests they were compared on arrival."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Fetched:
    """Blocks between their load and their offer. Used from the worker's thread only.

    What a request leaves behind is forgotten with it, since vLLM may give its blocks to others.
    """

    def __init__(self) -> None:
        self._request_of: dict[int, str] = {}
        self._digest_of: dict[int, bytes] = {}
        self._blocks_of: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._request_of)

    def started(self, request_id: str, blocks: list[int]) -> None:
        """`blocks` are being loaded for a request."""
        self._blocks_of[request_id] = blocks
        self._request_of |= dict.fromkeys(blocks, request_id)
        if self._digest_of:  # of requests that are over, which is told later in the same step
            for block in blocks:
                self._digest_of.pop(block, None)

    def loaded(self, request_id: str, digests: list[bytes]) -> None:
        """They are loaded, and were compared with these digests; none: not all were, or with others."""
        blocks = self._blocks_of.get(request_id)
        if blocks is not None and len(blocks) == len(digests):
            self._digest_of |= zip(blocks, digests, strict=True)

    def forget_requests(self, request_ids: Iterable[str]) -> None:
        """Forget what these requests, which are over, have not had offered."""
        for request_id in request_ids:
            blocks = self._blocks_of.pop(request_id, ())
            self.take([block for block in blocks if self._request_of.get(block) == request_id])

    def forget_digests(self) -> None:
        """Forget what blocks were compared with: they may be offered as something else than what they hold now."""
        self._digest_of.clear()

    def take(self, blocks: Sequence[int]) -> list[bytes | None]:
        """Return the digest of each of `blocks`, which are offered now or never will be, and forget them.

        It is empty where it is not known, and None where the block was not fetched.
        """
        requests = map(self._request_of.pop, blocks, repeat(None))  # a prompt's worth at once
        digests = map(self._digest_of.pop, blocks, repeat(b""))
        return [None if request is None else digest for request, digest in zip(requests, digests, strict=True)]
