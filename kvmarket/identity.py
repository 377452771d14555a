"""Whose KV is it: the model, the spec, the hashing scheme, the tenant. Two namespaces never see each other's blocks."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack

from kvmarket.errors import InvalidInputError
from kvmarket.hashing import HASH_ALGORITHMS
from kvmarket.secret import Sealer, Secret

if TYPE_CHECKING:
    from kvmarket.spec import KVCacheSpec

PROTOCOL_MAJOR = 1
"""Bumped when blocks of an older kvmarket must not be found by a newer one."""


NO_SECRET = Secret()
SECRET_FIELD = "secret"  # noqa: S105 - a name
"""The field of a description that holds the tag of a namespace's secret."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which weights computed the KV.

    Attributes:
        name: the model's name.
        revision: its revision, or empty.
        weights_digest: a digest or epoch of the weights, for weights that change under one name.
        adapter: digest of a LoRA or other adapter merged into the computation, or empty.
    """

    name: str
    revision: str = ""
    weights_digest: str = ""
    adapter: str = ""

    def __post_init__(self) -> None:
        for key in ("name", "revision", "weights_digest", "adapter"):
            if not isinstance(getattr(self, key), str):
                raise InvalidInputError(f"ModelIdentity.{key} must be text, not {getattr(self, key)!r}")
        if not self.name:
            raise InvalidInputError("ModelIdentity.name is empty")


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything that must be equal before one process may adopt another's blocks.

    Attributes:
        model: which weights.
        spec: the page.
        algorithm: how block hashes are made: one of ours, or an engine's (``vllm:sha256`` ...).
        root: for an engine's own hashes, the root its chains start from; empty for ours.
        tenant: whose blocks these are.
        salt: more of what keeps tenants apart; never stored or shown, but not proof against guessing.
        secret: what others lack: without it nobody can compute this namespace or the key of a block in it.
        engine: engine-specific facts that must be equal, by name.
    """

    model: ModelIdentity
    spec: KVCacheSpec
    algorithm: str = "sha256"
    root: bytes = b""
    tenant: str = ""
    salt: bytes = field(default=b"", repr=False)
    engine: tuple[tuple[str, str], ...] = ()
    secret: Secret = field(default=NO_SECRET, repr=False)

    def __post_init__(self) -> None:
        if self.algorithm not in HASH_ALGORITHMS and ":" not in self.algorithm:
            known = ", ".join(HASH_ALGORITHMS)
            raise InvalidInputError(f"hash algorithm {self.algorithm!r} is not one of: {known}, or 'engine:name'")
        for name, kind in (("root", bytes), ("salt", bytes), ("tenant", str), ("secret", Secret)):
            if not isinstance(getattr(self, name), kind):
                found = type(getattr(self, name)).__name__
                raise InvalidInputError(f"Namespace.{name} must be {kind.__name__}, not {found}")
        if len(dict(self.engine)) != len(self.engine):
            raise InvalidInputError("Namespace.engine names a fact twice")

    def describe(self) -> dict[str, Any]:
        """Every field by name, flat, with salt and secret reduced to short one-way tags: safe to store.

        Where there is a secret, only who has it is shown the rest (see `visible_to`).
        """
        salt_tag = hashlib.sha256(b"kvmarket.salt.1" + self.salt).hexdigest()[:8] if self.salt else ""
        spec = {f"spec.{key}": value for key, value in self.spec.as_dict().items()}
        engine = {f"engine.{key}": value for key, value in self.engine}
        return {
            "protocol": PROTOCOL_MAJOR,
            "model.name": self.model.name,
            "model.revision": self.model.revision,
            "model.weights_digest": self.model.weights_digest,
            "model.adapter": self.model.adapter,
            "hash.algorithm": self.algorithm,
            "hash.root": self.root.hex(),
            "tenant": self.tenant,
            "salt": salt_tag,
            **({SECRET_FIELD: self.secret.tag} if self.secret else {}),
            **spec,
            **engine,
        }

    @property
    def digest(self) -> bytes:
        """32 bytes: the root of this namespace's block hashes and its key in the registry."""
        packed = msgpack.packb(sorted(self.describe().items()), use_bin_type=True)
        if not self.secret:
            return hmac.digest(self.salt, b"kvmarket.namespace.1" + packed, "sha256")
        return self.secret.derive(b"namespace", hmac.digest(self.salt, packed, "sha256"))

    @property
    def sealer(self) -> Sealer:
        """What block hashes go through before they are keys in the registry; it does nothing without a secret."""
        return sealer(self.secret)


@dataclass(frozen=True, slots=True)
class OwnerInfo:
    """One process (one incarnation of it) that lends pages.

    Attributes:
        owner: its number in this registry; never used again after it.
        incarnation: 16 random bytes made at its start.
        pid: its process id in its own PID namespace.
        pid_namespace: identity of that namespace (inode), to know whether `pid` means anything here.
        boot_id: identity of the running kernel, to know whether it is this host.
        host: host name, for people.
    """

    owner: int
    incarnation: bytes
    pid: int
    pid_namespace: int
    boot_id: str
    host: str

    def __str__(self) -> str:
        return f"{self.host}/pid {self.pid}"


def sealer(secret: Secret) -> Sealer:
    """Return `Namespace.sealer` of all namespaces with this secret."""
    return Sealer(secret.derive(b"keys")) if secret else Sealer()


def visible_to(tag: str, description: dict[str, Any]) -> bool:
    """Tell whether the namespace so described may be listed for who has the secret of `tag`, or none where it is empty.

    Namespaces without a secret are everybody's to see. One whose description is not known is nobody's.
    """
    return bool(description) and description.get(SECRET_FIELD, "") in {"", tag}


def describe_differences(mine: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return ``field: mine != other`` for each field in which two namespace descriptions differ."""
    keys = [*mine, *(key for key in other if key not in mine)]
    return [
        f"{key}: {mine.get(key, '(absent)')!r} here, {other.get(key, '(absent)')!r} there"
        for key in keys
        if mine.get(key) != other.get(key)
    ]
