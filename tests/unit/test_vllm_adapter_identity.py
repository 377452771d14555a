"""Which engines may share a namespace, and which cannot share at all."""

import json
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm.v1.kv_cache_interface")
torch = pytest.importorskip("torch")

from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvmarket.errors import ConfigError  # noqa: E402
from kvmarket_vllm import weights  # noqa: E402
from kvmarket_vllm.identity import engine_facts, split_extra_config, unsupported  # noqa: E402
from kvmarket_vllm.weights import model_identity, weights_files_digest  # noqa: E402

SHAPE = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)
SLIDING = SlidingWindowSpec(**SHAPE, sliding_window=128)
LATENT = MLAAttentionSpec(**{**SHAPE, "num_kv_heads": 1})


def groups(*specs):
    return KVCacheConfig(64, [], [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)])


def engine(path="/nowhere", *, caching=True, algorithm="sha256", load_format="auto", **model):
    fields = {"model": str(path), "revision": None, "dtype": torch.float32, "quantization": None, "seed": 0}
    fields |= {
        "hf_overrides": {},
        "max_model_len": 4096,
        "hf_config": SimpleNamespace(architectures=["LlamaForCausalLM"]),
    }
    return SimpleNamespace(
        device_config=SimpleNamespace(device_type="cpu"),
        cache_config=SimpleNamespace(
            enable_prefix_caching=caching, cache_dtype="auto", prefix_caching_hash_algo=algorithm
        ),
        model_config=SimpleNamespace(**{**fields, **model}),
        load_config=SimpleNamespace(load_format=load_format),
    )


@pytest.mark.parametrize("spec", [FULL, LATENT])
def test_one_group_of_full_attention_is_supported(spec):
    assert unsupported(engine(), groups(spec)) == ""


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (groups(FULL, SLIDING), "the model has 2 KV cache groups; only models with one are supported"),
        (groups(FULL, FULL), "2 KV cache groups"),
        (groups(SLIDING), "SlidingWindowSpec; only full attention and MLA are supported"),
        (groups(), "0 KV cache groups"),
        (None, "0 KV cache groups"),
    ],
)
def test_other_caches_are_refused_with_a_reason(config, said):
    assert said in unsupported(engine(), config)


def test_without_prefix_caching_there_are_no_block_hashes():
    assert "prefix caching is off" in unsupported(engine(caching=False), groups(FULL))


def test_extra_config_is_settings_and_identity(monkeypatch):
    monkeypatch.setenv("KVMARKET_TENANT", "from the environment")
    config, own = split_extra_config({"model_id": "m", "weights_digest": 7, "verify": "none", "fetch_deadline_s": 2})
    assert own == {"model_id": "m", "weights_digest": "7"}
    assert (config.verify, config.fetch_deadline_s, config.tenant) == ("none", 2.0, "from the environment")
    assert split_extra_config({"tenant": "from vLLM"})[0].tenant == "from vLLM"


@pytest.mark.parametrize("extra", [{"verfy": "full"}, {"verify": "mostly"}, {"salt": 5}, {"secret": "x" * 32}])
def test_bad_extra_config_is_named(extra):
    with pytest.raises(ConfigError, match=next(iter(extra))):
        split_extra_config(extra)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"quantization": "fp8"}, "quantization"),
        ({"algorithm": "sha256_cbor"}, "python"),
    ],
)
def test_engine_facts_tell_engines_apart(change, field):
    one, other = dict(engine_facts(engine(), "order")), dict(engine_facts(engine(**change), "order"))
    assert {name for name in one | other if one.get(name) != other.get(name)} == {field}


def test_a_rope_that_depends_on_the_length_makes_the_length_count():
    def facts(kind, length):
        hf_config = SimpleNamespace(rope_parameters={"rope_type": kind}, architectures=["X"])
        return engine_facts(engine(hf_config=hf_config, max_model_len=length), "order")

    assert facts("default", 100) == facts("default", 200)
    assert facts("longrope", 100) != facts("longrope", 200)


# ---- weights


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    (path / "model-1.safetensors").write_bytes(bytes(range(256)) * 100)
    (path / "model-2.safetensors").write_bytes(bytes(reversed(range(256))) * 50)
    return path


def digest(path, **model):
    return model_identity(engine(path, **model))["weights_digest"]


def test_a_copy_elsewhere_is_the_same_model(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "another name")
    (tmp_path / "another name" / "README.md").write_text("not weights")
    assert model_identity(engine(checkpoint)) == model_identity(engine(tmp_path / "another name"))


@pytest.mark.parametrize("place", [0, 12_345, 25_599])
def test_one_changed_byte_is_another_model(checkpoint, place):
    before = digest(checkpoint)
    file = checkpoint / "model-1.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    assert digest(checkpoint) != before


def test_config_and_boundaries_between_files_count(checkpoint):
    seen = {digest(checkpoint)}
    (checkpoint / "config.json").write_text(json.dumps({"hidden_size": 16}))
    seen.add(digest(checkpoint))
    seen.add(digest(checkpoint, hf_overrides={"rope_theta": 1.0}))
    one, two = (checkpoint / f"model-{i}.safetensors" for i in (1, 2))
    moved = two.read_bytes()
    two.write_bytes(moved[10:])
    one.write_bytes(one.read_bytes() + moved[:10])  # the same bytes in all
    seen.add(digest(checkpoint))
    assert len(seen) == 4


def test_large_checkpoints_are_sampled(checkpoint, monkeypatch):
    file = checkpoint / "model-1.safetensors"
    file.write_bytes(bytes(4 << 20))
    whole = weights_files_digest(checkpoint)
    monkeypatch.setattr(weights, "FULL_BYTES_MAX", 1 << 20)
    monkeypatch.setattr(weights, "SAMPLES", 64)
    sampled = weights_files_digest(checkpoint)
    assert sampled not in {whole, "no-weights"}
    for place in (10, (4 << 20) * 7 // 63 + 100):  # the header, and one of the places
        data = bytearray(4 << 20)
        data[place] = 1
        file.write_bytes(data)
        assert weights_files_digest(checkpoint) != sampled
    file.write_bytes(bytes((4 << 20) + 1))
    assert weights_files_digest(checkpoint) != sampled


def test_names(checkpoint):
    assert model_identity(engine(checkpoint))["name"] == "LlamaForCausalLM"
    hub = model_identity(engine("org/model", revision="abc"))
    assert hub == {"name": "org/model", "revision": "abc", "weights_digest": "", "adapter": ""}
    said = model_identity(engine(checkpoint), "mine", "epoch 3")
    assert (said["name"], said["weights_digest"]) == ("mine", "epoch 3")


def test_dummy_weights_go_by_their_seed(checkpoint):
    digests = {model_identity(engine(checkpoint, load_format="dummy", seed=seed))["weights_digest"] for seed in (0, 1)}
    assert len(digests) == 2
    assert digest(checkpoint) not in digests
