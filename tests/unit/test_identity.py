from dataclasses import fields, replace

import pytest

from kvmarket.errors import InvalidInputError
from kvmarket.identity import ModelIdentity, Namespace, describe_differences
from kvmarket.testing.samples import SPEC

MODEL = ModelIdentity("llama", "main", "w1", "lora")
BASE = Namespace(MODEL, SPEC, "sha256", root=b"r", tenant="acme", salt=b"secret salt", engine=(("vllm", "0.30"),))
CHANGES = {
    "model.name": replace(BASE, model=replace(MODEL, name="llama2")),
    "model.revision": replace(BASE, model=replace(MODEL, revision="dev")),
    "model.weights_digest": replace(BASE, model=replace(MODEL, weights_digest="w2")),
    "model.adapter": replace(BASE, model=replace(MODEL, adapter="")),
    "hash.algorithm": replace(BASE, algorithm="vllm:sha256"),
    "hash.root": replace(BASE, root=b"s"),
    "tenant": replace(BASE, tenant="Acme"),
    "salt": replace(BASE, salt=b"other salt"),
    "engine.vllm": replace(BASE, engine=(("vllm", "0.31"),)),
    "engine.kernel": replace(BASE, engine=(("vllm", "0.30"), ("kernel", "amx"))),
    "spec.dtype": replace(BASE, spec=replace(SPEC, dtype="bfloat16")),
    "spec.block_size": replace(BASE, spec=replace(SPEC, block_size=32)),
    "spec.layout": replace(BASE, spec=replace(SPEC, layout="LKHNC")),
    "spec.tp_size": replace(BASE, spec=replace(SPEC, tp_size=2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_field_makes_another_namespace_and_is_named(name):
    other = CHANGES[name]
    assert other.digest != BASE.digest
    differences = describe_differences(BASE.describe(), other.describe())
    assert [difference.split(":")[0] for difference in differences] == [name]


def test_every_spec_field_is_part_of_it():
    described = BASE.describe()
    assert {f"spec.{field.name}" for field in fields(SPEC)} <= set(described)


def test_all_those_namespaces_differ_from_each_other():
    digests = {namespace.digest for namespace in (BASE, *CHANGES.values())}
    assert len(digests) == len(CHANGES) + 1
    assert {len(digest) for digest in digests} == {32}


def test_the_digest_is_pinned():
    assert BASE.digest.hex() == "55b1845d8f5e0c533c96296d1a1948285059bfa01c386e3a533bffa0761f4a28"
    assert (
        Namespace(ModelIdentity("m"), SPEC).digest.hex()
        == "6db29cbc3c9cedf1db3308d84e5cf48d249ad59f09ef3e5cb4900a4660cdec79"
    )


def test_the_order_of_engine_facts_does_not_matter():
    facts = (("a", "1"), ("b", "2"))
    assert replace(BASE, engine=facts).digest == replace(BASE, engine=facts[::-1]).digest


def test_the_salt_is_never_shown():
    shown = repr(BASE) + str(BASE) + repr(BASE.describe())
    assert "secret" not in shown
    assert b"secret salt".hex() not in shown
    assert BASE.describe()["salt"], "that there is one is no secret"
    assert replace(BASE, salt=b"").describe()["salt"] == ""


def test_the_salt_is_more_than_its_tag():
    """Two salts with one tag, if somebody finds such, still make two namespaces."""
    other = replace(BASE, salt=b"other salt")
    described = {**other.describe(), "salt": BASE.describe()["salt"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Namespace, "describe", lambda self: described)
        assert other.digest != BASE.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "md5"},
        {"salt": "text"},
        {"root": "text"},
        {"tenant": b"bytes"},
        {"engine": (("a", "1"), ("a", "2"))},
    ],
)
def test_bad_namespaces_are_refused(changes):
    with pytest.raises(InvalidInputError):
        replace(BASE, **changes)


@pytest.mark.parametrize("changes", [{"name": ""}, {"name": None}, {"revision": 3}, {"adapter": b"x"}])
def test_bad_models_are_refused(changes):
    with pytest.raises(InvalidInputError, match=next(iter(changes))):
        replace(MODEL, **changes)
