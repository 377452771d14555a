"""The ``kvmarket`` command: what this machine can do, what is published on it, and tidying up."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields

import typer

import kvmarket
from kvmarket.addresses import parse_address
from kvmarket.config import HIDDEN, MarketConfig
from kvmarket.diagnosis import OwnerView, Usage, check_shared_memory, check_ucx, usage, view_owners
from kvmarket.diagnosis_peer import view_address, view_owner
from kvmarket.errors import KVMarketError
from kvmarket.registry import Registry, open_registry

KIB = 1024

app = typer.Typer(add_completion=False, no_args_is_help=True, help="A memcached for transformer attention states.")


def _settings() -> MarketConfig:
    return MarketConfig.from_env()


def _open(config: MarketConfig) -> Registry:
    if config.registry == "memory":
        raise typer.BadParameter("KVMARKET_REGISTRY=memory lives inside one process; there is nothing to look at")
    return open_registry(config)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < KIB or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= KIB
    raise AssertionError


def _doctor_peer(peer: str, config: MarketConfig) -> None:
    """Look at one peer only; an address needs no registry."""
    if (address := parse_address(peer)) is not None and address[1]:
        lines = view_address(*address, config, os.environ)
    else:
        registry = _open(config)
        try:
            lines = view_owner(peer, registry, config, os.environ)
        finally:
            registry.close()
    print(f"\npeer {peer}")
    for line in lines:
        print(f"  {line}")


@app.command()
def doctor(
    peer: str = typer.Option(
        "", help="Only this peer: HOST:PORT where an owner listens for UCX, or a live owner's number or name."
    ),
) -> None:
    """Say what this machine can do, what `auto` would choose towards each live owner, and what to change."""
    config = _settings()
    print(f"kvmarket {kvmarket.__version__}, Python {sys.version.split()[0]}")
    if peer:
        _doctor_peer(peer, config)
        return
    print("\nsettings in force")
    for item in fields(config):
        value = getattr(config, item.name)
        value = ("(set)" if value else "") if item.name in HIDDEN else value
        value = config.registry_shown if item.name == "registry" else value
        print(f"  {item.metadata['env']:28} {value!r}")
    print(f"  {'runtime directory':28} {config.directory}")
    print("\ntransports")
    print("  inproc   between marketplaces of one process: always")
    print(f"  shm      between processes of one host: {check_shared_memory()}")
    for number, text in enumerate(check_ucx(config, os.environ)):
        print(f"  {'' if number else 'ucx':8} {'' if number else 'between hosts: '}{text}")
    print("\nregistry")
    registry = _open(config)
    try:
        numbers = usage(registry, config.read_secret().tag)
        limit = f"at most {_size(numbers.limit_bytes)}" if numbers.limit_bytes else "no limit of its own"
        print(f"  {numbers.path}: {_size(numbers.used_bytes)} used, {limit}")
        print(f"  {numbers.blocks} blocks, {numbers.owners} owners of which {numbers.dead_owners} are dead")
        if numbers.dead_owners:
            print("  dead owners' records are never served; `kvmarket sweep` and every new marketplace remove them")
        print("\nlive owners")
        owners = view_owners(registry, config, explain=True)
        for owner in owners:
            print(f"  {owner.name}: {owner.verdict}")
            for scheme, reached, text in owner.paths:
                print(f"    {scheme:7} {'yes' if reached else 'no'}: {text}")
        if not owners:
            print("  none")
    finally:
        registry.close()


@app.command()
def stats(as_json: bool = typer.Option(False, "--json", help="One JSON object.")) -> None:
    """Show what is published in the registry: namespaces, owners, blocks."""
    config = _settings()
    registry = _open(config)
    try:
        tag = config.read_secret().tag
        numbers, owners = usage(registry, tag), view_owners(registry, config)
        namespaces = registry.namespaces(1024, tag=tag)
    finally:
        registry.close()
    if as_json:
        print(_as_json(numbers, owners, [(info.digest.hex(), info.description, info.owners) for info in namespaces]))
        return
    print(f"{numbers.blocks} blocks of {numbers.owners - numbers.dead_owners} live owners in {numbers.path}")
    for info in namespaces:
        model, dtype, tokens = (info.description.get(key) for key in ("model.name", "spec.dtype", "spec.block_size"))
        print(f"  {info.digest.hex()[:12]}  {model} {dtype}, blocks of {tokens} tokens, {len(info.owners)} owners")


def _as_json(
    numbers: Usage, owners: list[OwnerView], namespaces: list[tuple[str, dict[str, object], tuple[int, ...]]]
) -> str:
    return json.dumps(
        {
            "registry": str(numbers.path),
            "used_bytes": numbers.used_bytes,
            "blocks": numbers.blocks,
            "owners": [{"name": owner.name, "verdict": owner.verdict} for owner in owners],
            "dead_owners": numbers.dead_owners,
            "namespaces": [{"digest": d, "description": text, "owners": list(o)} for d, text, o in namespaces],
        }
    )


@app.command()
def sweep() -> None:
    """Remove what dead owners left behind."""
    registry = _open(_settings())
    try:
        print(f"{registry.sweep()} dead owners removed")
    finally:
        registry.close()


def main() -> None:
    """Run the command; errors are one line on stderr and exit status 1."""
    try:
        app()
    except KVMarketError as error:
        print(f"kvmarket: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
