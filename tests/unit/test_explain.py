import os
from dataclasses import replace

import pytest

from kvmarket.explain import explain_nothing_found
from kvmarket.identity import ModelIdentity, Namespace
from kvmarket.registry.memory import MemoryRegistry
from kvmarket.report import MissReason
from kvmarket.secret import Secret
from kvmarket.testing.sample_records import announce, chain
from kvmarket.testing.samples import SPEC, sample_spec

MINE = Namespace(ModelIdentity("llama", revision="main"), SPEC)


@pytest.fixture
def registry():
    return MemoryRegistry()


def publish(registry, namespace):
    registry.open_namespace(namespace.digest, namespace.describe())
    owner = registry.register_owner(os.urandom(16)).owner
    announce(registry, namespace.digest, owner, chain(1, 2))


def test_an_empty_registry(registry):
    assert explain_nothing_found(registry, MINE) == (
        MissReason.NOT_PUBLISHED,
        "nobody has published anything in this registry that may be shown here",
    )


def test_another_prefix_in_the_same_namespace(registry):
    publish(registry, MINE)
    publish(registry, Namespace(ModelIdentity("llama", revision="dev"), SPEC))
    reason, detail = explain_nothing_found(registry, MINE)
    assert reason is MissReason.NOT_PUBLISHED
    assert "other prefixes are" in detail


def test_the_closest_namespace_is_named(registry):
    publish(registry, Namespace(ModelIdentity("gpt"), sample_spec(dtype="float32"), tenant="x"))
    publish(registry, Namespace(ModelIdentity("llama", revision="main"), sample_spec(dtype="bfloat16")))
    reason, detail = explain_nothing_found(registry, MINE)
    assert reason is MissReason.NAMESPACE_DIFFERS
    assert detail.endswith("differs in spec.dtype: 'float16' here, 'bfloat16' there")


def test_hash_differences_get_a_hint(registry):
    publish(registry, Namespace(ModelIdentity("llama", revision="main"), SPEC, "vllm:sha256", root=b"1"))
    _, detail = explain_nothing_found(registry, MINE)
    assert "hash.algorithm" in detail
    assert "PYTHONHASHSEED" in detail


def test_namespaces_without_live_owners_do_not_count(registry):
    registry.open_namespace(os.urandom(32), Namespace(ModelIdentity("other"), SPEC).describe())
    assert explain_nothing_found(registry, MINE)[0] is MissReason.NOT_PUBLISHED


def test_a_lone_publisher_is_told_of_one_that_only_hashes_differently(registry):
    """Two replicas that were meant to share have both published already: each finds only its own blocks."""
    mine = Namespace(ModelIdentity("llama"), SPEC, "vllm:xxhash", root=b"1")
    publish(registry, mine)
    publish(registry, Namespace(ModelIdentity("llama"), SPEC, "vllm:xxhash", root=b"2", tenant="another"))
    assert explain_nothing_found(registry, mine)[0] is MissReason.NOT_PUBLISHED
    publish(registry, Namespace(ModelIdentity("llama"), SPEC, "vllm:xxhash", root=b"2"))
    reason, detail = explain_nothing_found(registry, mine)
    assert reason is MissReason.NAMESPACE_DIFFERS
    assert "hash.root" in detail
    assert "PYTHONHASHSEED" in detail
    publish(registry, mine)
    assert explain_nothing_found(registry, mine)[0] is MissReason.NOT_PUBLISHED


def test_among_many_namespaces_the_own_one_is_not_overlooked(registry):
    for number in range(40):
        publish(registry, Namespace(ModelIdentity(f"model {number}"), SPEC))
    publish(registry, MINE)
    reason, detail = explain_nothing_found(registry, MINE)
    assert reason is MissReason.NOT_PUBLISHED
    assert "other prefixes are" in detail


def test_what_others_keep_secret_explains_nothing(registry):
    mine, theirs = (replace(MINE, secret=Secret(text * 16)) for text in "ab")
    publish(registry, theirs)
    for asker in (MINE, mine):
        assert explain_nothing_found(registry, asker)[0] is MissReason.NOT_PUBLISHED
    publish(registry, replace(mine, tenant="x"))
    reason, detail = explain_nothing_found(registry, mine)
    assert (reason, "tenant: '' here, 'x' there" in detail) == (MissReason.NAMESPACE_DIFFERS, True)
    assert explain_nothing_found(registry, MINE)[0] is MissReason.NOT_PUBLISHED
