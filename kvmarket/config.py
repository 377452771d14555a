"""Settings: immutable, read from the environment in one place, wrong names and values refused by name."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmarket.addresses import listening_address
from kvmarket.errors import ConfigError
from kvmarket.hashing import HASH_ALGORITHMS
from kvmarket.logs import FORMATS as LOG_FORMATS
from kvmarket.region.eviction import POLICIES
from kvmarket.secret import Secret
from kvmarket.server_url import is_server_url, parse_url, without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PREFIX = "KVMARKET_"
_SERVICE_LINK = re.compile(r"KVMARKET_(SERVICE_HOST|(SERVICE_)?PORT(_\w+)?)")
"""What Kubernetes puts into every container's environment for a service of the name ``kvmarket``."""
TRANSPORTS = ("auto", "inproc", "shm", "cuda_ipc", "ucx")
UCX_REQUIREMENTS = ("", "rdma", "shm", "one_sided", "no_host_bounce")
HIDDEN = ("salt", "secret")
"""Settings whose values are never shown."""
SECONDS_MAX = 1e9
"""The longest time that a block may be told to last."""
VERIFY_MODES = ("none", "sampled", "full")


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"must be one of: {', '.join(allowed)}")
        return text

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError(f"must be within [{low:g}, {high:g}]")
        return value

    return parse


