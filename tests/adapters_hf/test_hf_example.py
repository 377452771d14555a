"""The example still runs, and what it says is true."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmarket.testing.tiny_models import TINY_MODEL, write_model

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
ROOT = Path(__file__).parents[2]


def test_the_example_shares_a_prompt(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")])
    model = str(write_model(tmp_path, TINY_MODEL))
    command = [sys.executable, str(ROOT / "examples/hf_share.py"), "--tokens", "200", "--model", model]
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # threads that spin slow a busy machine down
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True, env=environ)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["tokens"], result["tokens_fetched"], result["tokens_identical"]) == (200, 192, True)
    assert result["transport"] == ["shm: mmap(memfd)"]
