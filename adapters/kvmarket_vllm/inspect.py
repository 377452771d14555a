"""Looking into a running engine of this process, for tests, demos and debuggers. Takes vLLM's ``LLMEngine``."""

from __future__ import annotations

from typing import Any


def roles(engine: Any) -> tuple[Any, Any]:
    """Return the worker and scheduler connectors of an engine that runs in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group(), engine.engine_core.engine_core.scheduler.connector


def announced_blocks(engine: Any) -> float:
    """Return how many blocks the registry has taken from this engine so far."""
    market = roles(engine)[0].market
    return market.core.metrics.snapshot().get("blocks_announced", 0.0) if market is not None else 0.0


def hook_times(engine: Any) -> dict[str, tuple[int, float]]:
    """Return (steps, seconds of the engine's thread) of each role's hooks since the start; nothing without kvmarket."""
    times = (getattr(role, "hook_time", None) for role in roles(engine))
    return {each.role: (each.steps, each.seconds) for each in times if each is not None}


def waiting(engine: Any) -> dict[str, int]:
    """Return how much waits to be announced, see `kvmarket.publish.Publisher.waiting`."""
    market = roles(engine)[0].market
    return dict(market.publisher.waiting) if market is not None and market.publisher is not None else {}
