"""Commands for the operator: keys, models, the database schema, doctor. They work on the deployment itself, not through the API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.connect import open_deployment, settings, with_addresses
from service.cli.output import AsJson, note, print_json, print_table
from service.running import RunningServer

if TYPE_CHECKING:
    from service.domain.account import ApiKey

Project = Annotated[str | None, typer.Option("--project", help="Id or name of a project.")]


def register(app: typer.Typer) -> None:
    groups: Sequence[tuple[str, str, Mapping[str, Callable[..., None]]]] = (
        ("keys", "API keys: create, list, revoke.", {"create": keys_create, "list": keys_list, "revoke": keys_revoke}),
        ("projects", "Projects: create, list.", {"create": projects_create, "list": projects_list}),
        ("models", "Models: list, pull.", {"list": models_list, "pull": models_pull}),
        ("db", "The database schema.", {"upgrade": db_upgrade}),
    )
    for name, text, commands in groups:
        group = typer.Typer(help=text, no_args_is_help=True)
        for command, function in commands.items():
            group.command(command)(function)
        app.add_typer(group, name=name)
    app.command()(doctor)


def keys_create(
    name: Annotated[str, typer.Option("--name", help="What the key is for.")] = "cli",
    project: Project = None,
    scope: Annotated[str, typer.Option("--scope", help="all, or read: may only look and download.")] = "all",
    as_json: AsJson = False,
) -> None:
    """Make an API key. It is shown once and stored nowhere."""
    from service.supervisor import DEFAULT_PROJECT
    from service.usecases.keys import create_key

    with open_deployment() as services:
        pepper = services.settings.key_pepper
        key, secret = create_key(services.database, project or DEFAULT_PROJECT, name, pepper=pepper, scopes=(scope,))
    if as_json:
        print_json({**_key(key), "secret": secret})
    else:
        note(f"Key {key.id} for project {key.project_id}. This is the only time it is shown:")
        print(secret)


def keys_list(project: Project = None, as_json: AsJson = False) -> None:
    """List the keys of a project, or of all."""
    from service.usecases.keys import list_keys

    with open_deployment() as services:
        keys = [_key(key) for key in list_keys(services.database, project)]
    if as_json:
        print_json(keys)
    else:
        columns = ("id", "name", "prefix", "project_id", "scopes", "created_at", "last_used_at", "revoked_at")
        print_table(columns, ([key[column] for column in columns] for key in keys))


def keys_revoke(key_id: Annotated[str, typer.Argument(metavar="KEY", help="A key id (key_...).")], as_json: AsJson = False) -> None:
    """Refuse a key from now on."""
    from service.usecases.keys import revoke_key

    with open_deployment() as services:
        revoke_key(services.database, key_id)
    print_json({"id": key_id, "revoked": True}) if as_json else print(f"{key_id} is revoked")


def projects_create(name: Annotated[str, typer.Argument(help="A name that no other project has.")], as_json: AsJson = False) -> None:
    """Make a project: an owner of keys, files, batches and bills."""
    from service.usecases.keys import create_project

    with open_deployment() as services:
        project = create_project(services.database, name)
    print_json({"id": project.id, "name": project.name}) if as_json else print(project.id)


def projects_list(as_json: AsJson = False) -> None:
    """List all projects."""
    with open_deployment() as services, services.database.begin() as uow:
        projects = [{"id": project.id, "name": project.name, "created_at": project.created_at} for project in uow.accounts.projects()]
    print_json(projects) if as_json else print_table(("id", "name", "created_at"), ([*project.values()] for project in projects))


def models_list(as_json: AsJson = False) -> None:
    """List the models that lines may name: their aliases, where they come from, what runs them, whether they are on this machine."""
    from service.cli.models import listing

    rows = listing(settings())
    if as_json:
        print_json(rows)
    else:
        cells = (
            (
                row["id"],
                ", ".join(row["aliases"]),
                "packaged" if row["packaged"] and row["id"] == row["source"] else row["source"],
                row["runs_on"] or "known once fetched",
                row["state"],
            )
            for row in rows
        )
        print_table(("model", "aliases", "source", "runs on", "on this machine"), cells)


def models_pull(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A registered name or alias (default: the default model).")] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a model into the cache folder, checksums verified, so that workers start at once."""
    from service.cli.models import pull

    path = pull(settings(), model)
    print_json({"model": model, "path": path}) if as_json else print(path)


def db_upgrade(as_json: AsJson = False) -> None:
    """Bring the schema of LONGDRAFT_DATABASE_URL (or of the embedded database) to its newest revision."""
    from service.adapters.schema import upgrade
    from service.supervisor import deployment

    here = settings()
    running = RunningServer.read(here.data_dir)
    with deployment(with_addresses(here, running) if running else here) as complete:
        url = complete.migration_database_url or complete.database_url
        assert url is not None
        upgrade(url)
    print_json({"upgraded": True}) if as_json else print("The schema is at its newest revision.")


def doctor(as_json: AsJson = False) -> None:
    """Check every part: versions, device, database, broker, object store, models, workers, and the invariants of the bill."""
    from service.cli.doctor import examine

    findings = examine(settings())
    if as_json:
        print_json([{"check": f.check, "status": f.status, "detail": f.detail} for f in findings])
    else:
        print_table(("", "check", "finding"), ((f.mark, f.check, f.detail) for f in findings))
    if any(f.status == "failed" for f in findings):
        raise typer.Exit(1)


def _key(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "prefix": key.prefix,
        "project_id": key.project_id,
        "scopes": ",".join(key.scopes),
        "created_at": key.created_at,
        "last_used_at": key.last_used_at,
        "revoked_at": key.revoked_at,
    }
