"""Commands around buckets: a project's credentials, and files by presigned URL."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.connect import connect, open_deployment
from service.cli.output import AsJson, Failure, note, print_json, print_table

if TYPE_CHECKING:
    from service.domain.account import BucketAccess

Project = Annotated[str, typer.Option("--project", help="Id or name of the project.")]
FileId = Annotated[str, typer.Argument(metavar="FILE", help="A file id (file-...).")]


def register(app: typer.Typer) -> None:
    s3 = typer.Typer(help="Users' buckets.", no_args_is_help=True)
    credentials = typer.Typer(help="A project's own credentials for its buckets: set, show, delete.", no_args_is_help=True)
    credentials.command("set")(credentials_set)
    credentials.command("show")(credentials_show)
    credentials.command("delete")(credentials_delete)
    s3.add_typer(credentials, name="credentials")
    app.add_typer(s3, name="s3")
    files = typer.Typer(help="Files by presigned URL, past the API: upload-url, register, download-url.", no_args_is_help=True)
    files.command("upload-url")(files_upload_url)
    files.command("register")(files_register)
    files.command("download-url")(files_download_url)
    app.add_typer(files, name="files")


def credentials_set(
    access_key_id: Annotated[str, typer.Option("--access-key-id", help="The public half.")],
    project: Project = "default",
    endpoint_url: Annotated[str | None, typer.Option("--endpoint-url", help="https://...; none for AWS.")] = None,
    region: Annotated[str | None, typer.Option("--region")] = None,
    path_style: Annotated[bool, typer.Option("--path-style", help="For stores without a host name for each bucket.")] = False,
    checksums: Annotated[str, typer.Option("--checksums", help="when_required, or when_supported as boto3 does.")] = "when_required",
    as_json: AsJson = False,
) -> None:
    """Give a project credentials of its own. The secret is asked for, or read from the first line of stdin; it is never shown again."""
    from service.usecases.bucket_access import set_access

    secret = _secret()
    with open_deployment() as services:
        access = set_access(
            services.database,
            services.buckets,
            project,
            access_key_id=access_key_id,
            secret=secret,
            endpoint_url=endpoint_url,
            region=region,
            path_style=path_style,
            checksums=checksums,
        )
    _show(access, as_json=as_json)


def credentials_show(project: Project = "default", as_json: AsJson = False) -> None:
    """Show how a project reaches its buckets; the secret stays where it is."""
    from service.usecases.bucket_access import get_access

    with open_deployment() as services:
        access = get_access(services.database, project)
    if access is None:
        print_json(None) if as_json else note(f"Project {project} has none: it uses the deployment's role.")
    else:
        _show(access, as_json=as_json)


def credentials_delete(project: Project = "default", as_json: AsJson = False) -> None:
    """Forget a project's credentials: it then uses the deployment's role."""
    from service.usecases.bucket_access import delete_access

    with open_deployment() as services:
        delete_access(services.database, project)
    print_json({"deleted": True, "project": project}) if as_json else print("deleted")


def files_upload_url(
    job: Annotated[Path, typer.Argument(metavar="JOB.jsonl", help="The file that will be put; it is only measured and hashed.")],
    as_json: AsJson = False,
) -> None:
    """Get a URL to put a file straight into the object store; then `longdraft files register FILE`."""
    try:
        with job.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = job.stat().st_size
    except OSError as error:
        raise Failure(f"Cannot read {job}: {error.strerror or error}.") from None
    body = {"filename": job.name, "purpose": "batch", "bytes": size, "sha256": digest}
    with connect() as server:
        signed = server.post("/files/upload_url", body)
    if as_json:
        print_json(signed)
        return
    print(signed["url"])
    note(f"Put it with: curl --fail -T {job} URL    then: longdraft files register {signed['file_id']}")


def files_register(file_id: FileId, as_json: AsJson = False) -> None:
    """Make what was put at an upload URL a file; its size and hash are verified."""
    with connect() as server:
        found = server.post(f"/files/{file_id}/register")
    print_json(found) if as_json else print(found["id"])


def files_download_url(file_id: FileId, as_json: AsJson = False) -> None:
    """Get a URL to download a file from the object store."""
    with connect() as server:
        signed = server.get(f"/files/{file_id}/download_url")
    print_json(signed) if as_json else print(signed["url"])


def _secret() -> str:
    if sys.stdin.isatty():
        return str(typer.prompt("Secret access key", hide_input=True))
    secret = sys.stdin.readline().strip()
    if not secret:
        raise Failure("No secret on stdin: pipe it in, or run this in a terminal to be asked.")
    return secret


def _show(access: BucketAccess, *, as_json: bool) -> None:
    shown: dict[str, Any] = {
        "project_id": access.project_id,
        "access_key_id": access.access_key_id,
        "endpoint_url": access.endpoint_url,
        "region": access.region,
        "path_style": access.path_style,
        "checksums": access.checksums,
    }
    print_json(shown) if as_json else print_table(tuple(shown), [tuple(shown.values())])
