"""One vLLM engine inside a replica, driven step by step."""

from __future__ import annotations

import importlib
import inspect
import os
import time
from typing import TYPE_CHECKING, Any

from kvmarket.testing.vllm_replica import Generation

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from kvmarket.testing.vllm_replica import ReplicaConfig

_DRAIN_TIMEOUT_S = 5.0
_IDLE_SLEEP_S = 0.001


class EngineDriver:
    """Drives one in-process ``LLMEngine`` step by step. Its public methods are the commands."""

    def __init__(self, config: ReplicaConfig) -> None:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        fields: dict[str, Any] = {
            "model": os.fspath(config.model),
            "dtype": config.dtype,
            "block_size": config.block_size,
            "kv_cache_memory_bytes": config.kv_cache_bytes,
            "max_model_len": config.max_model_len,
            "max_num_batched_tokens": config.max_batched_tokens,
            "max_num_seqs": config.max_sequences,
            "enable_prefix_caching": True,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
            "seed": 0,
        }
        if config.connector is not None:
            fields["kv_transfer_config"] = KVTransferConfig(**config.connector)
        self._engine: LLMEngine = LLMEngine.from_engine_args(EngineArgs(**{**fields, **config.engine_args}))
        self._core: Any = self._engine.engine_core.engine_core
        # The client's own loop neither pauses nor tells which tokens came from a connector.
        self._engine.engine_core.get_output = self._get_output
        # Some versions' own client, unlike their server, drops the counts of steps that end without an output.
        self._drops_counts = "len(outputs.outputs) > 0" in inspect.getsource(LLMEngine.step)
        self._prefill_stats: dict[str, Any] = {}
        self._next_request = 0

    def generate(
        self,
        *,
        prompts: list[list[int]],
        max_tokens: int,
        timeout_s: float,
        together: bool,
        cache_salt: str | None,
    ) -> list[Generation]:
        from vllm import SamplingParams

        end = time.monotonic() + timeout_s
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        batches = [prompts] if together else [[prompt] for prompt in prompts]
        return [generation for batch in batches for generation in self._run_batch(batch, params, end, cache_salt)]

    def counters(self) -> dict[str, float]:
        from prometheus_client import REGISTRY

        values: dict[str, float] = {}
        for metric in REGISTRY.collect():
            if metric.type not in ("counter", "gauge"):
                continue
            for sample in metric.samples:
                if sample.name.endswith(("_created", "_info")):
                    continue
                name = sample.name.removesuffix("_total")
                values[name] = values.get(name, 0.0) + sample.value
                labels = sorted(set(sample.labels) - {"model_name", "engine"})
                if labels:
                    values[f"{name}{{{','.join(f'{k}={sample.labels[k]}' for k in labels)}}}"] = sample.value
        return values

    def reset_prefix_cache(self, *, connector: bool) -> bool:
        return bool(self._engine.reset_prefix_cache(reset_connector=connector))

    def call(self, *, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module, _, name = target.partition(":")
        return getattr(importlib.import_module(module), name)(self._engine, *args, **kwargs)

    def stop(self) -> None:
        self._engine.engine_core.shutdown()

    def _run_batch(
        self, prompts: list[list[int]], params: SamplingParams, end: float, cache_salt: str | None
    ) -> list[Generation]:
        began: dict[str, float] = {}
        first: dict[str, float] = {}
        outcome: dict[str, Generation] = {}
        engine_ids: dict[str, str] = {}
        for prompt in prompts:
            request_id = f"request-{self._next_request}"
            self._next_request += 1
            began[request_id] = time.perf_counter()
            text: Any = {"prompt_token_ids": prompt, **({"cache_salt": cache_salt} if cache_salt else {})}
            engine_ids[request_id] = self._engine.add_request(request_id, text, params) or request_id
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.outputs[0].token_ids:
                    first.setdefault(output.request_id, now)
                if output.finished:
                    stats = self._prefill_stats.pop(engine_ids[output.request_id], None)
                    outcome[output.request_id] = Generation(
                        tokens=tuple(output.outputs[0].token_ids),
                        cached_tokens=output.num_cached_tokens or 0,
                        external_tokens=getattr(stats, "num_external_cached_tokens", None),
                        ttft_s=first.get(output.request_id, now) - began[output.request_id],
                        total_s=now - began[output.request_id],
                        finish_reason=output.outputs[0].finish_reason,
                    )
            if time.monotonic() > end:
                self._engine.abort_request(list(engine_ids.values()), internal=True)
                self._drain()
                raise TimeoutError(f"{len(prompts) - len(outcome)} prompts unfinished at the deadline")
        self._drain()
        return [outcome[request_id] for request_id in began]

    def _drain(self) -> None:
        """Step on until the scheduler has nothing left, as the engine's own process would."""
        end = time.monotonic() + _DRAIN_TIMEOUT_S
        while self._core.scheduler.has_requests():
            if time.monotonic() > end:
                raise TimeoutError("the scheduler still holds finished requests")
            self._engine.step()

    def _get_output(self) -> Any:
        """Step the engine core once, with the pause of the engine's own process.

        Where nothing was computed although requests wait (for a connector), vLLM's busy loop
        sleeps for a millisecond; the in-process client would spin.
        """
        from vllm.v1.engine import EngineCoreOutputs

        outputs, executed = self._core.step_fn()
        self._core.post_step(model_executed=executed)
        if not executed and self._core.scheduler.has_requests():
            time.sleep(_IDLE_SLEEP_S)
        result = (outputs or {}).get(0) or EngineCoreOutputs()
        if self._drops_counts and not result.outputs and result.scheduler_stats is not None:
            manager: Any = self._engine.logger_manager
            manager.record(scheduler_stats=result.scheduler_stats, iteration_stats=None)
        for output in result.outputs:
            if (stats := getattr(output, "prefill_stats", None)) is not None:
                self._prefill_stats[output.request_id] = stats
        return result
