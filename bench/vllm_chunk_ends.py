"""How many answers of one vLLM replica change with where the chunks of a prompt end, without any connector.

Replicas of the tiny model in float32 on one card. Each prompt is computed in one pass, with an empty cache; then again
and again with a prefix of it, of random length, in the replica's own cache. With products of TensorFloat-32 (Triton's
default) and without. What differs here differs in any cache of prefixes, and is no fault of what moved the bytes.

    python bench/vllm_chunk_ends.py [--answers 800]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from kvmarket.testing.tiny_models import TINY_MODEL, random_prompt, write_model
from kvmarket.testing.vllm_gpu import BLOCK_SIZE, gpu_replica
from kvmarket.testing.vllm_replica import ReplicaHost

if TYPE_CHECKING:
    from kvmarket.testing.vllm_replica import Replica

PROMPTS, ANSWER_TOKENS, START_S = 32, 6, 240
KINDS = ("tf32", "ieee")


def prompts() -> list[list[int]]:
    """Return the prompts of the test of pages that are overwritten while peers read them."""
    rng = random.Random(7)
    return [random_prompt(rng.randrange(300, 500), seed=600 + number) for number in range(PROMPTS)]


class Control:
    """One replica that answers with prefixes of different lengths in its cache."""

    def __init__(self, replica: Replica, seed: int) -> None:
        self._replica, self._rng = replica, random.Random(seed)
        self._asked = prompts()
        self.right = []
        for prompt in self._asked:
            replica.reset_prefix_cache()
            self.right += [each.tokens for each in replica.generate([prompt], max_tokens=ANSWER_TOKENS)]
        self.answers, self.hits, self.different = 0, 0, list[tuple[int, int]]()

    def play(self, answers: int) -> None:
        """Ask until there are that many answers."""
        while self.answers < answers:
            number = self._rng.randrange(PROMPTS)
            prompt = self._asked[number]
            self._replica.reset_prefix_cache()
            self._replica.generate([prompt[: self._rng.randrange(BLOCK_SIZE, len(prompt))]], max_tokens=1)
            (answer,) = self._replica.generate([prompt], max_tokens=ANSWER_TOKENS)
            self.answers += 1
            self.hits += answer.cached_tokens > 0
            if answer.tokens != self.right[number]:
                self.different.append((number, answer.cached_tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=800, help="of each kind (default 800)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvmarket-bench-") as name, ReplicaHost(preload=False) as host:
        model = write_model(Path(name), TINY_MODEL)
        fields = {"kv_cache_bytes": 256 << 20, "max_model_len": 1024}
        replicas = {
            kind: host.launch(
                gpu_replica(model, Path(name), plain=True, environ={"TRITON_F32_DEFAULT": kind}, **fields)
            )
            for kind in KINDS
        }
        for replica in replicas.values():
            replica.wait_ready(timeout_s=START_S)
        with ThreadPoolExecutor() as threads:
            controls = {kind: Control(replica, seed=11) for kind, replica in replicas.items()}
            list(threads.map(lambda control: control.play(args.answers), controls.values()))
    result = {
        kind: {"answers": each.answers, "local_hits": each.hits, "different": len(each.different)}
        for kind, each in controls.items()
    }
    agree = sum(a == b for a, b in zip(controls["tf32"].right, controls["ieee"].right, strict=True))
    for kind, control in controls.items():
        print(kind, result[kind], "(prompt, cached tokens):", control.different[:20])
    print(f"one pass: {agree} of {PROMPTS} answers are the same with and without TensorFloat-32")
    print(json.dumps({"bench": "vllm_chunk_ends", **result}))


if __name__ == "__main__":
    main()
