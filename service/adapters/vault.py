"""Secrets at rest: AES-256-GCM under a key that the database does not have."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from service.errors import BucketRefused

NONCE_BYTES = 12


class Vault:
    """Seals and opens with the configured key, else with one that is made on the first seal and kept in a file (mode 0600)."""

    def __init__(self, configured: str, path: Path) -> None:
        self._configured, self._path = configured, path

    def seal(self, context: str, secret: str) -> bytes:
        """Nonce and ciphertext; opens for the same `context` only."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher(create=True).encrypt(nonce, secret.encode(), context.encode())

    def open(self, context: str, sealed: bytes) -> str:
        """Raises BucketRefused where it was sealed with another key, or for something else."""
        try:
            plain = self._cipher(create=False).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], context.encode())
        except (InvalidTag, ValueError, FileNotFoundError) as error:
            raise BucketRefused(
                "The project's bucket credentials cannot be opened on this host: the operator has to give every host the same "
                "credentials_key, or set the credentials again.",
                code="credentials_unreadable",
            ) from error
        return plain.decode()

    def _cipher(self, *, create: bool) -> AESGCM:
        key = self._configured or self._kept(create=create)
        return AESGCM(hashlib.blake2b(key.encode(), digest_size=32, person=b"ld-bucket-vault").digest())

    def _kept(self, *, create: bool) -> str:
        if create:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "w", encoding="ascii") as file:
                    file.write(secrets.token_urlsafe(32))
        return self._path.read_text(encoding="ascii")
