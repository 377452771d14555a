"""From settings to transports: which backends a marketplace may use, and which of them listen for its readers."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from kvmarket.errors import MissingExtraError, TransportUnavailableError
from kvmarket.logs import Log
from kvmarket.registry.host import boot_id, pid_namespace
from kvmarket.transport.base import ServingTransport
from kvmarket.transport.cuda_ipc import CudaIpcTransport
from kvmarket.transport.cuda_runtime import load_cuda
from kvmarket.transport.inproc import InprocTransport
from kvmarket.transport.shm import ShmTransport

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmarket.config import MarketConfig
    from kvmarket.region.region import LentRegion
    from kvmarket.secret import Secret
    from kvmarket.transport.base import Transport

events = Log(__name__)


def has_ucx() -> bool:
    """Tell whether ucxx is installed, without loading it."""
    return importlib.util.find_spec("ucxx") is not None


def make_transports(config: MarketConfig, environ: Mapping[str, str], secret: Secret | None = None) -> list[Transport]:
    """Return the backends that ``KVMARKET_TRANSPORT`` allows, in order.

    With a `secret`, owners and readers over a network must prove to each other that they have it. ``auto`` has UCX when
    ucxx is installed, for owners that the others do not reach; it starts with the first of them.

    Raises:
        MissingExtraError, TransportUnavailableError: UCX or CUDA is asked for by name and cannot be used.
    """
    if config.transport == "inproc":
        return [InprocTransport()]
    here = boot_id(), pid_namespace()
    if config.transport == "cuda_ipc":
        load_cuda()  # asked for by name, so what is missing for it is an error now
        return [CudaIpcTransport(*here, load_cuda)]
    if config.transport == "shm":
        return [ShmTransport(*here)]
    if config.transport == "ucx":
        return _ucx(config, environ, secret)
    found = [InprocTransport(), ShmTransport(*here), CudaIpcTransport(*here, load_cuda)]
    return [*found, *_ucx(config, environ, secret)] if has_ucx() else found


def _ucx(config: MarketConfig, environ: Mapping[str, str], secret: Secret | None) -> list[Transport]:
    """Return UCX for host memory and, where cupy is installed, for memory of GPUs."""
    if not has_ucx():
        raise MissingExtraError("ucxx", "ucx")
    from kvmarket.transport.ucx import UcxTransport

    addresses = tuple(item.strip() for item in config.ucx_addresses.split(",") if item.strip())
    options: dict[str, Any] = {
        "require": config.ucx_require,
        "addresses": addresses,
        "connect_s": config.ucx_connect_s,
        "secret": secret,
    }
    found: list[Transport] = [UcxTransport(environ, **options)]
    if importlib.util.find_spec("cupy") is not None:
        from kvmarket.transport.ucx_cuda import CudaUcxTransport

        found.append(CudaUcxTransport(environ, load_cuda, **options))
    return found


class Listeners:
    """The transports that answer readers of this process's regions. Not thread-safe.

    With ``auto`` they listen only where other hosts can look the owner up, and one that cannot listen is done without.
    """

    def __init__(self, transports: Sequence[Transport], *, auto: bool, this_host_only: bool) -> None:
        self._auto = auto
        wanted = [] if auto and this_host_only else transports
        self._servers = [transport for transport in wanted if isinstance(transport, ServingTransport)]

    @property
    def schemes(self) -> tuple[str, ...]:
        """Which transports listen, or will with the first region."""
        return tuple(server.scheme for server in self._servers)

    def endpoints(self, incarnation: bytes, kind: str) -> dict[str, tuple[tuple[str, int], ...]]:
        """Listen for readers of that kind of memory, if not yet; return transport -> (address, port) to announce.

        Raises:
            TransportUnavailableError, MissingExtraError: a transport that was asked for by name cannot listen.
        """
        found: dict[str, tuple[tuple[str, int], ...]] = {}
        for server in [server for server in self._servers if kind in server.capabilities.memory]:
            try:
                found[server.scheme] = server.serve(incarnation)
            except TransportUnavailableError as error:
                if not self._auto:
                    raise
                events.warning(
                    "not_listening", "other hosts cannot fetch from here", transport=server.scheme, error=error
                )
                self._servers.remove(server)
        return found

    def lend(self, region: LentRegion) -> None:
        """Serve a region; `endpoints` must have been called."""
        for server in self._servers:
            server.lend(region)

    def close(self) -> None:
        """Drop every reader; when it returns, no lent memory is touched any more."""
        for server in self._servers:
            server.stop_serving()
