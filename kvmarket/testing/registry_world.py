"""The world that the tests of a registry live in: how it is made, owners, other processes that have it open."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import pytest

from kvmarket.testing.sample_records import announce

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import SimpleNamespace

    from kvmarket.registry import Registry
    from kvmarket.testing.peers import Peer, PeerPool

Opener = tuple["Callable[..., Registry]", tuple[Any, ...]]


def _open_in_peer(state: SimpleNamespace, function: Callable[..., Registry], args: tuple[Any, ...]) -> None:
    state.registry = function(*args)


def publish_in_peer(state: SimpleNamespace, digest: bytes, keys: Sequence[bytes]) -> int:
    """Register an owner in another process and announce blocks of it; returns its number."""
    state.registry.open_namespace(digest, {"name": "peer"})
    owner: int = state.registry.register_owner(os.urandom(16)).owner
    state.registry.register_region(owner, 0, {"of": owner})
    assert announce(state.registry, digest, owner, keys)
    return owner


def bump_in_peer(state: SimpleNamespace, digest: bytes) -> int:
    """Have another process make the namespace forget; returns the new epoch."""
    epoch: int = state.registry.bump_epoch(digest)
    return epoch


def release_in_peer(state: SimpleNamespace, owner: int) -> None:
    """Have another process release an owner."""
    state.registry.release_owner(owner)


class RegistryWorld(ABC):
    """Fixtures; a suite says what is tested."""

    death_notice_s = 0.0
    """How long after its death an owner may still be served, as one with a lease."""

    @abstractmethod
    def make_registry(self) -> Registry:
        """Return a new, empty registry; called once per test."""

    def open_elsewhere(self) -> Opener | None:
        """Return an importable function, and its arguments, that opens this test's registry in another process."""
        return None

    @pytest.fixture
    def registry(self) -> Iterator[Registry]:
        """The registry under test; owners are released as a marketplace would."""
        registry = self.make_registry()
        self._owners: list[int] = []
        yield registry
        for owner in self._owners:
            registry.release_owner(owner)
        registry.close()

    @pytest.fixture
    def namespace(self, registry: Registry) -> bytes:
        """A namespace that is open."""
        digest = os.urandom(32)
        registry.open_namespace(digest, {"name": "test"})
        return digest

    @pytest.fixture
    def elsewhere(self, peers: PeerPool) -> Callable[[], Peer]:
        """Starts processes that have the same registry open."""
        opener = self.open_elsewhere()
        if opener is None:
            pytest.skip("this registry is not shared by processes")

        def start() -> Peer:
            peer = peers.spawn()
            peer.call(_open_in_peer, *opener)
            return peer

        return start

    def new_owner(self, registry: Registry, regions: int = 1) -> int:
        """Register an owner of this process with some regions."""
        owner = registry.register_owner(os.urandom(16)).owner
        for region in range(regions):
            registry.register_region(owner, region, {"of": owner, "region": region})
        self._owners.append(owner)
        return owner
