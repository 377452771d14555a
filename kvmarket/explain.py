"""Why was nothing found: the question every user of a prefix cache asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmarket.identity import Namespace, describe_differences
from kvmarket.report import MissReason

if TYPE_CHECKING:
    from kvmarket.registry import Registry

_HASH_FIELDS = ("hash.algorithm", "hash.root")
_NAMESPACES_MAX = 32


def explain_nothing_found(registry: Registry, namespace: Namespace) -> tuple[MissReason, str]:
    """Say why no block at all of a prefix was found in `namespace`.

    When nobody publishes in it but somebody does in others, the closest of those is named with the fields that differ:
    another dtype, another revision, another tenant, another hash seed.
    """
    others = [info for info in registry.namespaces(_NAMESPACES_MAX)]
    if not others:
        return MissReason.NOT_PUBLISHED, "nobody has published anything in this registry"
    if any(info.digest == namespace.digest for info in others):
        return MissReason.NOT_PUBLISHED, "block 0 is not published; other prefixes are"
    mine = namespace.describe()
    differences = min((describe_differences(mine, info.description) for info in others), key=len)
    hint = ""
    if any(difference.startswith(_HASH_FIELDS) for difference in differences):
        hint = "; block hashes differ between processes: use one hash algorithm and one PYTHONHASHSEED everywhere"
    return MissReason.NAMESPACE_DIFFERS, f"the closest published namespace differs in {'; '.join(differences)}{hint}"
