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
        self._news: list[tuple[str, Sequence[int], list[bytes]]] = []

    def __len__(self) -> int:
        self._take_in()
        return len(self._request_of)

    def started(self, request_id: str, blocks: list[int]) -> None:
        """`blocks` are being loaded for a request."""
        self._blocks_of[request_id] = blocks
        self._news.append((request_id, blocks, []))

    def loaded(self, request_id: str, digests: list[bytes]) -> None:
        """They are loaded, and were compared with these digests; none: not all were, or with others."""
        blocks = self._blocks_of.get(request_id)
        if blocks is not None and len(blocks) == len(digests):
            self._news.append((request_id, blocks, digests))

    def computed(self, blocks: Sequence[int]) -> None:
        """`blocks` hold what was computed; they are not fetched any more, if they were."""
        if self._blocks_of:
            self._news.append(("", blocks, []))

    def _take_in(self) -> None:
        """Enter block by block what was told since the last time: not at once, since a request waits for its load."""
        news, self._news = self._news, []
        for request_id, blocks, digests in news:
            if digests:
                self._digest_of |= zip(blocks, digests, strict=True)
                continue
            if self._digest_of:  # also of requests that are over, which is told later in the same step
                for block in blocks:
                    self._digest_of.pop(block, None)
            if request_id:
                self._request_of |= dict.fromkeys(blocks, request_id)
            else:
                for block in blocks:
                    self._request_of.pop(block, None)

    def forget_requests(self, request_ids: Iterable[str]) -> None:
        """Forget what these requests, which are over, have not had offered."""
        self._take_in()
        for request_id in request_ids:
            blocks = self._blocks_of.pop(request_id, ())
            self.take([block for block in blocks if self._request_of.get(block) == request_id])

    def forget_digests(self) -> None:
        """Forget what blocks were compared with: they may be offered as something else than what they hold now."""
        self._take_in()
        self._digest_of.clear()

    def take(self, blocks: Sequence[int]) -> list[bytes | None]:
        """Return the digest of each of `blocks`, which are offered now or never will be, and forget them.

        It is empty where it is not known, and None where the block was not fetched.
        """
        self._take_in()
        requests = map(self._request_of.pop, blocks, repeat(None))  # a prompt's worth at once
        digests = map(self._digest_of.pop, blocks, repeat(b""))
        return [None if request is None else digest for request, digest in zip(requests, digests, strict=True)]
