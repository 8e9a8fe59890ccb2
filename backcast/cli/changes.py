"""Commands that change and export what is live: upsert, erase, export."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from backcast import acts
from backcast.cli.acting import Reason, acting, actor
from backcast.cli.output import interruptible, print_json, print_table, progress, say
from backcast.errors import ConfigError, InvalidInput
from backcast.lifecycle import (
    Backcast,
    ErasureReport,
    count_exported,
    erase,
    export,
    open_backcast,
    served_as,
    upsert_batches,
)
from backcast.settings import Settings
from backcast.vector_files import read_vector_file
from backcast.versions import Entity

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


class ExportEngine(StrEnum):
    """What an export runs on."""

    LOCAL = "local"
    RAY = "ray"


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for name, command, example in (
        ("upsert", upsert_command, "backcast upsert new.parquet --expected-live 3"),
        ("erase", erase_command, "backcast erase A1KLRMWW2FWPL4 --entity user"),
        ("export", export_command, "backcast export --version 0 --out ver-0.parquet"),
    ):
        app.command(name, epilog=f"Example: {example}")(command)


def upsert_command(
    file: Annotated[
        Path,
        typer.Argument(
            help="Parquet or Arrow file with columns id, vector and perhaps entity.",
            show_default=False,
        ),
    ],
    entity: Annotated[
        Entity, typer.Option(help="What the ids are, where no column says it.")
    ] = Entity.ITEM,
    expected_live: Annotated[
        int | None,
        typer.Option(
            help="Refuse unless this version is live now.", show_default="what the file names"
        ),
    ] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Give ids of the live version new vectors; all of them or none, durable at the end."""
    settings = Settings.load()
    found = read_vector_file(file, entity, settings.max_changed)
    if expected_live is not None and found.version not in {None, expected_live}:
        raise InvalidInput(
            f"{file} holds vectors of version {found.version}, not of {expected_live}."
        )
    counts = {str(batch.entity): len(batch.ids) for batch in found.batches}
    with (
        open_backcast(settings) as backcast,
        acting(backcast.registry, acts.upserting(counts, reason)) as recorded,
    ):
        live = upsert_batches(
            backcast,
            found.batches,
            actor=actor(),
            most_changed=settings.max_changed,
            expected_live=found.version if expected_live is None else expected_live,
        )
        recorded.found["snapshot"] = live.name
    if as_json:
        print_json({"snapshot": live.name, "live_version": live.version, "upserted": counts})
    else:
        put = ", ".join(f"{count} {entity}s" for entity, count in counts.items())
        say(f"{put} put: {live.name} is live. Replicas follow within BACKCAST_POLL_SECONDS.")


def erase_command(
    ids: Annotated[list[str], typer.Argument(help="Ids to erase.", show_default=False)],
    entity: Annotated[Entity, typer.Option(help="What the ids are.")] = Entity.ITEM,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """End the vectors of ids in all snapshots, and in those to come; say what still holds them."""
    settings = Settings.load()
    grace = timedelta(seconds=settings.grace_seconds)
    with open_backcast(settings) as backcast:
        with acting(backcast.registry, acts.erasing(entity, ids, reason)):
            report = erase(backcast, entity, ids, actor=actor(), grace=grace)
        others = _served_otherwise(backcast, report)
    if as_json:
        print_json(report.document())
    else:
        _print_erasure(report, others)


def _served_otherwise(backcast: Backcast, report: ErasureReport) -> dict[Entity, tuple[str, ...]]:
    """Return which of the ids that were held by nothing are live as another kind."""
    if report.live is None or not report.unknown:
        return {}
    others = [entity for entity in Entity if entity is not report.entity]
    return {e: served_as(backcast, report.live, e, report.unknown) for e in others}


def _print_erasure(report: ErasureReport, others: Mapping[Entity, Sequence[str]]) -> None:
    live, held = report.live, report.ids - len(report.unknown)
    now = f"{live.name} is live" if live else "nothing is live"
    if held:
        say(f"{held} {report.entity} {_ids(held)} erased: {now}.")
    if report.unknown:
        looked_at = "" if report.is_complete else " that could be looked at"
        say(
            f"No {report.entity}{looked_at} has the {_ids(len(report.unknown))} "
            f"{', '.join(report.unknown)}; erased all the same, for vectors to come: {now}."
        )
    for entity, ids in others.items():
        if ids:
            has = f"One {entity} has" if len(ids) == 1 else f"{len(ids)} {entity}s have"
            say(f"{has} {', '.join(ids)}: --entity {entity} erases there.")
    if report.holders:
        print_table(
            ("what", "name", "state", "ids", "until (UTC)", "then"),
            [
                (
                    h.what,
                    h.name,
                    h.state,
                    h.ids,
                    h.until and f"{h.until:%Y-%m-%d %H:%M}",
                    h.mend,
                )
                for h in report.holders
            ],
            title="Still held, served from nowhere",
        )


def _ids(count: int) -> str:
    return "id" if count == 1 else "ids"


def export_command(
    version: Annotated[
        int, typer.Option(help="Version to be compatible with.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to write.", show_default=False)],
    entity: Annotated[
        Entity | None, typer.Option(help="Only these.", show_default="users and items")
    ] = None,
    engine: Annotated[ExportEngine, typer.Option(help="What to run on.")] = ExportEngine.LOCAL,
    as_json: AsJson = False,
) -> None:
    """Write all vectors of a version, made from what is live, to a Parquet file."""
    if engine is ExportEngine.RAY:
        raise ConfigError(
            "--engine ray is not built yet; --engine local streams any number of vectors."
        )
    with (
        interruptible("Interrupted: nothing was written."),
        open_backcast(Settings.load()) as backcast,
        progress("vectors", count_exported(backcast, entity)) as advance,
    ):
        exported = export(backcast, version, out, entity=entity, advance=advance)
    document: dict[str, Any] = {**asdict(exported), "out": str(out)}
    if as_json:
        print_json(document)
    else:
        say(
            f"{exported.rows} vectors of version {exported.version}, {exported.dim} dimensions, "
            f"made from {exported.snapshot}: {out}"
        )
