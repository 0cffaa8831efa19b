"""SSH keys made by gpupt: one pair for each cluster, one host key for each node."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from gpupt.errors import Failed


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An Ed25519 pair in OpenSSH's text form; the private half never shows in a repr."""

    private: str = field(repr=False)
    public: str


def make_key_pair(comment: str) -> KeyPair:
    """A new Ed25519 pair; ``comment`` ends its public line."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return KeyPair(private.decode(), f"{public.decode()} {comment}")


def write_private(path: Path, text: str) -> None:
    """Write a secret to a new file that only its owner may read; raises Failed if it is there."""
    try:
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise Failed(f"cannot write {path}", details=str(error)) from None
    with os.fdopen(number, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
