"""The stock OpenAI server, several processes per engine, plugged in with nothing but --kv-transfer-config."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from kvmarket.testing.shared_prefix import CONNECTOR
from kvmarket.testing.tiny_models import random_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
PROMPT_TOKENS = 1600
HIT_TOKENS = (PROMPT_TOKENS - 1) // 32 * 32
ANSWER_TOKENS = 12
START_WAIT_S = 150.0
ANNOUNCE_WAIT_S = 10.0


class Server:
    """One ``vllm.entrypoints.openai.api_server`` and the processes it starts."""

    def __init__(self, model, runtime_dir, log_path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{(port := probe.getsockname()[1])}"
        self.log_path = log_path
        path = os.pathsep.join([str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")])
        settings = {
            "KVMARKET_RUNTIME_DIR": str(runtime_dir),
            "PYTHONPATH": path.rstrip(os.pathsep),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        options = {
            "--model": str(model),
            "--served-model-name": "tiny",
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": "float32",
            "--block-size": "32",
            "--kv-cache-memory-bytes": str(64 << 20),
            "--kv-transfer-config": json.dumps(CONNECTOR),
        }
        flags = ["--enforce-eager", "--skip-tokenizer-init"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
        command += [text for option in options.items() for text in option]
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self):
        end = time.monotonic() + START_WAIT_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                self._get("/health")
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            else:
                return
        pytest.fail(f"the server did not start\n{self.log()[-4000:]}")

    def complete(self, prompt):
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        request = urllib.request.Request(  # noqa: S310 - our own server
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            return tuple(json.load(reply)["choices"][0]["token_ids"])

    def metric(self, name, labels=""):
        """Return a counter from /metrics: the sum of its samples that have `labels` among theirs."""
        samples = (line.rpartition(" ") for line in self._get("/metrics").splitlines())
        return sum(float(value) for key, _, value in samples if key.startswith(name + "{") and labels in key)

    def log(self):
        return self.log_path.read_text(errors="replace")

    def stop(self):
        """End it as a person would; by force what is left."""
        self._process.terminate()
        try:
            return self._process.wait(timeout=20)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=10)

    def _get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as reply:  # noqa: S310
            return reply.read().decode()


@pytest.fixture
def servers(tiny_model, tmp_path):
    servers = [Server(tiny_model, tmp_path / "runtime", tmp_path / f"server-{i}.log") for i in range(2)]
    try:
        for server in servers:
            server.wait_ready()
        yield servers
    finally:
        for server in servers:
            server.stop()


def test_the_second_server_serves_what_the_first_computed(servers, truth):
    first, second = servers
    prompt = random_prompt(PROMPT_TOKENS, seed=9900)
    (right,) = truth.generate([prompt], max_tokens=ANSWER_TOKENS)
    assert first.complete(prompt) == right.tokens
    end = time.monotonic() + ANNOUNCE_WAIT_S
    while first.metric("vllm:kvmarket_blocks_announced_total") < PROMPT_TOKENS // 32:
        assert time.monotonic() < end, first.log()[-4000:]
        first.complete(prompt[:10])  # counters travel with steps
    assert second.complete(prompt) == right.tokens

    assert second.metric("vllm:kvmarket_loaded_tokens_total") == HIT_TOKENS
    assert second.metric("vllm:external_prefix_cache_hits_total") == HIT_TOKENS
    assert second.metric("vllm:prompt_tokens_by_source_total", 'source="external_kv_transfer"') == HIT_TOKENS
    assert second.metric("vllm:kvmarket_transport_bytes_total", 'transport="shm"') > 0
    assert second.metric("vllm:kvmarket_errors_total") == 0
    assert "kv_load_failure_policy is now 'recompute'" in second.log()
