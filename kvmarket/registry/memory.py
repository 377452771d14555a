"""The reference registry: dictionaries in one process, shared by every marketplace that is given the same object."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmarket.errors import RegistryProtocolError
from kvmarket.metrics import Metrics
from kvmarket.registry.base import LookupResult, NamespaceInfo, Registry, shown
from kvmarket.registry.host import this_process
from kvmarket.registry.records import RECORD, BlockRecords, concatenate, encode_records

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmarket.identity import OwnerInfo


@dataclass
class _Namespace:
    epoch: int
    description: dict[str, Any]
    blocks: dict[bytes, dict[int, np.void]] = field(default_factory=dict)


class MemoryRegistry(Registry):
    """Dictionaries behind one lock. Every owner in it is alive, since all live in this process."""

    scheme = "memory"
    local = True

    def __init__(self) -> None:
        self.metrics = Metrics()
        self._lock = threading.Lock()
        self._owners: dict[int, OwnerInfo] = {}
        self._regions: dict[tuple[int, int], dict[str, Any]] = {}
        self._namespaces: dict[bytes, _Namespace] = {}
        self._next_owner = self._next_epoch = 1

    def register_owner(self, incarnation: bytes) -> OwnerInfo:
        with self._lock:
            info = this_process(self._next_owner, incarnation)
            self._owners[info.owner] = info
            self._next_owner += 1
            return info

    def register_region(self, owner: int, region_id: int, descriptor: dict[str, Any]) -> None:
        with self._lock:
            self._regions[owner, region_id] = descriptor

    def release_owner(self, owner: int) -> None:
        with self._lock:
            self._owners.pop(owner, None)
            for region in [region for region in self._regions if region[0] == owner]:
                del self._regions[region]
            for namespace in self._namespaces.values():
                for key, holders in list(namespace.blocks.items()):
                    holders.pop(owner, None)
                    if not holders:
                        del namespace.blocks[key]

    def open_namespace(self, digest: bytes, description: dict[str, Any]) -> int:
        with self._lock:
            if digest not in self._namespaces:
                self._namespaces[digest] = _Namespace(self._next_epoch, description)
                self._next_epoch += 1
            return self._namespaces[digest].epoch

    def announce(self, digest: bytes, epoch: int, keys: Sequence[bytes], records: BlockRecords) -> bool:
        with self._lock:
            namespace = self._namespaces.get(digest)
            if namespace is None or namespace.epoch != epoch:
                return False
            unknown = set(records["owner"].tolist()) - self._owners.keys()
            if unknown:
                raise RegistryProtocolError(f"owner {unknown.pop()} is not registered")
            for key, record in zip(keys, records.copy(), strict=True):  # rows are views of their array
                namespace.blocks.setdefault(key, {})[int(record["owner"])] = record
            return True

    def withdraw(self, digest: bytes, owner: int, keys: Sequence[bytes]) -> int:
        removed = 0
        with self._lock:
            namespace = self._namespaces.get(digest)
            if namespace is None:
                return 0
            for key in keys:
                holders = namespace.blocks.get(key, {})
                removed += holders.pop(owner, None) is not None
                if key in namespace.blocks and not holders:
                    del namespace.blocks[key]
        return removed

    def discard(self, digest: bytes, keys: Sequence[bytes], records: BlockRecords) -> int:
        removed = 0
        with self._lock:
            namespace = self._namespaces.get(digest)
            if namespace is None:
                return 0
            for wire, record in zip(encode_records(records), records, strict=True):
                key, owner = keys[int(record["block"])], int(record["owner"])
                holders = namespace.blocks.get(key, {})
                if owner in holders and encode_records(np.array([holders[owner]], RECORD)) == [wire]:
                    removed += 1
                    del holders[owner]
                    if not holders:
                        del namespace.blocks[key]
        return removed

    def lookup(self, digest: bytes, keys: Sequence[bytes]) -> LookupResult:
        rows: list[np.ndarray] = []
        blocks = 0
        with self._lock:
            namespace = self._namespaces.get(digest)
            if namespace is None:
                return LookupResult(0, 0, np.empty(0, RECORD), "not_published")
            for block, key in enumerate(keys):
                holders = namespace.blocks.get(key)
                if not holders:
                    break
                found = np.array(list(holders.values()), RECORD)
                found["block"] = block
                rows.append(found)
                blocks = block + 1
            records = concatenate(rows) if rows else np.empty(0, RECORD)
            owners = {owner: self._owners[owner] for owner in set(records["owner"].tolist())}
            ended = "" if blocks == len(keys) else "not_published"
            return LookupResult(namespace.epoch, blocks, records, ended, owners, keys)

    def region(self, owner: int, region_id: int) -> dict[str, Any] | None:
        with self._lock:
            return self._regions.get((owner, region_id))

    def alive(self, owner: int) -> bool:
        with self._lock:
            return owner in self._owners

    def epoch(self, digest: bytes) -> int:
        with self._lock:
            namespace = self._namespaces.get(digest)
            return namespace.epoch if namespace else 0

    def bump_epoch(self, digest: bytes) -> int:
        with self._lock:
            namespace = self._namespaces.get(digest)
            if namespace is None:
                return 0
            namespace.epoch = self._next_epoch
            namespace.blocks.clear()
            self._next_epoch += 1
            return namespace.epoch

    def namespaces(self, limit: int = 64, *, own: bytes = b"", tag: str = "") -> list[NamespaceInfo]:
        with self._lock:
            found: list[NamespaceInfo] = []
            for digest, namespace in self._namespaces.items():
                owners = sorted({owner for holders in namespace.blocks.values() for owner in holders})
                if owners:
                    found.append(NamespaceInfo(digest, namespace.description, tuple(owners)))
            return shown(found, limit, own, tag)

    def sweep(self) -> int:
        return 0

    def close(self) -> None:
        return
