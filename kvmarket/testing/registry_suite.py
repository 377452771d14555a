"""What every registry must do, as tests. Subclass `RegistryConformance` and say how to make one.

    class TestMine(RegistryConformance):
        def make_registry(self):
            return MyRegistry(...)

A registry that processes share also gives `open_elsewhere`, and is then tested with owners that are killed.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvmarket.errors import RegistryError
from kvmarket.registry.records import RUN_BLOCKS, make_records
from kvmarket.testing.registry_world import RegistryWorld, bump_in_peer, publish_in_peer, release_in_peer
from kvmarket.testing.sample_records import announce, chain, rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmarket.registry import Registry
    from kvmarket.testing.peers import Peer


class RegistryConformance(RegistryWorld):
    """The suite."""

    # ---- announce and look up

    def test_the_longest_announced_prefix_is_found(self, registry: Registry, namespace: bytes) -> None:
        owner, keys = self.new_owner(registry), chain(1, 100)
        assert announce(registry, namespace, owner, keys[:70], generation=6)
        for asked, blocks, ended in ((100, 70, "not_published"), (70, 70, ""), (69, 69, ""), (1, 1, "")):
            found = registry.lookup(namespace, keys[:asked])
            assert (found.blocks, found.first_missing) == (blocks, ended)
            assert rows(found) == [(block, owner, block, 6) for block in range(blocks)]
            assert found.epoch == registry.epoch(namespace) > 0
            assert {number: info.owner for number, info in found.owners.items()} == {owner: owner}

    def test_a_gap_ends_the_prefix(self, registry: Registry, namespace: bytes) -> None:
        owner, keys = self.new_owner(registry), chain(1, 3 * RUN_BLOCKS)
        gap = RUN_BLOCKS + 7
        assert announce(registry, namespace, owner, keys[:gap] + keys[gap + 1 :])
        found = registry.lookup(namespace, keys)
        assert (found.blocks, found.first_missing) == (gap, "not_published")
        assert [block for block, *_ in rows(found)] == list(range(gap))

    @pytest.mark.parametrize("missing", [0, 1, 126, 127, 128, 129, 255, 256, 299])
    def test_the_end_is_exact_at_every_batch_border(self, registry: Registry, namespace: bytes, missing: int) -> None:
        owner, keys = self.new_owner(registry), chain(1, 300)
        if missing:
            assert announce(registry, namespace, owner, keys[:missing])
        assert registry.lookup(namespace, keys).blocks == missing

    def test_a_block_needs_its_whole_prefix(self, registry: Registry, namespace: bytes) -> None:
        owner, keys, other = self.new_owner(registry), chain(1, 40, common=20), chain(2, 40, common=20)
        assert announce(registry, namespace, owner, keys)
        assert registry.lookup(namespace, other).blocks == 20
        assert registry.lookup(namespace, chain(3, 40)).blocks == 0

    def test_several_owners_of_a_block_are_all_named(self, registry: Registry, namespace: bytes) -> None:
        first, second, keys = self.new_owner(registry), self.new_owner(registry), chain(1, 10)
        assert announce(registry, namespace, first, keys[:6])
        assert announce(registry, namespace, second, keys[3:], first_page=50)
        found = registry.lookup(namespace, keys)
        expected = [(block, first, block, 2) for block in range(6)]
        expected += [(block, second, 50 + block - 3, 2) for block in range(3, 10)]
        assert (found.blocks, rows(found)) == (10, sorted(expected))
        assert set(found.owners) == {first, second}
        assert (np.diff(found.records["block"]) >= 0).all()

    @pytest.mark.parametrize("asked", [1, 5, RUN_BLOCKS, RUN_BLOCKS + 5])
    def test_several_owners_of_the_last_block_are_all_named(
        self, registry: Registry, namespace: bytes, asked: int
    ) -> None:
        first, second, keys = self.new_owner(registry), self.new_owner(registry), chain(1, 2 * RUN_BLOCKS)
        assert announce(registry, namespace, first, keys)
        assert announce(registry, namespace, second, keys[asked - 1 : asked])
        found = registry.lookup(namespace, keys[:asked])
        expected = [(block, first, block, 2) for block in range(asked)]
        assert rows(found) == sorted([*expected, (asked - 1, second, 0, 2)])

    def test_a_newer_record_of_an_owner_replaces_its_older_one(self, registry: Registry, namespace: bytes) -> None:
        first, second, keys = self.new_owner(registry, 2), self.new_owner(registry), chain(1, 4)
        assert announce(registry, namespace, first, keys)
        assert announce(registry, namespace, second, keys, generation=8)
        assert announce(registry, namespace, first, keys[1:3], first_page=20, generation=4, region=1)
        found = registry.lookup(namespace, keys)
        mine = [row for row in rows(found) if row[1] == first]
        assert mine == [(0, first, 0, 2), (1, first, 20, 4), (2, first, 21, 4), (3, first, 3, 2)]
        assert [row for row in rows(found) if row[1] == second] == [(block, second, block, 8) for block in range(4)]
        assert found.records["region"][found.records["owner"] == first].tolist() == [0, 1, 1, 0]

    def test_records_come_back_exactly(self, registry: Registry, namespace: bytes) -> None:
        owner, keys = self.new_owner(registry), chain(1, 2)
        registry.register_region(owner, 65535, {})
        records = make_records(
            owner, 65535, np.array([0, 2**32 - 1]), np.array([2, 2**64 - 2], np.uint64), [b"d" * 16, bytes(range(16))]
        )
        assert registry.announce(namespace, registry.epoch(namespace), keys, records)
        records["page"] = 7  # what the caller does with its array later is its own business
        found = registry.lookup(namespace, keys).records
        assert found["page"].tolist() == [0, 2**32 - 1]
        assert found["generation"].tolist() == [2, 2**64 - 2]
        assert found["region"].tolist() == [65535, 65535]
        assert [digest.tobytes() for digest in found["digest"]] == [b"d" * 16, bytes(range(16))]

    def test_large_batches(self, registry: Registry, namespace: bytes) -> None:
        owner, keys = self.new_owner(registry), chain(1, 5000)
        assert announce(registry, namespace, owner, keys)
        found = registry.lookup(namespace, keys)
        assert found.blocks == len(found.records) == 5000
        assert (found.records["page"] == np.arange(5000)).all()
        assert registry.withdraw(namespace, owner, keys[100:]) == 4900
        assert registry.lookup(namespace, keys).blocks == 100

    def test_nothing_asked_and_nothing_told(self, registry: Registry, namespace: bytes) -> None:
        owner = self.new_owner(registry)
        assert announce(registry, namespace, owner, [])
        assert registry.withdraw(namespace, owner, []) == 0
        found = registry.lookup(namespace, [])
        assert (found.blocks, len(found.records), found.first_missing, found.owners) == (0, 0, "", {})

    # ---- withdraw and release

    def test_withdrawn_blocks_are_not_found(self, registry: Registry, namespace: bytes) -> None:
        first, second, keys = self.new_owner(registry), self.new_owner(registry), chain(1, 8)
        assert announce(registry, namespace, first, keys)
        assert announce(registry, namespace, second, keys[:5])
        assert registry.withdraw(namespace, first, keys[2:]) == 6
        found = registry.lookup(namespace, keys)
        assert found.blocks == 5
        assert rows(found) == sorted([(b, first, b, 2) for b in (0, 1)] + [(b, second, b, 2) for b in range(5)])
        assert registry.withdraw(namespace, first, keys[2:]) == 0, "they were gone already"
        assert registry.withdraw(namespace, second, [*keys[:1], *chain(9, 3)]) == 1
        assert registry.withdraw(os.urandom(32), first, keys) == 0

    def test_a_released_owner_is_forgotten_with_all_it_had(self, registry: Registry, namespace: bytes) -> None:
        first, second = self.new_owner(registry, 2), self.new_owner(registry)
        keys, other = chain(1, 100), chain(2, 10)
        assert announce(registry, namespace, first, keys)
        assert announce(registry, namespace, first, other, region=1)
        assert announce(registry, namespace, second, keys[:30])
        registry.release_owner(first)
        assert registry.lookup(namespace, keys).blocks == 30
        assert registry.lookup(namespace, other).blocks == 0
        assert registry.region(first, 0) is None
        assert registry.region(first, 1) is None
        assert not registry.alive(first)
        assert registry.alive(second)
        assert [info.owners for info in registry.namespaces()] == [(second,)]
        registry.release_owner(first)

    def test_an_owner_that_is_not_registered_cannot_announce(self, registry: Registry, namespace: bytes) -> None:
        owner, keys = self.new_owner(registry), chain(1, 3)
        registry.release_owner(owner)
        for unknown in (owner, owner + 1000):
            with pytest.raises(RegistryError):
                announce(registry, namespace, unknown, keys)
        assert registry.lookup(namespace, keys).blocks == 0

    def test_owner_numbers_are_never_used_again(self, registry: Registry) -> None:
        numbers = []
        for _ in range(5):
            numbers.append(self.new_owner(registry))
            registry.release_owner(numbers[-1])
        assert len(set(numbers)) == 5

    def test_a_stale_record_is_removed_and_no_other(self, registry: Registry, namespace: bytes) -> None:
        first, second, keys = self.new_owner(registry), self.new_owner(registry), chain(1, 40)
        assert announce(registry, namespace, first, keys)
        assert announce(registry, namespace, second, keys[:20], generation=4)
        found = registry.lookup(namespace, keys)

        def of_first(block: int) -> Any:
            return found.records[(found.records["block"] == block) & (found.records["owner"] == first)]

        before = rows(found)
        assert registry.discard(namespace, found.keys, of_first(7)) == 1
        assert registry.discard(namespace, found.keys, of_first(7)) == 0, "it was gone already"
        assert rows(registry.lookup(namespace, keys)) == [row for row in before if row != (7, first, 7, 2)]
        assert announce(registry, namespace, first, keys[9:10], first_page=9, generation=6)
        assert registry.discard(namespace, found.keys, of_first(9)) == 0, "announced anew meanwhile"
        assert (9, first, 9, 6) in rows(registry.lookup(namespace, keys))
        assert registry.discard(namespace, found.keys, of_first(33)) == 1
        assert registry.lookup(namespace, keys).blocks == 33
        assert registry.discard(os.urandom(32), found.keys, of_first(20)) == 0

    def test_stale_records_of_a_look_up_from_inside_a_run(self, registry: Registry, namespace: bytes) -> None:
        owner, keys = self.new_owner(registry), chain(1, 40)
        assert announce(registry, namespace, owner, keys)
        found = registry.lookup(namespace, keys[5:])
        assert registry.discard(namespace, found.keys, found.records[[0, 4, 5, 34]]) == 4
        assert registry.lookup(namespace, keys).blocks == 5
        assert rows(registry.lookup(namespace, keys[6:])) == [(block, owner, block + 6, 2) for block in range(3)]
        assert registry.lookup(namespace, keys[11:]).blocks == 28
        registry.withdraw(namespace, owner, keys[20:])
        assert registry.lookup(namespace, keys[11:]).blocks == 9
        assert announce(registry, namespace, owner, keys, generation=8)
        assert registry.lookup(namespace, keys).blocks == 40

    # ---- regions and owners

    def test_regions_are_found_by_owner_and_number(self, registry: Registry) -> None:
        owner = self.new_owner(registry, 0)
        body = {"layout": [3, [[0, 0, 64, 64]]], "spec": bytes(16), "big": 2**63 - 1, "more": {"x": [1, "y"]}}
        registry.register_region(owner, 3, body)
        found = registry.region(owner, 3)
        assert found is not None
        assert {key: found[key] for key in body} == body
        assert registry.region(owner, 2) is None
        assert registry.region(owner + 999, 3) is None

    def test_owners_say_who_they_are(self, registry: Registry, namespace: bytes) -> None:
        incarnation, keys = os.urandom(16), chain(1, 1)
        info = registry.register_owner(incarnation)
        self._owners.append(info.owner)
        assert (info.incarnation, info.pid) == (incarnation, os.getpid())
        assert registry.alive(info.owner)
        assert announce(registry, namespace, info.owner, keys)
        assert registry.lookup(namespace, keys).owners == {info.owner: info}

    def test_an_unknown_owner_is_not_alive(self, registry: Registry) -> None:
        assert not registry.alive(987654)

    # ---- namespaces and epochs

    def test_namespaces_never_meet(self, registry: Registry, namespace: bytes) -> None:
        owner, keys, other = self.new_owner(registry), chain(1, 5), os.urandom(32)
        assert announce(registry, namespace, owner, keys)
        assert registry.lookup(other, keys).blocks == 0
        assert registry.lookup(other, keys).epoch == 0
        registry.open_namespace(other, {})
        assert registry.lookup(other, keys).blocks == 0
        assert announce(registry, other, owner, keys[:2], first_page=30)
        assert registry.lookup(namespace, keys).blocks == 5
        assert rows(registry.lookup(other, keys)) == [(0, owner, 30, 2), (1, owner, 31, 2)]
        assert registry.withdraw(other, owner, keys) == 2
        assert registry.lookup(namespace, keys).blocks == 5

    def test_opening_a_namespace_twice_changes_nothing(self, registry: Registry, namespace: bytes) -> None:
        owner, keys = self.new_owner(registry), chain(1, 5)
        assert announce(registry, namespace, owner, keys)
        assert registry.open_namespace(namespace, {"name": "another"}) == registry.epoch(namespace)
        assert registry.lookup(namespace, keys).blocks == 5

    def test_namespaces_with_live_owners_are_listed(self, registry: Registry, namespace: bytes) -> None:
        first, second = self.new_owner(registry), self.new_owner(registry)
        for _ in range(3):
            registry.open_namespace(os.urandom(32), {"nobody": "publishes here"})
        assert registry.namespaces() == []
        assert announce(registry, namespace, first, chain(1, 2))
        assert announce(registry, namespace, second, chain(2, 40))
        others = [os.urandom(32) for _ in range(5)]
        for number, digest in enumerate(others):
            registry.open_namespace(digest, {"number": number})
            assert announce(registry, digest, second, chain(number, 1))
        listed = {info.digest: info for info in registry.namespaces()}
        assert set(listed) == {namespace, *others}
        assert listed[namespace].description["name"] == "test"
        assert sorted(listed[namespace].owners) == sorted([first, second])
        assert listed[others[3]].description["number"] == 3
        assert len(registry.namespaces(limit=2)) == 2
        registry.withdraw(others[0], second, chain(0, 1))
        assert others[0] not in {info.digest for info in registry.namespaces()}

    def test_namespaces_of_another_secret_are_not_listed(self, registry: Registry, namespace: bytes) -> None:
        owner, mine, theirs, unknown = self.new_owner(registry), *(os.urandom(32) for _ in range(3))
        for digest, description in ((mine, {"secret": "aa"}), (theirs, {"secret": "bb"}), (unknown, {})):
            registry.open_namespace(digest, description)
            assert announce(registry, digest, owner, chain(1, 2))
        assert registry.namespaces() == []
        assert announce(registry, namespace, owner, chain(1, 2))
        assert {info.digest for info in registry.namespaces()} == {namespace}
        assert {info.digest for info in registry.namespaces(tag="aa")} == {namespace, mine}
        assert [info.digest for info in registry.namespaces(1, own=theirs)] == [theirs], "one's own comes first"

    def test_a_new_epoch_forgets_every_block_at_once(self, registry: Registry, namespace: bytes) -> None:
        owner, keys, other = self.new_owner(registry), chain(1, 50), os.urandom(32)
        registry.open_namespace(other, {})
        assert announce(registry, namespace, owner, keys)
        assert announce(registry, other, owner, keys)
        before = registry.epoch(namespace)
        after = registry.bump_epoch(namespace)
        assert after == registry.epoch(namespace)
        assert after not in {0, before, registry.epoch(other)}
        found = registry.lookup(namespace, keys)
        assert (found.blocks, found.epoch) == (0, after)
        assert registry.lookup(other, keys).blocks == 50, "another namespace is not concerned"
        assert namespace not in {info.digest for info in registry.namespaces()}
        registry.sweep()
        assert registry.lookup(namespace, keys).blocks == 0
        assert announce(registry, namespace, owner, keys[:3], generation=4)
        assert rows(registry.lookup(namespace, keys)) == [(block, owner, block, 4) for block in range(3)]

    def test_an_announcement_for_an_old_epoch_is_refused_whole(self, registry: Registry, namespace: bytes) -> None:
        owner, keys = self.new_owner(registry), chain(1, 5)
        old = registry.epoch(namespace)
        new = registry.bump_epoch(namespace)
        assert announce(registry, namespace, owner, keys, epoch=old) is False
        assert registry.lookup(namespace, keys).blocks == 0
        assert announce(registry, namespace, owner, keys, epoch=new) is True
        assert announce(registry, os.urandom(32), owner, keys, epoch=new) is False

    def test_unknown_namespaces_have_no_epoch(self, registry: Registry) -> None:
        digest = os.urandom(32)
        assert registry.epoch(digest) == 0
        assert registry.bump_epoch(digest) == 0
        assert registry.epoch(digest) == 0

    # ---- threads and processes

    def test_threads_may_do_everything_at_once(self, registry: Registry, namespace: bytes) -> None:
        owners = [self.new_owner(registry) for _ in range(4)]
        errors: list[str] = []

        def work(owner: int, seed: int) -> None:
            mine = chain(seed, 40)
            for turn in range(15):
                if not announce(registry, namespace, owner, mine, generation=2 * turn + 2):
                    errors.append("refused")
                found = registry.lookup(namespace, mine)
                expected = [(block, owner, block, 2 * turn + 2) for block in range(40)]
                if rows(found) != expected:
                    errors.append(f"{owner} found {rows(found)[:3]}")
                if registry.withdraw(namespace, owner, mine[20:]) != 20:
                    errors.append("withdraw")

        threads = [threading.Thread(target=work, args=(owner, seed)) for seed, owner in enumerate(owners)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []

    def test_what_one_process_announces_another_finds(
        self, registry: Registry, namespace: bytes, elsewhere: Callable[[], Peer]
    ) -> None:
        keys, peer = chain(1, 50), elsewhere()
        owner = peer.call(publish_in_peer, namespace, keys)
        found = registry.lookup(namespace, keys)
        assert rows(found) == [(block, owner, block, 2) for block in range(50)]
        assert found.owners[owner].pid == peer.pid
        assert registry.alive(owner)
        assert registry.region(owner, 0) is not None
        mine = self.new_owner(registry)
        assert mine != owner
        peer.call(release_in_peer, owner)
        assert registry.lookup(namespace, keys).blocks == 0

    def test_blocks_of_a_killed_owner_are_not_found(
        self, registry: Registry, namespace: bytes, elsewhere: Callable[[], Peer]
    ) -> None:
        keys, mine, peer = chain(1, 50), self.new_owner(registry), elsewhere()
        assert announce(registry, namespace, mine, keys[:20])
        owner = peer.call(publish_in_peer, namespace, keys)
        assert registry.lookup(namespace, keys).blocks == 50
        peer.kill()
        time.sleep(self.death_notice_s)
        found = registry.lookup(namespace, keys)
        assert (found.blocks, found.first_missing) == (20, "owner_gone")
        assert set(found.owners) == {mine}
        assert set(found.records["owner"].tolist()) == {mine}
        assert not registry.alive(owner)
        assert [info.owners for info in registry.namespaces()] == [(mine,)]

    def test_a_sweep_removes_what_killed_owners_left(
        self, registry: Registry, namespace: bytes, elsewhere: Callable[[], Peer]
    ) -> None:
        keys, mine = chain(1, 100), self.new_owner(registry)
        peers = [elsewhere() for _ in range(3)]
        owners = [peer.call(publish_in_peer, namespace, keys) for peer in peers]
        assert announce(registry, namespace, mine, keys[:40])
        for peer in peers[:2]:
            peer.kill()
        time.sleep(self.death_notice_s)
        assert registry.sweep() == 2
        assert registry.sweep() == 0
        assert [registry.region(owner, 0) is None for owner in owners] == [True, True, False]
        found = registry.lookup(namespace, keys)
        seen = found.blocks, set(found.owners), len(found.records)
        assert seen == (100, {mine, owners[2]}, 140), f"{seen}, mine {mine}, theirs {owners}, {found.first_missing!r}"

    def test_a_new_epoch_reaches_other_processes(
        self, registry: Registry, namespace: bytes, elsewhere: Callable[[], Peer]
    ) -> None:
        owner, keys, peer = self.new_owner(registry), chain(1, 5), elsewhere()
        old = registry.epoch(namespace)
        assert announce(registry, namespace, owner, keys)
        new = peer.call(bump_in_peer, namespace)
        assert registry.epoch(namespace) == new != old
        assert announce(registry, namespace, owner, keys, epoch=old) is False
        assert registry.lookup(namespace, keys).blocks == 0
