"""A project's own credentials for its buckets. The secret goes in and never comes out again."""

from __future__ import annotations

from service.domain.account import BucketAccess
from service.errors import InvalidRequest, NotFound
from service.ports import Database, UserBuckets
from service.usecases.keys import find_project

MAX_SECRET = 1024
CHECKSUMS = ("when_required", "when_supported")


def set_access(
    database: Database,
    buckets: UserBuckets,
    project: str,
    *,
    access_key_id: str,
    secret: str,
    endpoint_url: str | None = None,
    region: str | None = None,
    path_style: bool = False,
    checksums: str = CHECKSUMS[0],
) -> BucketAccess:
    """Replaces what the project (id or name) had.

    Raises:
        NotFound: no such project.
        InvalidRequest: an empty or unprintable key or secret, an unknown checksum mode.
        BucketRefused: the endpoint is not one that a project may name here.
    """
    for name, value in (("access_key_id", access_key_id), ("secret", secret)):
        if not 1 <= len(value) <= MAX_SECRET or not all("!" <= character <= "~" for character in value):
            raise InvalidRequest(f"'{name}' must have 1 to {MAX_SECRET} printable ASCII characters, without spaces.", param=name)
    if checksums not in CHECKSUMS:
        raise InvalidRequest(f"'checksums' must be {' or '.join(CHECKSUMS)}; got {checksums[:40]!r}.", param="checksums")
    if endpoint_url is not None:
        buckets.check_endpoint(endpoint_url)
    with database.begin() as uow:
        owner = find_project(uow, project)
        sealed = buckets.seal(owner.id, secret)
        access = BucketAccess(owner.id, access_key_id, sealed, endpoint_url, region, path_style, checksums)
        uow.bucket_access.put(access)
    return access


def get_access(database: Database, project: str) -> BucketAccess | None:
    """None where the project uses the deployment's role. Raises NotFound for an unknown project."""
    with database.begin() as uow:
        return uow.bucket_access.get(find_project(uow, project).id)


def delete_access(database: Database, project: str) -> None:
    """Back to the deployment's role. Raises NotFound where there is nothing to delete."""
    with database.begin() as uow:
        if not uow.bucket_access.delete(find_project(uow, project).id):
            raise NotFound(f"Project {project!r} has no bucket credentials.")
