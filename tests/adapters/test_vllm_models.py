"""Models whose layers do not all attend to everything: shared where that is right, else refused in one sentence."""

import json
import shutil

import pytest

from kvmarket.testing.tiny_models import random_prompt
from kvmarket.testing.vllm_replica import ReplicaConfig

pytestmark = pytest.mark.vllm

PROMPT_TOKENS = 1000
HIT_TOKENS = (PROMPT_TOKENS - 1) // 32 * 32
ANSWER_TOKENS = 12


@pytest.fixture(scope="module")
def sliding_model(tiny_model, tmp_path_factory):
    """Makes the model with a sliding window of 128 tokens in the layers named; the weights stay."""

    def make(name, layers):
        path = tmp_path_factory.mktemp("sliding") / name
        shutil.copytree(tiny_model, path)
        config = json.loads((path / "config.json").read_text())
        kinds = ["sliding_attention" if i in layers else "full_attention" for i in range(config["num_hidden_layers"])]
        config |= {"layer_types": kinds, "sliding_window": 128}
        (path / "config.json").write_text(json.dumps(config))
        return path

    return make


def test_sliding_and_full_layers_together(fleet, sliding_model, vllm_host, truth):
    """Without the hybrid allocator all layers keep all blocks, in one group: that is shared like any other."""
    model = sliding_model("mixed", {0, 2})
    plain = vllm_host.launch(ReplicaConfig(model=model))
    owner, reader = fleet.start_all({"model": model}, {"model": model})
    plain.wait_ready()
    asked = [random_prompt(PROMPT_TOKENS, seed=9500 + i) for i in range(3)]
    right = plain.begin_generate(asked, max_tokens=ANSWER_TOKENS)
    fleet.publish(owner, asked)
    answers = reader.generate(asked, max_tokens=ANSWER_TOKENS)
    tokens = [answer.tokens for answer in right.result(timeout_s=60)]
    for replica in (plain, owner, reader):
        replica.close()

    assert [answer.external_tokens for answer in answers] == [HIT_TOKENS] * 3
    assert [answer.tokens for answer in answers] == tokens
    assert tokens[0] != truth.generate(asked[:1], max_tokens=ANSWER_TOKENS)[0].tokens  # the windows are in force


def test_sliding_windows_alone_are_refused_once(fleet, sliding_model):
    replica = fleet.start(model=sliding_model("sliding", {0, 1, 2, 3}))
    prompt = random_prompt(PROMPT_TOKENS, seed=9600)
    first, second = replica.generate([prompt, prompt], max_tokens=ANSWER_TOKENS)
    counters, offered = replica.counters(), replica.call("vllm_faults:offered")
    assert replica.reset_prefix_cache(connector=True)
    log = replica.log_path.read_text()
    replica.close()

    assert first.tokens == second.tokens
    assert second.cached_tokens > 0
    assert offered == counters["vllm:kvmarket_blocks_offered"] == counters["vllm:kvmarket_lookups"] == 0
    assert log.count("fetches and publishes nothing") + log.count("publishes and fetches nothing") == 1
    assert "SlidingWindowSpec; only full attention and MLA are supported" in log
