"""Commands of the core: versions, snapshots, promote, get, db."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any

import typer

from backcast.cli import keys, operations
from backcast.cli.output import print_json, print_table, say
from backcast.cli.promotion import print_plan
from backcast.client import Client, VersionName
from backcast.errors import InvalidInput
from backcast.lifecycle import Promote, open_backcast, plan_promotion
from backcast.registry import open_registry, schema
from backcast.registry.database import shown_url
from backcast.registry.revisions import Fit, fit
from backcast.registry.tables import SCHEMA_REVISION
from backcast.settings import Settings
from backcast.versions import (
    Entity,
    Lineage,
    Live,
    SnapshotRecord,
    Version,
    VersionState,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]

db_app = typer.Typer(no_args_is_help=True, help="Make, upgrade and check the registry's schema.")


def add_to(app: typer.Typer) -> None:
    """Register the core's commands."""
    for name, command, example in (
        ("versions", versions_command, "backcast versions --json"),
        ("snapshots", snapshots_command, "backcast snapshots --json"),
        ("promote", promote_command, "backcast promote 1 --dry-run"),
        ("get", get_command, "backcast get B0002E1G5C --version 0"),
    ):
        app.command(name, epilog=_example(example))(command)
    operations.add_to(app)
    app.add_typer(keys.app, name="keys")
    app.add_typer(db_app, name="db")


def _example(line: str) -> str:
    return f"Example: {line}"


def versions_command(as_json: AsJson = False) -> None:
    """List the versions, their lineage, and which one is live."""
    settings = Settings.load()
    with open_registry(settings) as registry:
        catalog = registry.deployments.catalog()
    live = catalog.live
    chain = Lineage.of(catalog.versions).chain(live.version) if live else []
    if as_json:
        print_json(
            {
                "live_version": live.version if live else None,
                "versions": [_version_document(v, v.number in chain) for v in catalog.versions],
            }
        )
    elif not catalog.versions:
        where = shown_url(settings.registry_url)
        say(f"No version is registered in {where} yet. Train one: backcast train --help")
    else:
        print_table(
            ("version", "state", "dim", "parent", "method", "Recall@50", "trained"),
            [_version_row(v) for v in catalog.versions],
        )
        for known in catalog.versions:
            _say_ending(known)


def _say_ending(version: Version) -> None:
    if version.state in {VersionState.RETIRED, VersionState.ROLLED_BACK}:
        ending = str(version.state)
    elif version.sunset_at is not None:
        ending = f"deprecated, and served until {version.sunset_at:%Y-%m-%d %H:%M} UTC"
    else:
        return
    why = "" if version.note is None else f": {version.note}"
    say(f"Version {version.number} is {ending}{why}")


def _version_row(version: Version) -> tuple[object, ...]:
    recall = version.details.get("metrics", {}).get("recall_at_50")
    return (
        version.number,
        version.state,
        version.dim,
        version.parent,
        version.method,
        None if recall is None else f"{recall:.4f}",
        f"{version.created_at:%Y-%m-%d %H:%M}",
    )


def _version_document(version: Version, on_chain: bool) -> dict[str, Any]:
    document = asdict(version)
    document["on_live_chain"] = on_chain
    return document


def snapshots_command(as_json: AsJson = False) -> None:
    """List the snapshots whose vectors are kept: live, superseded or published, newest last."""
    settings = Settings.load()
    with open_registry(settings) as registry:
        live, kept = registry.deployments.live(), registry.snapshots.undeleted()
    grace = timedelta(seconds=settings.grace_seconds)
    rows = [_snapshot_document(one, live, grace) for one in kept if one.condemned_at is None]
    if as_json:
        print_json(rows)
    elif not rows:
        say("No snapshot is published yet. Publish one: backcast publish --help")
    else:
        print_table(
            ("snapshot", "version", "state", "items", "users", "deltas", "published", "kept until"),
            [_snapshot_row(row) for row in rows],
        )


def _snapshot_document(
    snapshot: SnapshotRecord, live: Live | None, grace: timedelta
) -> dict[str, Any]:
    gone = snapshot.superseded_at
    is_live = live is not None and live.snapshot == snapshot.id
    return {
        "id": snapshot.id,
        "version": snapshot.version,
        "state": "live" if is_live else "superseded" if gone else "published",
        "counts": {str(entity): snapshot.counts.get(str(entity), 0) for entity in Entity},
        "deltas": snapshot.head,
        "published_at": snapshot.created_at,
        "kept_until": None if gone is None else gone + grace,
    }


