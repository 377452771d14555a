"""What the two roles of the connector tell each other, once at start and once per engine step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

if TYPE_CHECKING:
    from kvmarket.registry import LookupResult

Rank = tuple[int, int]
"""(pipeline rank, tensor rank) of a worker."""


@dataclass
class WorkerFacts(KVConnectorHandshakeMetadata):
    """What only a worker knows of its KV cache, sent to the scheduler once, before the first request.

    Attributes:
        spec: `KVCacheSpec` as a dict.
        engine: engine-specific facts that must be equal between replicas.
        model: `ModelIdentity` as a dict.
        refusal: why this worker cannot share its KV cache, or empty.
    """

    spec: dict[str, Any]
    engine: tuple[tuple[str, str], ...]
    model: dict[str, str]
    refusal: str = ""


@dataclass
class Load:
    """Blocks to read from peers into blocks that vLLM allocated and nobody else can see yet.

    Attributes:
        request_id: the request that waits for them.
        block_ids: where they go, in order.
        found: per (pp_rank, tp_rank): the records to read.
    """

    request_id: str
    block_ids: list[int]
    found: dict[Rank, LookupResult]


@dataclass
class StepPlan(KVConnectorMetadata):
    """One engine step, from the scheduler role to every worker.

    Attributes:
        root: the root of this engine's block hashes; part of the namespace.
        dirty: offered blocks that this step overwrites: unreadable before the forward.
        publish: (registry key, block id) of blocks whose KV is final after the forward.
        held: the same of blocks whose KV was final before: fetched, or hit locally, by requests that began earlier.
        loads: to start in this step.
        keep: (registry key, key of the block before it or None, block id) of what is in `dirty`, to be copied before.
        forget: make every page unreadable first (the local prefix cache was reset).
        idle: nothing is computed in this step.
        begins: a request begins in this step, or a load.
    """

    root: bytes = b""
    dirty: list[int] = field(default_factory=list)
    publish: list[tuple[bytes, int]] = field(default_factory=list)
    held: list[tuple[bytes, int]] = field(default_factory=list)
    keep: list[tuple[bytes, bytes | None, int]] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    forget: bool = False
    idle: bool = False
    begins: bool = False

    @property
    def quiet(self) -> bool:
        """True when workers have nothing to do before the forward: steps that go on decoding are mostly so."""
        return not (self.begins or self.dirty or self.offers or self.loads or self.forget)

    @property
    def offers(self) -> bool:
        """True when workers have something to offer."""
        return bool(self.publish or self.held)

    def offer_nothing(self) -> None:
        """Have workers offer nothing after all."""
        self.publish.clear()
        self.held.clear()
