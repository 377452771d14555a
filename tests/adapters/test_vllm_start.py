"""Starting with wrong settings: an error that names them. With a bad registry: an engine that goes on alone."""

import os
import shutil
import time

import pytest

from kvmarket.testing.tiny_models import random_prompt
from kvmarket.testing.vllm_replica import ReplicaError

pytestmark = pytest.mark.vllm

PROMPT_TOKENS = 400
ANSWER_TOKENS = 8
HELD_S = 7.0
OPEN_WAIT_S, RETRY_S, WRITE_WAIT_S = 2.0, 5.0, 3.0  # of the connector and of the registry


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


@pytest.mark.slow
def test_a_registry_that_a_hung_process_holds(fleet, truth):
    """Who has it open goes on fetching; who comes later goes on alone, and joins when it is free again."""
    owner, reader, late = fleet.start_all({}, {}, {})
    asked = [random_prompt(PROMPT_TOKENS, seed=9200 + i) for i in range(3)]
    right = [answer.tokens for answer in truth.generate(asked, max_tokens=ANSWER_TOKENS)]
    reader.generate([random_prompt(PROMPT_TOKENS, seed=9290)], max_tokens=1)
    fleet.publish(owner, asked[:2])
    owner.call("vllm_faults:hold_registry", seconds=HELD_S)
    (answer,) = reader.generate(asked[:1], max_tokens=ANSWER_TOKENS)
    assert (answer.external_tokens, answer.tokens) == (384, right[0])
    assert answer.total_s < 1.0
    (answer,) = late.generate(asked[1:2], max_tokens=ANSWER_TOKENS)
    assert (answer.external_tokens, answer.tokens) == (0, right[1])
    assert answer.total_s < 2 * OPEN_WAIT_S + 1.5  # once for each role
    assert "the registry does not answer" in late.log_path.read_text()

    end, seed = time.monotonic() + HELD_S + WRITE_WAIT_S + RETRY_S + 5.0, 9300
    while late.counters()["vllm:kvmarket_loaded_tokens"] == 0:
        assert time.monotonic() < end, late.log_tail()
        time.sleep(0.5)
        prompt, seed = random_prompt(PROMPT_TOKENS, seed=seed), seed + 1
        owner.generate([prompt], max_tokens=1)
        late.generate([prompt], max_tokens=1)
    for replica in (owner, reader, late):
        assert replica.counters()["vllm:kvmarket_errors"] == 0
        assert "Traceback" not in replica.log_path.read_text()
        replica.close()


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
