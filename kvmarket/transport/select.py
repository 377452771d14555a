"""Which transport carries a read: by locality, proven by a probe, and remembered per region of an incarnation."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from kvmarket.errors import TransportError, TransportUnavailableError
from kvmarket.region.cuda import CudaPagedMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvmarket.deadline import Deadline
    from kvmarket.identity import OwnerInfo
    from kvmarket.region.descriptor import RegionDescriptor
    from kvmarket.region.pages import PagedMemory
    from kvmarket.transport.base import Connection, Transport

CONNECTIONS_MAX = 256


class TransportSelector:
    """Connections to peers' regions, made on demand with the first transport that reaches them. Thread-safe.

    Args:
        transports: backends in order of preference. With one, nothing else is ever used: no silent downgrade.
    """

    def __init__(self, transports: Sequence[Transport]) -> None:
        self._transports = tuple(transports)
        self._lock = threading.Lock()
        self._connections: OrderedDict[tuple[bytes, int, int], Connection] = OrderedDict()
        self._owners: dict[bytes, int] = {}

    def connection(
        self,
        owner: OwnerInfo,
        region_id: int,
        describe: Callable[[], RegionDescriptor],
        deadline: Deadline | None = None,
        local: PagedMemory | None = None,
        *,
        prove: bool = False,
    ) -> Connection:
        """Return a connection to a region; `describe` is called only when there is none yet.

        With `local` it is one that reads into that memory: for a card, the first that reaches the owner's from there.
        An owner that must be waited for is waited for until `deadline`. With `prove` a new one is proven, for memory
        like the owner's.

        Raises:
            TransportUnavailableError: no transport reaches it; the message has each one's reason.
            PeerGoneError: the owner is gone.
        """
        key = _key(owner, region_id, local)
        with self._lock:
            if key in self._connections:
                self._connections.move_to_end(key)
                return self._connections[key]
        descriptor = describe()
        made = self._connect(owner, descriptor, deadline, local, prepare=prove or isinstance(local, CudaPagedMemory))
        made.tier = descriptor.tier
        with self._lock:
            kept = self._connections.setdefault(key, made)
            self._owners[owner.incarnation] = owner.owner
            while len(self._connections) > CONNECTIONS_MAX:
                self._connections.popitem(last=False)
        if kept is not made:  # another thread was faster
            made.close()
        return kept

    def is_connected(self, owner: OwnerInfo, region_id: int, local: PagedMemory) -> bool:
        """Tell whether `connection` would return one that is there already, and ready to read into `local`."""
        return _key(owner, region_id, local) in self._connections

    def _connect(
        self,
        owner: OwnerInfo,
        descriptor: RegionDescriptor,
        deadline: Deadline | None,
        local: PagedMemory | None,
        *,
        prepare: bool,
    ) -> Connection:
        reasons: list[str] = []
        for transport in self._transports:
            try:
                connection = transport.connect(owner, descriptor, deadline)
                if prepare:
                    connection.prepare(local)
                return connection
            except TransportUnavailableError as error:
                reasons.append(f"{transport.scheme}: {error}")
        raise TransportUnavailableError("; ".join(reasons), scheme="+".join(self.schemes), peer=str(owner))

    def explain(self, owner: OwnerInfo, descriptor: RegionDescriptor) -> list[tuple[str, bool, str]]:
        """Try every transport to a region; return (scheme, reached, path or reason) in order of preference.

        The first that reached is the one that reads would take. No connection is kept.
        """
        found = []
        for transport in self._transports:
            try:
                connection = transport.connect(owner, descriptor)
                connection.prepare()
            except TransportError as error:
                found.append((transport.scheme, False, str(error)))
            else:
                found.append((transport.scheme, True, connection.path))
                connection.close()
        return found

    @property
    def transports(self) -> tuple[Transport, ...]:
        """The backends in order of preference."""
        return self._transports

    @property
    def schemes(self) -> tuple[str, ...]:
        """The transports in order of preference."""
        return tuple(transport.scheme for transport in self._transports)

    def immediate(self, owners: Iterable[OwnerInfo]) -> bool:
        """Tell whether reads from these owners wait for nobody, as far as is known: connecting to a host may wait."""
        if not any(transport.capabilities.cross_host for transport in self._transports):
            return True
        with self._lock:
            waits: dict[bytes, bool] = {}
            for (incarnation, *_), connection in self._connections.items():
                waits[incarnation] = waits.get(incarnation, False) or not connection.immediate
        return not any(waits.get(owner.incarnation, True) for owner in owners)

    def forget(self, owner: OwnerInfo) -> None:
        """Drop the connections to an owner that is gone, and with them its mapped memory."""
        with self._lock:
            for key in [key for key in self._connections if key[0] == owner.incarnation]:
                del self._connections[key]

    def forget_dead(self, alive: Callable[[int], bool]) -> None:
        """Drop the connections to owners of which `alive` says no: their memory lasts as long as somebody maps it."""
        with self._lock:
            known = {incarnation for incarnation, *_ in self._connections}
            self._owners = {incarnation: owner for incarnation, owner in self._owners.items() if incarnation in known}
            dead = {incarnation for incarnation, owner in self._owners.items() if not alive(owner)}
            for key in [key for key in self._connections if key[0] in dead]:
                del self._connections[key]

    def close(self) -> None:
        """Close every connection and backend. No read may be running."""
        with self._lock:
            connections = list(self._connections.values())
            self._connections.clear()
        for connection in connections:
            connection.close()
        for transport in self._transports:
            transport.close()


def _key(owner: OwnerInfo, region_id: int, local: PagedMemory | None) -> tuple[bytes, int, int]:
    """Connections are told apart by region and by the card they read into; -1 stands for the host, or for no memory."""
    return owner.incarnation, region_id, local.device if isinstance(local, CudaPagedMemory) else -1
