"""Which server and which database a command talks to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from service.cli.output import Failure
from service.running import RunningServer

if TYPE_CHECKING:
    from service.bootstrap import Services
    from service.cli.client import Server
    from service.config import Settings


def settings() -> Settings:
    """The settings of this machine. Imported late: pydantic is most of the start-up time of a command."""
    from service.config import load_settings

    return load_settings()


def connect() -> Server:
    """A client for the server that LONGDRAFT_URL names, else for the `longdraft up` of this machine.

    Raises Failure where no key is known.
    """
    from service.cli.client import Server

    here = settings()
    running = None if here.url else RunningServer.read(here.data_dir)
    key = here.api_key or (running.api_key if running else None)
    if key is None:
        where = here.url or f"this machine (looked in {here.data_dir})"
        raise Failure(f"No API key for {where}: set LONGDRAFT_API_KEY, or start a server here with `longdraft up`.")
    return Server(running.url if running else here.server_url, key)


def with_addresses(here: Settings, running: RunningServer) -> Settings:
    """The settings with the addresses of the running `up` where none are configured."""
    found = {"broker_url": here.broker_url or running.broker_url, "blob_url": here.blob_url or running.blob_url}
    if here.database_url is None:
        found |= {"database_url": running.database_url, "migration_database_url": running.migration_database_url}
    return here.model_copy(update=found)


@contextmanager
def open_deployment() -> Iterator[Services]:
    """Database, objects and broker for administration: as configured, else those of the running `up`, else the embedded ones, started
    for as long as the block lasts."""
    import structlog

    from service.bootstrap import open_services
    from service.supervisor import deployment, migrate

    if not isinstance(structlog.get_config()["logger_factory"], structlog.stdlib.LoggerFactory):  # not a process with its own log
        # What use cases log goes to stderr (looked up each time); stdout holds what was asked for and nothing else.
        structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    here = settings()
    running = RunningServer.read(here.data_dir)
    if running:
        here = with_addresses(here, running)
    embedded = here.database_url is None
    with deployment(here) as complete:
        if embedded:
            migrate(complete)
        with open_services(complete) as services:
            yield services
