"""What ``kvmarket doctor --peer`` shows: how this process would reach one peer, found out by reaching it."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING

from kvmarket.deadline import Deadline
from kvmarket.diagnosis import shared_registry
from kvmarket.errors import ConfigError, MissingExtraError, TransportError
from kvmarket.reach import has_ucx, make_transports
from kvmarket.region.descriptor import RegionDescriptor
from kvmarket.transport import TransportSelector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmarket.config import MarketConfig
    from kvmarket.identity import OwnerInfo
    from kvmarket.registry import Registry

PEER_S = 8.0
"""For everything about one address."""
ENDPOINTS_MAX = 3
"""Addresses of one owner that are tried."""


def view_address(
    host: str, port: int, config: MarketConfig, environ: Mapping[str, str], incarnation: bytes | None = None
) -> list[str]:
    """Connect through UCX to whoever listens there; return what was found, line by line.

    Args:
        host: a name or an address.
        port: where an owner listens.
        config: what is required of the lanes.
        environ: the environment, with the user's own UCX settings.
        incarnation: the owner's, where it is known; without it an owner refuses, but connects all the same.

    Raises:
        MissingExtraError, TransportUnavailableError: UCX cannot be used here.
        ConnectError: no owner answers there; the message says what was found instead.
    """
    if not has_ucx():
        raise MissingExtraError("ucxx", "ucx")
    from kvmarket.transport.ucx import UcxTransport
    from kvmarket.transport.ucx_facts import facts_of
    from kvmarket.transport.ucx_probe import UNKNOWN, is_local, probe
    from kvmarket.transport.ucx_settings import SHARED_MEMORY, lanes_text, missing_requirement, reads_one_sided

    environ = dict(environ)  # as it is before ucxx adds to it
    transport = UcxTransport(environ)
    try:
        found = probe(transport.driver, host, port, Deadline(PEER_S), incarnation or UNKNOWN)
        facts = facts_of(environ, transport.settings, found.lanes)
    finally:
        transport.close()
    shared = any(name in SHARED_MEMORY and device for name, device in found.lanes)
    same_host = shared or is_local(found.address)
    how = "one-sided" if reads_one_sided(found.lanes) else "two-sided"
    times = f"after {1e3 * found.connect_s:.1f} ms, then with a round trip of {1e3 * found.round_trip_s:.2f} ms"
    said = [
        f"an owner answers at {found.address}:{found.port} {times}",
        f"UCX lanes: {lanes_text(found.lanes)}; reads are {how}",
    ]
    if found.refusal and incarnation is None:
        said.append(f"it does not serve strangers ({found.refusal}), as it should: readers know it from the registry")
    elif found.refusal:
        said.append(f"it refuses: {found.refusal}")
    if found.secret:
        said.append("it serves only readers that prove to have its secret")
    if incarnation is None:
        said.append(_choice(shared=shared, same_host=same_host))
    if missing := missing_requirement(config.ucx_require, found.lanes):
        said.append(f"refused by KVMARKET_UCX_REQUIRE: {missing}")
    return said + [f"to change: {text}" for text in facts.advice_towards(found.lanes, same_host=same_host)]


def _choice(*, shared: bool, same_host: bool) -> str:
    """What ``auto`` would do with a peer of which only the address is known."""
    if shared:
        why = "it is on this host, as UCX's shared memory shows; UCX would be taken for what cannot be mapped"
        return f"auto would choose shm: {why}"
    if same_host:
        return (
            "auto would choose shm where it can map the owner's memory, else ucx: the address is this host's, but UCX "
            "found no shared memory with it"
        )
    return "auto would choose ucx: the peer is on another host"


def view_owner(name: str, registry: Registry, config: MarketConfig, environ: Mapping[str, str]) -> list[str]:
    """Say how one live owner of the registry is reached, by every transport and by the one that ``auto`` would choose.

    Args:
        name: its number, or host and process as ``kvmarket doctor`` shows them.
        registry: where it is looked up.
        config: what is set, of which the transport is only mentioned.
        environ: the environment, with the user's own UCX settings.

    Raises:
        ConfigError: there is no such live owner.
    """
    shared = shared_registry(registry)
    owners = shared.live_owners()
    matching = [(owner, regions) for owner, regions in owners if name in {str(owner), str(owner.owner)}]
    if not matching:
        there = ", ".join(f"{owner.owner} ({owner})" for owner, _ in owners) or "none"
        raise ConfigError(f"--peer {name!r} is neither HOST:PORT nor a live owner; live owners: {there}")
    owner, regions = matching[0]
    wires = (shared.region(owner.owner, region) for region in regions)
    descriptor = next((RegionDescriptor.from_wire(wire) for wire in wires if wire is not None), None)
    if descriptor is None:
        return [f"owner {owner.owner} ({owner}) lends nothing yet"]
    said = [f"owner {owner.owner} ({owner})", *_paths(owner, descriptor, config, environ)]
    for host, port in descriptor.endpoints.get("ucx", ())[:ENDPOINTS_MAX]:
        try:
            seen = view_address(host, port, config, environ, owner.incarnation)
        except (TransportError, MissingExtraError) as error:
            said.append(f"by UCX at {host}:{port}: NO: {error}")
        else:
            return said + seen
    return said


def _paths(
    owner: OwnerInfo, descriptor: RegionDescriptor, config: MarketConfig, environ: Mapping[str, str]
) -> list[str]:
    """Try every transport that ``auto`` has, whichever is set."""
    selector = TransportSelector(
        make_transports(replace(config, transport="auto"), dict(environ), config.read_secret())
    )
    try:
        paths = selector.explain(owner, descriptor)
    finally:
        selector.close()
    said = [f"{scheme:8} {'yes' if reached else 'no'}: {text}" for scheme, reached, text in paths]
    chosen = next(((scheme, text) for scheme, reached, text in paths if reached), None)
    if chosen is None:
        said.append("auto would choose none: nothing reaches it, and every fetch from it is a miss")
    else:
        passed = [scheme for scheme, _, _ in takewhile(lambda path: not path[1], paths)]
        why = f"not reached by {', '.join(passed)}" if passed else "nothing comes before it"
        said.append(f"auto would choose {chosen[0]}, {chosen[1]}: {why}")
    if config.transport != "auto":
        said.append(f"but KVMARKET_TRANSPORT={config.transport} is set: only that is used")
    return said