def _snapshot_row(row: Mapping[str, Any]) -> tuple[object, ...]:
    until = row["kept_until"]
    return (
        row["id"],
        row["version"],
        row["state"],
        row["counts"]["item"],
        row["counts"]["user"],
        row["deltas"],
        f"{row['published_at']:%Y-%m-%d %H:%M}",
        None if until is None else f"{until:%Y-%m-%d %H:%M}",
    )


def promote_command(
    version: Annotated[int, typer.Argument(help="Version to make live.")],
    dry_run: Annotated[bool, typer.Option(help="Check the gates and change nothing.")] = False,
    expected_live: Annotated[
        int | None, typer.Option(help="Refuse unless this version is live now.")
    ] = None,
    force: Annotated[
        bool, typer.Option(help="Promote although gates fail that may be overridden.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why; required by --force.")] = None,
    snapshot: Annotated[
        str | None,
        typer.Option(
            help="Which of its snapshots; `backcast snapshots` lists them.",
            show_default="the newest",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Load a version's newest snapshot into the vector store and make it live."""
    settings = Settings.load()
    with open_backcast(settings) as backcast:
        if dry_run:
            plan = plan_promotion(backcast, version, expected_live=expected_live, snapshot=snapshot)
            print_plan(plan.document(), as_json)
            raise typer.Exit(0 if plan.passed else 1)
        order = Promote(version, expected_live, force, reason, snapshot)
        what = f"promoting version {version}"
        outcome = operations.perform(backcast, settings, order, what)
    operations.print_outcome(outcome, as_json)


def get_command(
    ids: Annotated[list[str], typer.Argument(help="Ids to fetch.", show_default=False)],
    version: Annotated[
        str | None,
        typer.Option(
            help="Version to be compatible with: a number, or live.", show_default="the key's pin"
        ),
    ] = None,
    entity: Annotated[Entity, typer.Option(help="What the ids are.")] = Entity.ITEM,
    as_json: AsJson = False,
) -> None:
    """Fetch vectors from the service at BACKCAST_URL; exit status 1 if an id is unknown."""
    with Client() as client:
        result = client.get_many(ids, version=_version_name(version), entity=entity)
    if as_json:
        print_json(
            {
                "version": result.version,
                "snapshot": result.snapshot,
                "missing": list(result.missing),
                "embeddings": {
                    id: vector.tolist()
                    for id, vector, found in zip(ids, result.vectors, result.found, strict=True)
                    if found
                },
            }
        )
    else:
        for id, vector, found in zip(ids, result.vectors, result.found, strict=True):
            say(f"{id}\t" + (" ".join(f"{x:.9g}" for x in vector) if found else "unknown"))
    if result.missing:
        raise typer.Exit(1)


def _version_name(text: str | None) -> VersionName:
    if text is None or text.isdecimal():
        return None if text is None else int(text)
    if text != "live":
        raise InvalidInput(f"--version is {text!r}; expected a number or live.")
    return "live"


def _with_engine(act: Callable[[Any], None]) -> None:
    engine = schema.make_engine(Settings.load().registry_url)
    try:
        act(engine)
    finally:
        engine.dispose()


@db_app.command("upgrade", epilog=_example("backcast db upgrade"))
def upgrade_schema(
    contract: Annotated[
        bool,
        typer.Option("--contract", help="Also take away what only older releases' replicas need."),
    ] = False,
) -> None:
    """Make the schema, or bring it up to this release; replicas of the one before may serve."""

    def act(engine: Any) -> None:
        if not contract:
            schema.demand_expansion(engine)
        schema.upgrade(engine)
        _say_schema(schema.check(engine))

    _with_engine(act)


@db_app.command("check", epilog=_example("backcast db check --json"))
def check_schema(as_json: AsJson = False) -> None:
    """Say how the schema fits; exit with status 0 only where this release can run on it."""

    def act(engine: Any) -> None:
        if as_json:
            found = schema.found_revision(engine)
            fits = fit(found, SCHEMA_REVISION)
            print_json({"schema": found, "release": SCHEMA_REVISION, "state": fits})
            raise typer.Exit(0 if fits.runs else 1)
        _say_schema(schema.check(engine))

    _with_engine(act)


def _say_schema(fits: Fit) -> None:
    if fits is Fit.CURRENT:
        say(f"The registry's schema is at {SCHEMA_REVISION}.")
    else:
        say(
            "A newer release has expanded the registry's schema; this one "
            f"({SCHEMA_REVISION}) can run on it."
        )


@db_app.command("downgrade", epilog=_example("backcast db downgrade 0001"))
def downgrade_schema(
    revision: Annotated[str, typer.Argument(help="Revision to go back to; `base` drops all.")],
) -> None:
    """Take the schema back to an older revision."""
    _with_engine(lambda engine: schema.downgrade(engine, revision))
    say(f"The registry's schema is at {revision}.")
