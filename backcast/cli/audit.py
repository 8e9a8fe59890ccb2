"""The command that shows the audit log."""

from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer

from backcast.acts import ActName, ActRecord
from backcast.cli.moments import read_moment_or_duration
from backcast.cli.output import print_json, print_table, say
from backcast.registry import Registry, open_registry
from backcast.settings import Settings


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("audit", epilog="Example: backcast audit --since 7d --json")(audit_command)


def audit_command(
    since: Annotated[
        str | None,
        typer.Option(
            help="From here on: a day (its beginning in UTC), a moment with a zone, or how long "
            "ago, such as 7d.",
            show_default="the beginning",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """Show who did what, when and why, and what became of it, newest first."""
    with open_registry(Settings.load()) as registry:
        acts = registry.audit.recent(limit, since=_moment(registry, since))
    if as_json:
        print_json([asdict(act) for act in acts])
    elif not acts:
        say("Nothing was done yet." if since is None else f"Nothing was done since {since}.")
    else:
        print_table(
            ("act", "when (UTC)", "who", "what", "to", "outcome", "reason", "details"),
            [_row(act) for act in acts],
        )


def _moment(registry: Registry, text: str | None) -> datetime | None:
    if text is None:
        return None
    found = read_moment_or_duration("--since", text)
    return registry.now() - found if isinstance(found, timedelta) else found


def _row(act: ActRecord) -> tuple[object, ...]:
    return (
        act.id,
        f"{act.at:%Y-%m-%d %H:%M:%S}",
        act.actor if act.key is None else f"{act.actor} ({act.key})",
        act.act,
        act.target,
        _outcome(act),
        act.reason or "",
        _listed(act),
    )


def _outcome(act: ActRecord) -> str:
    if act.outcome is None:
        return "none yet"
    return act.outcome if act.code is None else f"{act.outcome}: {act.code}"


def _listed(act: ActRecord) -> str:
    clears = act.act == ActName.PIN  # where None is what was asked for, not what was left out
    told = {
        name: value
        for name, value in act.details.items()
        if name != "sha256" and value is not False and (value is not None or clears)
    }
    return ", ".join(f"{name} {_shown(value)}" for name, value in told.items())


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}s" for name, count in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
