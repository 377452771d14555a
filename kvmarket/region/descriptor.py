"""What a reader must know of a region to read it: where its pages and generations are, and how to check them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kvmarket.errors import InvalidInputError, RegistryProtocolError
from kvmarket.region.cuda import HANDLE_BYTES, UUID_BYTES, CudaAddress
from kvmarket.region.generations import PROBE_BYTES
from kvmarket.region.memory import MemoryAddress
from kvmarket.region.pages import PageLayout, Segment

if TYPE_CHECKING:
    from collections.abc import Mapping

SEGMENTS_MAX = 65536
MEMORIES_MAX = 4096
ADDRESSES_MAX = 64
_ADDRESS_CHARS_MAX = 255
WORD_MAX = 32


@lru_cache(maxsize=64)
def _one_of_its_kind(layout: PageLayout) -> PageLayout:
    """Return the first layout that was equal to this one.

    A copy looks for its tables by the layouts, and two objects of a hundred segments take a while to be found equal.
    """
    return layout


@dataclass(frozen=True, slots=True)
class RegionDescriptor:
    """The public face of a lent region.

    Attributes:
        region_id: its number among its owner's regions.
        fingerprint: the KV cache spec's, 16 bytes.
        layout: where the pages lie in `memories`.
        memories: shared memories, empty when only the owner's process can read the region.
        generations: the generation table.
        probe: bytes that a reader must find in the table, proof that the path carries bytes.
        endpoints: transport -> where the owner listens for it, (address, port) in order of preference.
        verify: how the owner verifies what it adopts, and so what it passes on: ``full``, ``sampled`` or ``none``.
        kind: what holds the pages: ``host`` or ``cuda``.
        cuda: where CUDA memory is: a place that holds `probe`, and then the memories; empty when it is private.
        digest: algorithm of the digests in this region's records.
        tier: what holds the pages at the owner: ``engine`` (lent in place) or ``host`` (an arena of copies).
    """

    region_id: int
    fingerprint: bytes
    layout: PageLayout
    memories: tuple[MemoryAddress, ...]
    generations: MemoryAddress
    probe: bytes
    verify: str = "none"
    endpoints: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    kind: str = "host"
    cuda: tuple[CudaAddress, ...] = ()
    digest: str = "xxh3_128"
    tier: str = "engine"

    def to_wire(self) -> dict[str, Any]:
        """The msgpack-ready form."""
        wire: dict[str, Any] = {
            "region": self.region_id,
            "spec": self.fingerprint,
            "layout": self.layout.as_list(),
            "memories": [memory.as_list() for memory in self.memories],
            "generations": self.generations.as_list(),
            "probe": self.probe,
            "verify": self.verify,
        }
        if self.endpoints:
            wire["endpoints"] = {scheme: [list(item) for item in where] for scheme, where in self.endpoints.items()}
        if self.tier != "engine":
            wire["tier"] = self.tier
        if self.kind != "host":
            addresses = [address.as_list() for address in self.cuda]
            wire |= {"memory_kind": self.kind, "cuda": addresses, "digest": self.digest}
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> RegionDescriptor:
        """Read `to_wire`'s form; unknown keys are ignored.

        Raises:
            RegistryProtocolError: something is missing, of the wrong type or out of bounds.
        """
        try:
            num_pages, segments = wire["layout"]
            memories, cuda = wire["memories"], wire.get("cuda", ())
            count = max(len(memories), len(cuda))
            if len(segments) > SEGMENTS_MAX or count > MEMORIES_MAX:
                raise RegistryProtocolError(f"a region of {len(segments)} segments in {count} memories is too large")
            layout = _one_of_its_kind(
                PageLayout(_integer(num_pages), tuple(Segment(*map(_integer, item)) for item in segments))
            )
            descriptor = cls(
                region_id=_integer(wire["region"]),
                fingerprint=_data(wire["spec"], 16),
                layout=layout,
                memories=tuple(MemoryAddress(*map(_integer, item)) for item in memories),
                generations=MemoryAddress(*map(_integer, wire["generations"])),
                probe=_data(wire["probe"], PROBE_BYTES),
                endpoints=_endpoints(wire.get("endpoints", {})),
                verify=_word(wire["verify"]),
                kind=_word(wire.get("memory_kind", "host")),
                cuda=tuple(_cuda_address(*item) for item in cuda),
                tier=_word(wire.get("tier", "engine")),
                digest=_word(wire.get("digest", "xxh3_128")),
            )
            if not all(memory.nbytes for memory in (*descriptor.memories, descriptor.generations)):
                raise ValueError("a memory without bytes")  # noqa: TRY301 - one translation for every malformed field
            if memories:
                layout.check([memory.nbytes for memory in descriptor.memories])
            if cuda:
                layout.check([memory.nbytes for memory in descriptor.cuda[1:]])
        except (KeyError, TypeError, ValueError, InvalidInputError) as error:
            raise RegistryProtocolError(f"a region descriptor cannot be read: {error!r}") from error
        return descriptor


def _integer(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a non-negative integer")
    return value


def _endpoints(wire: Any) -> dict[str, tuple[tuple[str, int], ...]]:
    """Read the optional map of listening addresses; descriptors made before there was one have none."""
    if not isinstance(wire, dict):
        raise TypeError("endpoints must be a map")
    found: dict[str, tuple[tuple[str, int], ...]] = {}
    for scheme, where in wire.items():
        if not isinstance(scheme, str) or not isinstance(where, list) or len(where) > ADDRESSES_MAX:
            raise ValueError("endpoints must name lists of addresses")
        for address, port in where:
            if not isinstance(address, str) or len(address) > _ADDRESS_CHARS_MAX or not 0 < _integer(port) < 1 << 16:
                raise ValueError(f"{address!r}:{port!r} is not an address")
        found[scheme] = tuple((address, port) for address, port in where)
    return found


def _data(value: object, length: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != length:
        raise ValueError(f"expected {length} bytes")
    return value


def _word(value: object) -> str:
    if not isinstance(value, str) or len(value) > WORD_MAX:
        raise ValueError(f"expected at most {WORD_MAX} characters")
    return value


def _cuda_address(device: object, handle: object, *numbers: object) -> CudaAddress:
    return CudaAddress(_data(device, UUID_BYTES), _data(handle, HANDLE_BYTES), *map(_integer, numbers))
