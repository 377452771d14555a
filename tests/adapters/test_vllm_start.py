"""How an engine starts with settings and registries that are wrong: an error that names it, or an engine that goes on alone."""

import os
import shutil

import pytest

from kvmarket.testing.tiny_models import random_prompt
from kvmarket.testing.vllm_replica import ReplicaError

pytestmark = pytest.mark.vllm

PROMPT_TOKENS = 400
ANSWER_TOKENS = 8


@pytest.fixture(scope="module")
def prompt():
    return random_prompt(PROMPT_TOKENS, seed=9000)


@pytest.fixture(scope="module")
def right(truth, prompt):
    (answer,) = truth.generate([prompt], max_tokens=ANSWER_TOKENS)
    return answer.tokens


def test_wrong_settings_stop_the_start_and_are_named(fleet):
    wrong = {
        "KVMARKET_TRANSPRT": {"environ": {"KVMARKET_TRANSPRT": "shm"}},
        "KVMARKET_VERIFY='mostly'": {"environ": {"KVMARKET_VERIFY": "mostly"}},
        "unknown kv_connector_extra_config key 'tennant'": {"extra": {"tennant": "x"}},
        "MarketConfig.fetch_deadline_s must be float, not 'soon'": {"extra": {"fetch_deadline_s": "soon"}},
    }
    replicas = {said: fleet.launch(**options) for said, options in wrong.items()}
    for said, replica in replicas.items():
        with pytest.raises(ReplicaError) as caught:
            replica.wait_ready()
        assert said in str(caught.value)
        assert "ConfigError" in str(caught.value)


def a_file(path):
    path.write_text("not a directory")


def open_to_others(path):
    path.mkdir()
    path.chmod(0o755)


def random_bytes(path):
    path.mkdir(mode=0o700)
    (path / "registry.lmdb").write_bytes(os.urandom(1 << 16))


BROKEN = {
    "a_file": (a_file, "File exists"),
    "open_to_others": (open_to_others, "must belong to uid"),
    "random_bytes": (random_bytes, "is damaged or not a registry"),
}


def test_a_registry_that_cannot_be_used_leaves_an_engine_that_goes_on_alone(fleet, tmp_path, prompt, right):
    replicas = {}
    for name, (spoil, said) in BROKEN.items():
        spoil(tmp_path / name)
        replicas[said] = fleet.launch(environ={"KVMARKET_RUNTIME_DIR": str(tmp_path / name)})
    for said, replica in replicas.items():
        replica.wait_ready()
        answers = [replica.generate([prompt], max_tokens=ANSWER_TOKENS)[0] for _ in range(2)]
        counters = replica.counters()
        # A replica that shares nothing may always forget: vLLM's sleep, pause and weight updates insist on success.
        assert replica.reset_prefix_cache(connector=True)
        log = replica.log_path.read_text()
        replica.close()

        assert [answer.tokens for answer in answers] == [right] * 2
        assert [answer.external_tokens for answer in answers] == [0] * 2
        assert [answer.cached_tokens for answer in answers] == [0, (PROMPT_TOKENS - 1) // 32 * 32]
        assert counters["vllm:kvmarket_errors"] == counters["vllm:kvmarket_blocks_announced"] == 0
        assert "kvmarket is off for this replica" in log
        assert said in log
        assert "Traceback" not in log


def test_a_registry_that_is_removed_while_engines_run(fleet, tmp_path, truth):
    """Those who have it open go on; whoever starts later makes a new one."""
    runtime = tmp_path / "deep" / "runtime"  # made with its parents
    here = {"environ": {"KVMARKET_RUNTIME_DIR": str(runtime)}}
    owner, reader = fleet.start_all(here, here)
    asked = [random_prompt(PROMPT_TOKENS, seed=9100 + i) for i in range(3)]
    right = [answer.tokens for answer in truth.generate(asked, max_tokens=ANSWER_TOKENS)]
    fleet.publish(owner, asked[:1])
    assert reader.generate(asked[:1], max_tokens=1)[0].external_tokens == 384
    shutil.rmtree(runtime)

    fleet.publish(owner, asked[1:2])
    (answer,) = reader.generate(asked[1:2], max_tokens=ANSWER_TOKENS)
    assert answer.tokens == right[1]
    late = fleet.start(**here)
    (answer,) = late.generate(asked[2:], max_tokens=ANSWER_TOKENS)
    assert (answer.external_tokens, answer.tokens) == (0, right[2])
    for replica in (owner, reader, late):
        assert replica.counters()["vllm:kvmarket_errors"] == 0
        replica.stop()  # in order, although what it would take back is gone
        assert "Traceback" not in replica.log_path.read_text()
