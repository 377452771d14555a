"""Proof over UCX that both ends have the tenant's secret: each answers a random challenge, and the secret is not sent.

It says who is at the other end when a connection begins. It does not encrypt, and who sits in between can have two
honest ends prove themselves to each other: what arrives is still compared with the digests that were announced.
"""

from __future__ import annotations

import hmac
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmarket.secret import Secret

NONCE_BYTES, PROOF_BYTES = 16, 32


class ProofKey:
    """What proofs of one secret are made with; false without a secret. It has no readable form."""

    __slots__ = ("_key",)

    def __init__(self, secret: Secret | None = None) -> None:
        self._key = secret.derive(b"ucx") if secret else b""

    def __bool__(self) -> bool:
        return bool(self._key)

    def __repr__(self) -> str:
        return "ProofKey(hidden)" if self._key else "ProofKey()"

    def of_reader(self, incarnation: bytes, challenge: bytes, answer: bytes) -> bytes:
        """Return `PROOF_BYTES` that a reader sends: `challenge` is the owner's nonce, `answer` the reader's."""
        return self._proof(b"reader", incarnation, challenge, answer)

    def of_owner(self, incarnation: bytes, challenge: bytes, answer: bytes) -> bytes:
        """Return what the owner sends in return; arguments as of `of_reader`."""
        return self._proof(b"owner", incarnation, challenge, answer)

    def _proof(self, role: bytes, *parts: bytes) -> bytes:
        return hmac.digest(self._key, role + b"\0" + b"".join(parts), "sha256")  # all parts have fixed lengths


def fresh_nonce() -> bytes:
    """Return `NONCE_BYTES` that nobody has seen before."""
    return os.urandom(NONCE_BYTES)


def same(proof: bytes, expected: bytes) -> bool:
    """Compare two proofs in a time that does not tell where they differ."""
    return hmac.compare_digest(proof, expected)
