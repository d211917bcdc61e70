"""API keys: made, registered, checked, revoked. The secret itself is never stored.

What is stored is a public prefix, to find the row by, and a BLAKE2b digest keyed with a pepper. A generated key holds 256 random
bits, 48 of which the prefix shows; a key that the user chose gives nothing of itself away: its prefix comes from the digest.
The pepper is the setting `key_pepper`: all API hosts of one database need the same one, and changing it makes every key void. Left
empty, the digest is keyed with a public constant: still one-way for generated keys, but whoever steals the database can then try
guesses of user-chosen ones.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from service.domain.account import ApiKey, Project
from service.domain.ids import PROJECT_PREFIX, new_key_id
from service.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unauthenticated
from service.ports import Database, UnitOfWork

SCOPES = ("all", "read")
"""`read` may list, retrieve and download; `all` may also upload, create, cancel and delete."""

MIN_CHOSEN_LENGTH = 8
MAX_PROJECT_NAME = 100
_GENERATED = re.compile(r"ld-[A-Za-z0-9_-]{43}")
_PUBLIC_CHARACTERS = len("ld-") + 8
_TOUCH_EVERY = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking: the owner that every query carries."""

    project_id: str
    key_id: str
    scopes: tuple[str, ...]

    def require_write(self) -> None:
        """Raises Forbidden where the key may only read."""
        if "all" not in self.scopes:
            raise Forbidden("This API key may only read. Use one with the scope 'all'.")


def digest_of(secret: str, pepper: str) -> bytes:
    """32 bytes: BLAKE2b of the secret, keyed with the pepper's own digest (so that a pepper may have any length)."""
    key = hashlib.blake2b(pepper.encode(), digest_size=32, person=b"ld-key-pepper").digest()
    return hashlib.blake2b(secret.encode(), key=key, digest_size=32).digest()


def create_key(database: Database, project: str, name: str, *, pepper: str, scopes: tuple[str, ...] = ("all",)) -> tuple[ApiKey, str]:
    """Makes a random key for a project (id or name). The second value is the secret: it exists nowhere else.

    Raises:
        NotFound: no such project.
        InvalidRequest: an unknown scope.
    """
    secret = f"ld-{secrets.token_urlsafe(32)}"
    return register_key(database, project, secret, name, pepper=pepper, scopes=scopes), secret


def register_key(database: Database, project: str, secret: str, name: str, *, pepper: str, scopes: tuple[str, ...] = ("all",)) -> ApiKey:
    """Makes a secret that the user chose valid for a project (id or name). Registering it again changes nothing.

    Raises:
        NotFound: no such project.
        InvalidRequest: the secret is too short or not printable ASCII, or a scope is unknown.
        Conflict: it was revoked, or belongs to another project.
    """
    if len(secret) < MIN_CHOSEN_LENGTH or not all("!" <= character <= "~" for character in secret):
        raise InvalidRequest(f"An API key needs at least {MIN_CHOSEN_LENGTH} printable ASCII characters and no spaces.", param="api_key")
    if not scopes or not set(scopes) <= set(SCOPES):
        raise InvalidRequest(f"Unknown scope in {list(scopes)}: use {' or '.join(SCOPES)}.", param="scopes")
    digest = digest_of(secret, pepper)
    with database.begin() as uow:
        owner = find_project(uow, project)
        uow.requests.lock(owner.id, digest)
        known = uow.accounts.keys()
        for key in known:
            if hmac.compare_digest(key.digest, digest):
                return _registered_again(key, owner)
        key = ApiKey(new_key_id(), owner.id, name, _prefix(secret, digest), digest, uow.now, scopes)
        uow.accounts.add_key(key)
        return key


def authenticate(database: Database, secret: str, *, pepper: str) -> Caller:
    """The owner of a key; notes its use.

    Raises:
        Unauthenticated: unknown or revoked; the message does not say which.
    """
    digest = digest_of(secret, pepper)
    with database.begin() as uow:
        for key in uow.accounts.keys_with_prefix(_prefix(secret, digest)):
            if hmac.compare_digest(key.digest, digest):
                if key.last_used_at is None or uow.now - key.last_used_at > _TOUCH_EVERY:
                    uow.accounts.touch_key(key.id)
                return Caller(key.project_id, key.id, key.scopes)
    raise Unauthenticated("Incorrect API key provided.")


def list_keys(database: Database, project: str | None = None) -> Sequence[ApiKey]:
    """All keys, revoked ones too, of one project (id or name) or of all."""
    with database.begin() as uow:
        return uow.accounts.keys(find_project(uow, project).id if project else None)


def revoke_key(database: Database, key_id: str) -> None:
    """From now on the key is refused. Raises NotFound for an unknown or already revoked one."""
    with database.begin() as uow:
        if not uow.accounts.revoke_key(key_id):
            raise NotFound(f"No live API key has the id {key_id!r}.")


def create_project(database: Database, name: str) -> Project:
    """Makes an owner of keys, files, batches and bills.

    Raises:
        InvalidRequest: the name is empty, over `MAX_PROJECT_NAME` characters, has some that cannot be seen, or could be taken for an id.
        Conflict: another project has it.
    """
    if not name.strip() or len(name) > MAX_PROJECT_NAME or not name.isprintable() or name.startswith(PROJECT_PREFIX):
        form = f"1 to {MAX_PROJECT_NAME} printable characters, of which the first are not {PROJECT_PREFIX}"
        raise InvalidRequest(f"A project's name has {form}; got {name[:80]!r}.", param="name")
    with database.begin() as uow:
        return uow.accounts.add_project(name)


def find_project(uow: UnitOfWork, project: str) -> Project:
    """By id or name. Raises NotFound."""
    for candidate in uow.accounts.projects():
        if project in (candidate.id, candidate.name):
            return candidate
    raise NotFound(f"No project is called {project!r}.")


def _prefix(secret: str, digest: bytes) -> str:
    if _GENERATED.fullmatch(secret):
        return secret[:_PUBLIC_CHARACTERS]
    return f"own-{digest.hex()[:8]}"


def _registered_again(key: ApiKey, owner: Project) -> ApiKey:
    if key.revoked_at is not None:
        raise Conflict("This API key was revoked and cannot be registered again: choose another.")
    if key.project_id != owner.id:
        raise Conflict("This API key belongs to another project: choose another.")
    return key
