"""What UCX says of the protocols it chose: the tables that ``UCX_PROTO_INFO=y`` has it print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROW = re.compile(r"\|\s*(\S[^|]*?)\s*\|\s*([^|]*?)\s*\|(?:\s*([^|]*?)\s*\|)?\s*$")
_SIZES = re.compile(r"(\d+[KMG]?)(?:\.\.(\d+[KMG]?|inf))?$")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True, slots=True)
class Protocol:
    """One row of a table.

    Attributes:
        operation: what the table is of, as ``rendezvous data fetch into cuda/GPU0 from cuda``.
        first: smallest size in bytes that the row is of.
        last: largest size.
        how: the protocol.
        lanes: what carries it.
    """

    operation: str
    first: float
    last: float
    how: str
    lanes: str


def protocols(text: str) -> Iterator[Protocol]:
    """Find the rows of all tables in UCX's output, among whatever else is there."""
    operation = ""
    for line in text.splitlines():
        row = _ROW.search(line)
        if row is None:
            continue
        left, middle, right = row.groups()
        sizes = _SIZES.match(left)
        if sizes is None:
            operation = middle
        else:
            first = _size(sizes[1])
            yield Protocol(operation, first, _size(sizes[2] or sizes[1]), middle, right or "")


def of_gpu_messages(text: str, nbytes: int) -> list[Protocol]:
    """Return what UCX chose for messages of `nbytes` out of GPU memory, and for fetching them into it."""
    return [
        found
        for found in protocols(text)
        if found.first <= nbytes <= found.last
        and found.operation.startswith(("active message", "rendezvous"))
        and "from cuda" in found.operation
    ]


def _size(text: str) -> float:
    return float("inf") if text == "inf" else int(text.rstrip("KMG")) * _UNITS.get(text[-1], 1)
