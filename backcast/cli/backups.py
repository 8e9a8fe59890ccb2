"""Commands that keep everything: backup, restore, verify, migrate-store, erasures."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from backcast import acts
from backcast.artifacts import Artifacts
from backcast.cli.acting import Reason, acting, actor
from backcast.cli.output import interruptible, print_json, progress, say
from backcast.errors import BackcastError, Conflict, InvalidInput, NotFound
from backcast.lifecycle import (
    Backcast,
    Copied,
    Listed,
    Report,
    back_up,
    erase_listed,
    faults_of_backup,
    move,
    open_backcast,
    open_backup,
    open_new,
    restore,
    verify,
)
from backcast.logs import redact
from backcast.registry import open_registry
from backcast.settings import Settings, read_argument

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
Place = Annotated[
    str, typer.Argument(help="Folder or fsspec URL of the backup.", show_default=False)
]

erasures_app = typer.Typer(
    no_args_is_help=True, help="Carry erasures into a registry restored from an older backup."
)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for name, command, example in (
        ("backup", backup_command, "backcast backup /mnt/backups/2026-11-21"),
        ("restore", restore_command, "backcast restore /mnt/backups/2026-11-21"),
        ("verify", verify_command, "backcast verify --backup /mnt/backups/2026-11-21"),
        (
            "migrate-store",
            migrate_command,
            "backcast migrate-store --to-database postgresql+psycopg://… --to-store redis://…",
        ),
    ):
        app.command(name, epilog=f"Example: {example}")(command)
    app.add_typer(erasures_app, name="erasures")


def _opened(place: str) -> Artifacts:
    """Open the place of a backup; raise InvalidInput where it is an empty text."""
    if not place.strip():
        raise InvalidInput("The place of the backup is an empty text: name a folder or a URL.")
    return Artifacts(place)


@contextmanager
def _reporting(what: str, last_words: str | Callable[[], str]) -> Iterator[Report]:
    with interruptible(last_words), progress(what, 100) as advance:
        yield lambda step, done: advance(round(100 * done), step)


def _whether_filled(target: Backcast) -> str:
    """Return what an interrupt left behind: it may come before the registry is filled, or after."""
    try:
        target.registry.demand_empty()
    except Conflict:
        return "Interrupted when all was done: the registry is filled."
    except BackcastError as error:
        return f"Interrupted; whether the registry is filled is not known: {error.message}"
    return "Interrupted; the registry is empty still. Run it again."


def backup_command(to: Place, as_json: AsJson = False) -> None:
    """Write registry, models, maps and vectors to an empty place, while everything goes on."""
    place = _opened(to)
    with (
        open_backcast(Settings.load()) as backcast,
        _reporting("backup", "Interrupted; run it again, and it is carried on.") as report,
    ):
        done = back_up(backcast, place, report)
    if as_json:
        print_json({**asdict(done), "backup": redact(to)})
    else:
        say(f"{_shown(done)}: {redact(to)}")


def restore_command(
    source: Place,
    erasures: Annotated[
        Path | None,
        typer.Option(help="Erase what is on this list too; `erasures export` writes it."),
    ] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Bring a backup back, to empty places: those that the settings name."""
    settings = Settings.load()
    erased = None if erasures is None else Listed.read(erasures)
    with (
        open_backup(_opened(source)) as backup,
        open_new(settings) as target,
        _reporting("restore", partial(_whether_filled, target)) as report,
    ):
        done = restore(
            backup,
            target,
            grace=timedelta(seconds=settings.grace_seconds),
            erased=erased,
            actor=actor(),
            reason=reason,
            report=report,
        )
    if as_json:
        print_json({**asdict(done), "backup": redact(source), "created_at": backup.created_at})
        return
    say(f"{_shown(done)}, as of {backup.created_at:%Y-%m-%d %H:%M:%S} UTC.")
    say(_compared(done))


