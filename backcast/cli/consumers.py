"""Commands about consumers: pin them, see what they use, end a version."""

from collections.abc import Iterable
from dataclasses import asdict
from datetime import date, timedelta
from typing import Annotated

import typer

from backcast import acts
from backcast.cli.acting import Reason, acting, actor
from backcast.cli.moments import read_moment
from backcast.cli.output import print_json, print_table, say
from backcast.errors import InvalidInput
from backcast.lifecycle import deprecate, open_backcast, retire, withdraw_deprecation
from backcast.registry import open_registry
from backcast.registry.usage import first_day
from backcast.settings import Settings
from backcast.versions import Use, Version

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
_Number = Annotated[int, typer.Argument(metavar="J", help="Version number.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for name, command, example in (
        ("deprecate", deprecate_command, "backcast deprecate 0 --sunset 2027-01-31"),
        ("retire", retire_command, "backcast retire 0 --force --reason 'ads has moved'"),
        ("pin", pin_command, "backcast pin ranking 2"),
        ("consumers", consumers_command, "backcast consumers --json"),
        ("usage", usage_command, "backcast usage --version 0 --days 90"),
    ):
        app.command(name, epilog=f"Example: {example}")(command)


def deprecate_command(
    version: _Number,
    sunset: Annotated[
        str | None,
        typer.Option(help="Served until: a day (its beginning in UTC), or a moment with a zone."),
    ] = None,
    withdraw: Annotated[bool, typer.Option("--withdraw", help="Take the announcement back.")] = (
        False
    ),
    reason: Annotated[str | None, typer.Option(help="Why, or what to use instead.")] = None,
    as_json: _AsJson = False,
) -> None:
    """Announce, in every answer of a version, until when it is served."""
    if withdraw == (sunset is not None):
        raise InvalidInput("Name either a --sunset, such as 2027-01-31, or --withdraw.")
    moment = None if sunset is None else read_moment("--sunset", sunset)
    with open_backcast(Settings.load()) as backcast:
        live = backcast.registry.deployments.live()
        if moment is None:
            with acting(backcast.registry, acts.withdrawing(version, reason)):
                ending = withdraw_deprecation(backcast, version, actor=actor())
        else:
            with acting(backcast.registry, acts.deprecating(version, moment, reason)):
                ending = deprecate(
                    backcast, version, sunset_at=moment, actor=actor(), reason=reason
                )
    if as_json:
        _print_ending(ending)
    elif ending.sunset_at is None:
        say(f"Version {version} is not deprecated any more.")
    else:
        say(f"Version {version} is deprecated, and served until {ending.sunset_at.isoformat()}.")
        if live is not None and live.version == version:
            say("It is live: its answers name no successor until a newer version is.")


def retire_command(
    version: _Number,
    force: Annotated[
        bool, typer.Option(help="Although it is in use, or its sunset is to come.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why; required by --force.")] = None,
    as_json: _AsJson = False,
) -> None:
    """Stop serving a version; its maps stay, as links of the chain."""
    settings = Settings.load()
    idle = timedelta(days=settings.retire_idle_days)
    with (
        open_backcast(settings) as backcast,
        acting(backcast.registry, acts.retiring(version, force, reason)),
    ):
        retired = retire(backcast, version, actor=actor(), idle=idle, force=force, reason=reason)
    if as_json:
        _print_ending(retired)
    else:
        say(f"Version {version} is retired; replicas answer 410 from their next poll on.")


def pin_command(
    consumer: Annotated[str, typer.Argument(help="Whose default version.", show_default=False)],
    version: Annotated[
        int | None, typer.Argument(metavar="J", help="Version number.", show_default=False)
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Have no default version.")] = False,
    reason: Reason = None,
) -> None:
    """Set the version that a consumer gets when it names none; replicas follow in seconds."""
    if clear == (version is not None):
        raise InvalidInput("Name either a version or --clear.")
    with (
        open_registry(Settings.load()) as registry,
        acting(registry, acts.pinning(consumer, version, reason)),
    ):
        registry.consumers.pin(consumer, version)
    to = "no version" if version is None else f"version {version}"
    say(f"Consumer {consumer} is pinned to {to}.")


def consumers_command(as_json: _AsJson = False) -> None:
    """List who holds keys, what each is pinned to, and when it last asked for a vector."""
    with open_registry(Settings.load()) as registry:
        consumers = registry.consumers.all()
    if as_json:
        print_json([asdict(consumer) for consumer in consumers])
        return
    if not consumers:
        say("There is no consumer yet. One begins with its first key: backcast keys create --help")
        return
    print_table(
        ("consumer", "pin", "keys in force", "last used"),
        [(c.name, c.pin, c.keys_in_force, c.last_used) for c in consumers],
    )


def usage_command(
    version: Annotated[int | None, typer.Option(help="Of this version only.", min=0)] = None,
    days: Annotated[
        int, typer.Option(help="How many days back, today included.", min=1, max=36_500)
    ] = 30,
    as_json: _AsJson = False,
) -> None:
    """Show who asked for which version: requests, vectors, and the last UTC day."""
    since = first_day(days)
    with open_registry(Settings.load()) as registry:
        if version is not None:
            registry.versions.get(version)
        uses = registry.usage.since(since, version)
    if as_json:
        print_json({"since": since, "usage": [asdict(use) for use in uses]})
        return
    if not uses:
        what = "a vector" if version is None else f"version {version}"
        say(f"Nobody asked for {what} since {since}.")
        return
    print_table(
        ("consumer", "version", "requests", "vectors", "last used"),
        _summed(uses),
        title=f"Usage since {since}",
    )


def _summed(uses: Iterable[Use]) -> list[tuple[str, int, int, int, date]]:
    sums: dict[tuple[int, str], tuple[int, int, date]] = {}
    for use in uses:
        requests, vectors, last = sums.get((use.version, use.consumer), (0, 0, use.day))
        sums[use.version, use.consumer] = (
            requests + use.requests,
            vectors + use.vectors,
            max(last, use.day),
        )
    return [(consumer, version, *counts) for (version, consumer), counts in sorted(sums.items())]


def _print_ending(version: Version) -> None:
    names = ("number", "state", "deprecated_at", "sunset_at", "retired_at", "note")
    print_json({name: getattr(version, name) for name in names})