def _count(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(f"must be within [{low}, {high}]")
        return value

    return parse


_UNITS = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _size(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number, factor = text.strip().lower(), 1
        for unit, size in _UNITS.items():
            if number.endswith(unit):
                number, factor = number[: -len(unit)].strip(), size
                break
        try:
            value = int(float(number) * factor) if factor > 1 else int(number)
        except OverflowError as error:
            raise ValueError("must be finite") from error
        if not low <= value <= high:
            raise ValueError(f"must be within [{low}, {high}] bytes")
        return value

    return parse


def _registry(text: str) -> str:
    if text in {"memory", "lmdb"} or text.startswith("lmdb:///"):
        return text
    if is_server_url(text):
        parse_url(text)
        return text
    raise ValueError(
        "must be 'lmdb' (default), 'lmdb:///directory', 'memory', or redis://, rediss:// or valkey:// and a host"
    )


def _metrics(text: str) -> str:
    if text:
        listening_address(text)
    return text


def _addresses(text: str) -> str:
    for item in filter(None, text.split(",")):
        ipaddress.ip_address(item.strip())
    return text


def _setting(env: str, default: Any, parse: Callable[[str], Any]) -> Any:
    return field(default=default, metadata={"env": PREFIX + env, "parse": parse})


def _shown(name: str, value: object) -> str:
    if name == "registry" and isinstance(value, str):
        return repr(without_secrets(value))
    return "(hidden)" if name in HIDDEN else repr(value)


def _secret_file(text: str) -> str:
    if text and not Path(text).is_absolute():
        raise ValueError("must be an absolute path")
    return text


def default_runtime_dir() -> Path:
    """Where processes of one user on one host meet: /dev/shm if there is one, else the temporary directory."""
    shm, tmp = Path("/dev/shm"), os.environ.get("TMPDIR", "/tmp")  # noqa: S108 - private to the user by mode 0700
    base = shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tmp)
    return base / f"kvmarket-{os.getuid()}"


def default_disk_dir() -> Path:
    """Where logs of blocks are kept: the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvmarket"


@dataclass(frozen=True, slots=True, kw_only=True)
class MarketConfig:
    """All settings of one marketplace. Each field can be set by the environment name in its metadata.

    Attributes:
        transport: ``auto`` (by locality and kind of memory, after a probe), ``inproc``, ``shm``, ``cuda_ipc``, ``ucx``.
        ucx_require: lanes without which UCX refuses a connection: ``rdma``, ``shm``, ``one_sided``, or
            ``no_host_bounce`` for blocks on GPUs; empty takes any.
        ucx_addresses: IP addresses to announce for UCX, separated by commas; empty for all of this host.
        ucx_connect_s: how long connecting to an owner over UCX may take; a fetch waits for it within its own deadline,
            and what is connected later serves the next.
        registry: ``lmdb`` (all processes of this host), ``lmdb:///directory``, ``memory`` (this process only), or the
            URL of a Redis or Valkey server (all processes that reach it; see `kvmarket.server_url`).
        runtime_dir: where the registry file and the owners' locks live; empty for `default_runtime_dir`.
        hash: block hash algorithm for token prefixes.
        verify: ``full`` compares every page's digest after the copy, and takes nothing from processes that do not,
            since they may pass on what they did not look at; ``sampled`` compares one page in 16; ``none`` compares
            generations only, and computes no digests for others either.
        fetch_deadline_s: a fetch that takes longer ends as a (shorter) hit or a miss.
        publish_deadline_s: a publish that takes longer raises `DeadlineExceededError`.
        fetch_concurrency: fetches that may run at once; more wait.
        arena_bytes: memory for blocks published by copy.
        arena_eviction: which of them go first when it is full: ``lru``, or ``s3fifo``, which a scan does not flush.
        arena_ttl_s: how long a published copy lasts unless its publisher says otherwise; 0: until it is evicted.
        keep_bytes: memory for copies of blocks that an engine is about to overwrite, which stay published from there;
            0: they are not kept.
        disk_bytes: largest size of this process's log of published copies on disk; 0: there is none.
        disk_dir: where such logs are; empty for ``kvmarket`` in the user's cache directory.
        registry_bytes: largest size of the registry file (sparse: it takes what it needs).
        metrics: where to serve metrics for Prometheus: ``PORT`` (of the loopback address), ``HOST:PORT``; empty for
            nowhere. All marketplaces of a process with the same address share one endpoint.
        log_format: ``text``, or ``json`` for one object a line; for the whole process.
        tenant: whose blocks these are; part of the namespace.
        salt: more of what keeps namespaces apart; never stored.
        secret: what others lack, 16 bytes or more: nobody else can find, fetch or shadow what is published with it.
            Text, bytes or `Secret`; it is never shown or pickled.
        secret_file: the file it is read from instead, when a marketplace opens; mode 0600 or 0640 of this user or root.
    """

    transport: str = _setting("TRANSPORT", "auto", _one_of(*TRANSPORTS))
    ucx_require: str = _setting("UCX_REQUIRE", "", _one_of(*UCX_REQUIREMENTS))
    ucx_addresses: str = _setting("UCX_ADDRESSES", "", _addresses)
    ucx_connect_s: float = _setting("UCX_CONNECT_S", 3.0, _number(0.05, 120))
    registry: str = field(default="lmdb", repr=False, metadata={"env": PREFIX + "REGISTRY", "parse": _registry})
    runtime_dir: str = _setting("RUNTIME_DIR", "", str)
    hash: str = _setting("HASH", "sha256", _one_of(*HASH_ALGORITHMS))
    verify: str = _setting("VERIFY", "full", _one_of(*VERIFY_MODES))
    fetch_deadline_s: float = _setting("FETCH_DEADLINE_S", 1.0, _number(0.001, 600))
    publish_deadline_s: float = _setting("PUBLISH_DEADLINE_S", 10.0, _number(0.001, 600))
    fetch_concurrency: int = _setting("FETCH_CONCURRENCY", 4, _count(1, 256))
    arena_bytes: int = _setting("ARENA_BYTES", 256 << 20, _size(4096, 1 << 44))
    arena_eviction: str = _setting("ARENA_EVICTION", "lru", _one_of(*POLICIES))
    arena_ttl_s: float = _setting("ARENA_TTL_S", 0.0, _number(0, SECONDS_MAX))
    keep_bytes: int = _setting("KEEP_BYTES", 0, _size(0, 1 << 44))
    disk_bytes: int = _setting("DISK_BYTES", 0, _size(0, 1 << 50))
    disk_dir: str = _setting("DISK_DIR", "", str)
    registry_bytes: int = _setting("REGISTRY_BYTES", 1 << 30, _size(1 << 20, 1 << 40))
    metrics: str = _setting("METRICS", "", _metrics)
    log_format: str = _setting("LOG_FORMAT", "text", _one_of(*LOG_FORMATS))
    tenant: str = _setting("TENANT", "", str)
    salt: str = field(default="", repr=False, metadata={"env": PREFIX + "SALT", "parse": str})
    secret: Secret = field(default=Secret(), repr=False, metadata={"env": PREFIX + "SECRET", "parse": Secret})
    secret_file: str = _setting("SECRET_FILE", "", _secret_file)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if type(value) is int and isinstance(item.default, float):
                object.__setattr__(self, item.name, value := float(value))
            if item.name == "secret" and isinstance(value, str | bytes):
                object.__setattr__(self, item.name, value := Secret(value))
            if type(value) is not type(item.default):
                expected = type(item.default).__name__
                raise ConfigError(f"MarketConfig.{item.name} must be {expected}, not {_shown(item.name, value)}")
            if item.name == "secret":
                continue  # it was checked when it was made
            try:
                item.metadata["parse"](str(value))
            except ValueError as error:
                raise ConfigError(f"MarketConfig.{item.name} = {_shown(item.name, value)}: {error}") from error
        if self.secret and self.secret_file:
            raise ConfigError("KVMARKET_SECRET and KVMARKET_SECRET_FILE are both set; leave one out")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> MarketConfig:
        """Build the settings from `environ` (default: this process's); keyword arguments win. Pure but for the default.

        Raises:
            ConfigError: an unknown ``KVMARKET_*`` name, or a value that cannot be used; the message names it.
        """
        source = os.environ if environ is None else environ
        by_env = {item.metadata["env"]: item for item in fields(cls)}
        values: dict[str, Any] = {}
        for name, text in source.items():
            if not name.startswith(PREFIX) or _SERVICE_LINK.fullmatch(name):
                continue
            if name not in by_env:
                raise ConfigError(f"unknown setting {name}; known settings: {', '.join(sorted(by_env))}")
            item = by_env[name]
            try:
                values[item.name] = item.metadata["parse"](text)
            except ValueError as error:
                raise ConfigError(f"{name}={_shown(item.name, text)}: {error}") from error
        return cls(**{**values, **overrides})

    def read_secret(self) -> Secret:
        """Return the secret in force, from the file if one is named. Raises `ConfigError`."""
        return Secret.from_file(Path(self.secret_file)) if self.secret_file else self.secret

    def tenancy(self) -> dict[str, Any]:
        """Return what the settings add to a `Namespace`: tenant, salt and secret. Raises `ConfigError`."""
        return {"tenant": self.tenant, "salt": self.salt.encode(), "secret": self.read_secret()}

    @property
    def registry_shown(self) -> str:
        """`registry` without a password that it may contain."""
        return without_secrets(self.registry)

    @property
    def directory(self) -> Path:
        """The runtime directory in force."""
        if self.registry.startswith("lmdb://"):
            return Path(self.registry.removeprefix("lmdb://"))
        return Path(self.runtime_dir) if self.runtime_dir else default_runtime_dir()

    @property
    def disk_directory(self) -> Path:
        """Where the logs on disk are."""
        return Path(self.disk_dir) if self.disk_dir else default_disk_dir()
