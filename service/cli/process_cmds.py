"""Commands that are processes: up, api, control, worker."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.output import AsJson, Failure, note, print_json

if TYPE_CHECKING:
    from service.bootstrap import Services
    from service.config import Settings
    from service.ops import Readiness

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of everything that is kept (default: ~/.local/share/longdraft).")]
Parent = Annotated[int | None, typer.Option("--parent", hidden=True, help="End when this process ends.")]


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(demo)
    app.command()(api)
    app.command()(control)
    app.command()(worker)


def up(
    data_dir: DataDir = None,
    port: Annotated[int | None, typer.Option("--port", help="Port of the API (default 8000; 0 picks a free one).")] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on (default 127.0.0.1).")] = None,
    as_json: AsJson = False,
) -> None:
    """Start everything on this machine and stay up until Ctrl-C: database, broker, API, control process, workers while there is work."""
    from service.config import load_settings
    from service.supervisor import running_service

    settings = load_settings(data_dir=data_dir and data_dir.resolve(), port=port, host=host)
    stop = stop_on_signals()
    note(f"Starting Longdraft in {settings.data_dir}")
    with running_service(settings, stop=stop, say=note) as running:
        if as_json:
            print_json({"url": running.url, "base_url": f"{running.url}/v1", "api_key": running.api_key, "data_dir": settings.data_dir})
        else:
            print(f"\n  URL      {running.url}/v1\n  API key  {running.api_key}\n  Logs     {settings.data_dir / 'logs'}\n", flush=True)
            note("Ctrl-C stops it.")
        stop.wait()
        note("Stopping: workers commit what is finished.")
    note("Stopped. Unfinished jobs go on with the next `longdraft up` on this folder.")


def demo(
    job: Annotated[Path | None, typer.Option("--job", help="A JSONL job to run instead of the built-in one.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the data folder.")] = False,
) -> None:
    """Everything once, from an empty folder: services, a real job through the OpenAI SDK, answers, the bill; then stop it all."""
    from service.cli.demo import run_demo

    run_demo(job, keep=keep, stop=stop_on_signals())


def api(
    port: Annotated[int | None, typer.Option("--port")] = None,
    host: Annotated[str | None, typer.Option("--host")] = None,
    fd: Annotated[int | None, typer.Option("--fd", hidden=True, help="Serve on this inherited socket.")] = None,
    parent: Parent = None,
) -> None:
    """Serve the API alone (needs database_url and broker_url)."""
    import socket

    import uvicorn

    from service.api.app import create_app
    from service.bootstrap import open_services
    from service.metrics import ApiMetrics
    from service.ops import ops_server

    settings = _start(parent, host=host, port=port)
    metrics = ApiMetrics()
    with open_services(settings) as services, ops_server(settings, metrics=metrics.text, ready=lambda: _reachable(services)):
        config = uvicorn.Config(
            create_app(services, metrics.request),
            host=settings.host,
            port=settings.port,
            log_config=None,  # structlog is set up by then
            access_log=False,
            timeout_graceful_shutdown=int(settings.timing.shutdown_grace),
        )
        uvicorn.Server(config).run(sockets=[socket.socket(fileno=fd)] if fd is not None else None)


def control(parent: Parent = None) -> None:
    """Run the control process alone: validation, finalisation, wake-ups, sweeps."""
    from service.bootstrap import open_services
    from service.control import run_control

    settings = _start(parent)
    with open_services(settings) as services:
        run_control(services, stop_on_signals())


def worker(
    worker_id: Annotated[str | None, typer.Option("--id", help="Name of this worker (default: made up).")] = None,
    exit_when_idle: Annotated[bool, typer.Option("--exit-when-idle", help="Leave after timing.worker_idle seconds without work.")] = False,
    gpus: Annotated[
        str | None,
        typer.Option("--gpus", help="One worker a GPU: `all` (without a GPU: one on the CPU), or some: 0,2."),
    ] = None,
    parent: Parent = None,
) -> None:
    """Run workers: they claim groups of lines, run them, and commit results and charges. Without --gpus it is one, in this process."""
    from service.gpu_workers import choose_gpus, run_gpu_workers, visible_gpus
    from service.worker import run_worker

    settings = _start(parent)
    if gpus is not None and (chosen := choose_gpus(gpus, visible_gpus())):
        if worker_id is not None:
            raise Failure("--id names one worker; with --gpus there may be several, which name themselves.")
        run_gpu_workers(settings, chosen, stop_on_signals(), exit_when_idle=exit_when_idle)
        return
    run_worker(settings, worker_id=worker_id, exit_when_idle=exit_when_idle)


def _reachable(services: Services) -> Readiness:
    from service.ops import Readiness
    from service.usecases.readiness import parts_answer

    parts_answer(services.database, services.blobs)
    return Readiness(True, "database and object store answer")


def stop_on_signals() -> threading.Event:
    """Set by the first Ctrl-C or SIGTERM; a second one ends the process at once."""
    stop = threading.Event()

    def handle(number: int, _: Any) -> None:
        if stop.is_set():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


def _start(parent: int | None, **overrides: Any) -> Settings:
    """What every process does first: tie its life to the supervisor's, read the settings, set up logging."""
    from service.children import die_with
    from service.config import load_settings
    from service.log import configure_logging

    if parent is not None:
        die_with(parent)
    settings = load_settings(**overrides)
    configure_logging(settings)
    return settings
