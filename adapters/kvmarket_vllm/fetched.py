"""Which blocks of a worker were fetched and not offered yet, and with which digests they were compared on arrival."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class _Block(NamedTuple):
    request_id: str
    digest: bytes


class Fetched:
    """Blocks between their load and their offer. Used from the worker's thread only.

    What a request leaves behind is forgotten with it, since vLLM may give its blocks to others.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, _Block] = {}
        self._of_request: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def started(self, request_id: str, blocks: list[int]) -> None:
        """`blocks` are being loaded for a request."""
        self._of_request[request_id] = blocks
        self._blocks |= dict.fromkeys(blocks, _Block(request_id, b""))

    def loaded(self, request_id: str, digests: list[bytes]) -> None:
        """They are loaded, and were compared with these digests; none: not all were, or with others."""
        for block, digest in zip(self._of_request.get(request_id, ()), digests, strict=False):
            if self._blocks.get(block) == (request_id, b""):
                self._blocks[block] = _Block(request_id, digest)

    def forget_requests(self, request_ids: Iterable[str]) -> None:
        """Forget what these requests, which are over, have not had offered."""
        for request_id in request_ids:
            for block in self._of_request.pop(request_id, ()):
                if (known := self._blocks.get(block)) is not None and known.request_id == request_id:
                    del self._blocks[block]

    def take(self, block: int) -> bytes | None:
        """Return the digest of a block that is offered now, empty where it is not known; None: it was not fetched."""
        known = self._blocks.pop(block, None)
        return None if known is None else known.digest
