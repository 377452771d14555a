"""Why was nothing found: the question every user of a prefix cache asks."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

from kvmarket.identity import Namespace, describe_differences
from kvmarket.report import MissReason

if TYPE_CHECKING:
    from kvmarket.registry import LookupResult, Registry

_HASH_FIELDS = ("hash.algorithm", "hash.root", "engine.python")  # an engine's hashes may go through Python's pickle
_NAMESPACES_MAX = 32
EXPLAIN_EVERY_S = 5.0
"""How often a registry that is not local is asked why nothing is found: it takes several round trips."""


class Explanations:
    """Says why look-ups in one namespace did not find more. Thread-safe."""

    def __init__(self, registry: Registry, namespace: Namespace) -> None:
        self._registry, self._namespace = registry, namespace
        self._lock = threading.Lock()
        self._last: tuple[float, MissReason, str] = (-math.inf, MissReason.NOT_PUBLISHED, "")

    def why(self, result: LookupResult, asked: int) -> tuple[MissReason, str]:
        """Say why a look-up of `asked` blocks did not find more."""
        if result.blocks == asked:
            return MissReason.NONE, ""
        if result.blocks == 0 and result.first_missing == "not_published":
            return self._nothing_found()
        return MissReason(result.first_missing), f"block {result.blocks} is not held by a live owner"

    def _nothing_found(self) -> tuple[MissReason, str]:
        """Say why nothing at all was found. Where the registry is not local, an answer is good for a while."""
        if self._registry.local:
            return explain_nothing_found(self._registry, self._namespace)
        now = time.monotonic()
        with self._lock:
            if now - self._last[0] > EXPLAIN_EVERY_S:
                self._last = (now, *explain_nothing_found(self._registry, self._namespace))
            return self._last[1:]


def explain_nothing_found(registry: Registry, namespace: Namespace) -> tuple[MissReason, str]:
    """Say why no block at all of a prefix was found in `namespace`.

    When nobody publishes in it but somebody does in others, the closest of those is named with the fields that differ:
    another dtype, another revision, another tenant, another hash seed. Those with another secret are as if they were
    not there: what is said must not tell what they hold. A namespace with one publisher (maybe the asker itself) beside
    one that differs in nothing but hashing is explained, too: two processes that were meant to share.
    """
    mine, digest = namespace.describe(), namespace.digest
    known = registry.namespaces(_NAMESPACES_MAX, own=digest, tag=namespace.secret.tag)
    if not known:
        return MissReason.NOT_PUBLISHED, "nobody has published anything in this registry that may be shown here"
    publishers = sum(len(info.owners) for info in known if info.digest == digest)
    candidates = [describe_differences(mine, info.description) for info in known if info.digest != digest]
    if publishers:
        candidates = [each for each in candidates if publishers == 1 and all(map(_is_about_hashing, each))]
    if not candidates:
        return MissReason.NOT_PUBLISHED, "block 0 is not published; other prefixes are"
    differences = min(candidates, key=len)
    hint = ""
    if any(map(_is_about_hashing, differences)):
        hint = "; block hashes differ between processes: use one hash algorithm and one PYTHONHASHSEED everywhere"
    here = "" if publishers else "nobody publishes in this namespace yet; "
    detail = f"{here}the closest published namespace differs in {'; '.join(differences)}{hint}"
    return MissReason.NAMESPACE_DIFFERS, detail


def _is_about_hashing(difference: str) -> bool:
    return difference.startswith(_HASH_FIELDS)
