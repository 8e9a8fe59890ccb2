"""The ``backcast`` command. Commands of the trainer and the service are loaded when they are there.

The wheel holds the core only; ``trainer`` and ``service`` live in a checkout. Their commands stay
visible without them, and say what to install when called.
"""

import importlib
import logging
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from backcast.cli import audit, backups, changes, commands, consumers, promotion
from backcast.cli.output import note, say
from backcast.errors import BackcastError, ConfigError
from backcast.logs import write_json, writes_json
from backcast.settings import check_environment

APPLICATIONS = {
    "demo": "trainer",
    "data": "trainer",
    "train": "trainer",
    "publish": "trainer",
    "infer": "trainer",
    "methods": "trainer",
    "benchmark": "trainer",
    "serve": "service",
}
"""Which application each command comes from; its module ``cli`` holds them."""

EXTRAS = {"trainer": "train", "service": "service"}
_EXTRA_OF_PACKAGE = {
    "torch": "train",
    "torch_geometric": "train",
    "torchmetrics": "train",
    "matplotlib": "train",
    "anyio": "service",
    "fastapi": "service",
    "starlette": "service",
    "uvicorn": "service",
    "opentelemetry": "otel",
    "redis": "service",
    "psycopg": "service",
}


class Commands(TyperGroup):
    """The core's commands, and those of the applications."""

    def list_commands(self, ctx: Any) -> list[str]:
        """List the applications' commands first: that is the order of the work."""
        return [*APPLICATIONS, *super().list_commands(ctx)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, or for one that is not installed one that says so."""
        application = APPLICATIONS.get(cmd_name)
        if application is None:
            return super().get_command(ctx, cmd_name)
        try:
            module = importlib.import_module(f"{application}.cli")
        except ModuleNotFoundError as error:
            if error.name not in {application, f"{application}.cli"}:
                raise
            return _absent(cmd_name, application)
        group: Any = get_command(module.app)
        return group.get_command(ctx, cmd_name)


def _absent(name: str, application: str) -> TyperCommand:
    def refuse() -> None:
        raise ConfigError(
            f"`backcast {name}` needs the package {application!r}, which the wheel does not hold. "
            f"Run it from a checkout of Backcast: pip install -e '.[{EXTRAS[application]}]'."
        )

    return TyperCommand(
        name,
        callback=refuse,
        help=f"Not installed: needs a checkout of Backcast with the extra {EXTRAS[application]}.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"backcast {version('backcast')}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve every historical version of an embedding from the latest one.",
)
commands.add_to(app)
consumers.add_to(app)
changes.add_to(app)
promotion.add_to(app)
audit.add_to(app)
backups.add_to(app)


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say which."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run a command; any foreseen error is one line on standard error and exit status 1."""
    # Before the settings are read: what is wrong with them is to be told in JSON, too.
    if os.environ.get("BACKCAST_LOG_FORMAT") == "json":
        write_json()
    try:
        check_environment()
        app()
    except BackcastError as error:
        _fail(error.message)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}.")
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF_PACKAGE.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"This command needs the package {error.name}: pip install 'backcast[{extra}]'.")


def _fail(message: str) -> None:
    line = " ".join(message.split())
    note(line if writes_json() else f"error: {line}", logging.ERROR)
    sys.exit(1)
