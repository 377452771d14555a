"""Between processes of one host: map the peer's memfd read-only and copy, without the peer's help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmarket.errors import TransportUnavailableError
from kvmarket.region.generations import PeerGenerations
from kvmarket.region.memory import map_peer_memory
from kvmarket.region.pages import PagedMemory
from kvmarket.transport.base import Capabilities, Connection, Transport
from kvmarket.transport.mapped import MappedConnection

if TYPE_CHECKING:
    from kvmarket.deadline import Deadline
    from kvmarket.identity import OwnerInfo
    from kvmarket.region.descriptor import RegionDescriptor


class ShmTransport(Transport):
    """One-sided reads of shared memory.

    Args:
        boot_id: identity of the kernel that this process runs on, to tell which owners are within reach.
        pid_namespace: this process's, for the same.
    """

    scheme = "shm"
    capabilities = Capabilities(one_sided=True, memory=frozenset({"host"}), cross_process=True, cross_host=False)

    def __init__(self, boot_id: str, pid_namespace: int) -> None:
        self._boot_id, self._pid_namespace = boot_id, pid_namespace

    def connect(self, owner: OwnerInfo, descriptor: RegionDescriptor, deadline: Deadline | None = None) -> Connection:
        del deadline  # nobody is waited for
        self.require_memory(owner, descriptor.kind)
        if owner.boot_id != self._boot_id:
            self._refuse(owner, f"{owner.host} is another host")
        if owner.pid_namespace != self._pid_namespace:
            self._refuse(owner, "the owner runs in another PID namespace; let both containers share one (--pid)")
        if not descriptor.memories:
            self._refuse(
                owner, "the owner's memory is private; allocate it with Marketplace.allocate, or publish a copy"
            )
        generations = PeerGenerations(
            descriptor.generations, owner.incarnation, descriptor.layout.num_pages, descriptor.probe
        )
        memories = tuple(map_peer_memory(address) for address in descriptor.memories)
        return MappedConnection(
            self.scheme, "mmap(memfd)", PagedMemory(descriptor.layout, memories), generations.values
        )

    def _refuse(self, owner: OwnerInfo, why: str) -> None:
        raise TransportUnavailableError(why, scheme=self.scheme, peer=str(owner))

    def close(self) -> None:
        """Mappings go with their connections."""
