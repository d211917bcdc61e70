"""The `longdraft` command. Each group of commands lives in a file of its own; heavy imports happen inside the commands."""

from __future__ import annotations

import errno
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from service.cli import admin_cmds, batch_cmds, cost_cmds, drafter_cmds, engine_cmds, lab_cmds, process_cmds, s3_cmds
from service.errors import LongdraftError

app = typer.Typer(
    help="Longdraft: self-hosted batch inference. `longdraft up` starts everything on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"longdraft {version('longdraft')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """What every command has in common."""


process_cmds.register(app)
engine_cmds.register(app)
drafter_cmds.register(app)
lab_cmds.register(app)
batch_cmds.register(app)
cost_cmds.register(app)
admin_cmds.register(app)
s3_cmds.register(app)


def main() -> None:
    """Runs a command. Expected errors become one line on stderr and exit code 1; wrong usage is 2; a traceback is always a bug."""
    try:
        app(prog_name="longdraft")
    except LongdraftError as error:
        print(f"longdraft: {error.message}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader left (`| head`): nobody is there to be told
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"longdraft: Cannot write: {error.strerror}. Make room and try again.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
