"""The main job as a scene for tests, demo and benchmark: one replica computes a prefix, another fetches it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmarket.testing.tiny_models import random_prompt

if TYPE_CHECKING:
    from kvmarket.testing.vllm_replica import Generation, Replica

CONNECTOR = {
    "kv_connector": "KVMarketConnector",
    "kv_connector_module_path": "kvmarket_vllm.connector",
    "kv_role": "kv_both",
}
"""vLLM's ``--kv-transfer-config`` for kvmarket: all there is to plug in."""

ANNOUNCE_WAIT_S = 10.0
_CARRIED = "vllm:kvmarket_transport_bytes{transport="


@dataclass(frozen=True, slots=True)
class Round:
    """One prompt computed by the publisher, fetched by the reader, then found by the reader in its own cache.

    Attributes:
        prompt_tokens: tokens of the prompt.
        cold, fetched, local: what the publisher computed, the reader fetched, and the reader had.
        truth: what a replica without the connector says; None if none was asked.
    """

    prompt_tokens: int
    cold: Generation
    fetched: Generation
    local: Generation
    truth: Generation | None

    @property
    def external_tokens(self) -> int:
        """Prompt tokens that the reader did not compute because it fetched them."""
        return self.fetched.external_tokens or 0

    @property
    def identical(self) -> bool:
        """True when everybody gave the same tokens."""
        answers = [self.cold, self.fetched, self.local, *([self.truth] if self.truth else [])]
        return len({answer.tokens for answer in answers}) == 1


def answer(replica: Replica, prompt: list[int], max_tokens: int) -> Generation:
    """Return a replica's greedy answer to one prompt."""
    (generation,) = replica.generate([prompt], max_tokens=max_tokens)
    return generation


def wait_announced(replica: Replica, blocks: float) -> None:
    """Wait until the registry has taken at least `blocks` blocks from a replica, in all.

    Raises:
        TimeoutError: it has not within `ANNOUNCE_WAIT_S`.
    """
    deadline = time.monotonic() + ANNOUNCE_WAIT_S
    while replica.call("kvmarket_vllm.inspect:announced_blocks") < blocks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{blocks:.0f} blocks were not announced: {_announcing(replica)}\n{replica.log_tail()}")
        time.sleep(0.005)


def _announcing(replica: Replica) -> str:
    waiting = replica.call("kvmarket_vllm.inspect:waiting")
    counted = {name: value for name, value in replica.counters().items() if "kvmarket" in name and value}
    return f"waiting {waiting}, counted {counted}"


def play_round(
    publisher: Replica,
    reader: Replica,
    plain: Replica | None,
    *,
    seed: int,
    prefix_tokens: int = 1536,
    tail_tokens: int = 64,
    answer_tokens: int = 16,
    block_size: int = 32,
) -> Round:
    """Play one prompt that nobody has seen before."""
    prompt = random_prompt(prefix_tokens, seed=seed) + random_prompt(tail_tokens, seed=100_000 + seed)
    before = publisher.call("kvmarket_vllm.inspect:announced_blocks")
    cold = answer(publisher, prompt, answer_tokens)
    wait_announced(publisher, before + len(prompt) // block_size)
    fetched = answer(reader, prompt, answer_tokens)
    local = answer(reader, prompt, answer_tokens)
    truth = answer(plain, prompt, answer_tokens) if plain is not None else None
    return Round(len(prompt), cold, fetched, local, truth)


def carried_by(replica: Replica) -> str:
    """Return the transports that carried bytes to a replica, by its own metrics, joined by ``+``; ``none`` if none."""
    found = [name for name, value in replica.counters().items() if name.startswith(_CARRIED) and value > 0]
    return "+".join(sorted(name.removeprefix(_CARRIED).removesuffix("}") for name in found)) or "none"