def verify_command(
    backup: Annotated[
        str | None,
        typer.Option(help="Folder or URL of a backup.", show_default="what the settings name"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read every file and every stored vector, and compare them with what was registered."""
    if backup is not None:
        _verify_backup(backup, as_json)
        return
    settings = Settings.load()
    _demand_registry(settings)
    with (
        open_backcast(settings) as backcast,
        _reporting("verify", "Interrupted.") as report,
    ):
        found = verify(backcast, report)
    if as_json:
        print_json(asdict(found))
    elif not found.faults:
        snapshots = (
            "1 snapshot" if len(found.snapshots) == 1 else f"{len(found.snapshots)} snapshots"
        )
        say(
            f"{found.files} files ({_mib(found.bytes)}) and {found.vectors} stored vectors of "
            f"{snapshots} are what was registered; {_live(found.live)}."
        )
    _end(found.faults, as_json)


def _demand_registry(settings: Settings) -> None:
    """Raise NotFound where opening the registry would make one under home."""
    file = settings.home.absolute() / "registry.db"
    if not settings.database_url and not file.exists():
        raise NotFound(
            f"There is no registry {file}. Name the one that is meant with BACKCAST_HOME or "
            "BACKCAST_DATABASE_URL."
        )


def _verify_backup(place: str, as_json: bool) -> None:
    with (
        open_backup(_opened(place)) as backup,
        _reporting("verify", "Interrupted.") as report,
    ):
        copied, faults = faults_of_backup(backup, report)
    if as_json:
        print_json({**asdict(copied), "backup": redact(place), "faults": faults})
    elif not faults:
        say(f"{_shown(copied)}, as of {backup.created_at:%Y-%m-%d %H:%M:%S} UTC: all is there.")
    _end(faults, as_json)


def _end(faults: list[str] | tuple[str, ...], as_json: bool) -> None:
    if not faults:
        return
    if not as_json:
        for fault in faults:
            say(fault)
    if len(faults) == 1:
        raise BackcastError("1 thing is not as it was registered.")
    raise BackcastError(f"{len(faults)} things are not as they were registered.")


def migrate_command(
    to_database: Annotated[
        str | None,
        typer.Option(
            help="SQLAlchemy URL of an empty database, or @FILE that holds it.",
            show_default="stays",
        ),
    ] = None,
    to_store: Annotated[
        str | None,
        typer.Option(
            help="URL of the other vector store, or @FILE that holds it.", show_default="stays"
        ),
    ] = None,
    to_artifacts: Annotated[
        str | None, typer.Option(help="URL of other artifacts.", show_default="stay")
    ] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Copy everything to another database, vector store or artifacts, and compare it there."""
    if to_database is None:
        raise InvalidInput(
            "--to-database is missing. A move of store or artifacts alone needs none: set "
            "BACKCAST_STORE_URL and promote the live version, or copy the folder."
        )
    settings = Settings.load()
    asked = {"database_url": to_database, "store_url": to_store, "artifacts_url": to_artifacts}
    changed = {
        name: read_argument(f"--to-{name.removesuffix('_url')}", url)
        for name, url in asked.items()
        if url is not None
    }
    with (
        open_backcast(settings) as source,
        _open_target(source, settings.model_copy(update=changed), changed) as target,
        _reporting("move", partial(_whether_filled, target)) as report,
    ):
        done = move(
            source,
            target,
            actor=actor(),
            reason=reason,
            grace=timedelta(seconds=settings.grace_seconds),
            timeout=settings.operation_timeout,
            report=report,
        )
    if as_json:
        print_json(asdict(done))
        return
    say(f"{_shown(done)}.")
    say(_compared(done))
    say(
        "Nothing uses the new places yet: set "
        + ", ".join(f"BACKCAST_{name.upper()}" for name in changed)
        + " and start the replicas again before anything is written to the old ones."
    )


@contextmanager
def _open_target(
    source: Backcast, settings: Settings, changed: Mapping[str, str]
) -> Iterator[Backcast]:
    with open_new(settings) as target:
        store = target.store if "store_url" in changed else source.store
        artifacts = target.artifacts if "artifacts_url" in changed else source.artifacts
        yield replace(target, store=store, artifacts=artifacts)


@erasures_app.command("export", epilog="Example: backcast erasures export erasures.json")
def export_erasures(
    file: Annotated[Path, typer.Argument(help="JSON file to write.", show_default=False)],
) -> None:
    """Write the list of what is erased, as SHA-256 of ids: keep it apart from backups."""
    with open_registry(Settings.load()) as registry:
        erased = registry.erasures.all()
    Listed(erased).write(file)
    say(f"{sum(map(len, erased.digests.values()))} erasures: {file}")


@erasures_app.command("apply", epilog="Example: backcast erasures apply erasures.json")
def apply_erasures(
    file: Annotated[Path, typer.Argument(help="What `erasures export` wrote.", show_default=False)],
    reason: Reason = None,
) -> None:
    """Erase what is on a list and not erased here, in all snapshots and all to come."""
    listed = Listed.read(file)
    counts = {str(entity): len(digests) for entity, digests in listed.erased.digests.items()}
    with (
        interruptible("Interrupted; run it again."),
        open_backcast(Settings.load()) as backcast,
        acting(backcast.registry, acts.erasing_listed(counts, reason)),
    ):
        count = erase_listed(backcast, listed, actor=actor())
    say(f"{count} ids that were held here are erased.")


def _shown(done: Copied) -> str:
    return f"{done.rows} rows and {done.files} files ({_mib(done.bytes)}), {_live(done.live)}"


def _live(live: str | None) -> str:
    return "nothing is live" if live is None else f"live is {live}"


def _compared(done: Copied) -> str:
    return f"{done.vectors} stored vectors were compared, bit by bit: all are the same."


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
