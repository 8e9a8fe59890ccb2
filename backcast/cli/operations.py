"""Commands that change what is live, each as an operation, and those that look after them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any

import typer

from backcast import acts
from backcast.cli.acting import Reason, acting, actor
from backcast.cli.output import interruptible, note, print_json, print_table, progress, say
from backcast.cli.promotion import print_plan
from backcast.errors import BackcastError, Conflict, InvalidInput
from backcast.lifecycle import (
    Backcast,
    Doomed,
    Order,
    Policy,
    Refresh,
    Rollback,
    collect,
    collect_litter,
    open_backcast,
    plan_collection,
    plan_litter,
    plan_promotion,
    plan_rollback,
    run_order,
    sweep,
)
from backcast.lifecycle.operations import Outcome, cancel
from backcast.registry import open_registry
from backcast.settings import Settings
from backcast.versions import Operation

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
ExpectedLive = Annotated[int | None, typer.Option(help="Refuse unless this version is live now.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for name, command, example in (
        ("rollback", rollback_command, "backcast rollback --reason 'clicks fell by 4 %'"),
        ("refresh", refresh_command, "backcast refresh --compact"),
        ("operations", operations_command, "backcast operations --json"),
        ("gc", gc_command, "backcast gc --dry-run"),
    ):
        app.command(name, epilog=f"Example: {example}")(command)


def perform(backcast: Backcast, settings: Settings, order: Order, what: str) -> Outcome:
    """Run an order as an operation of this process, with a progress bar; then sweep."""
    with (
        interruptible(f"Interrupted; {what} can be begun again."),
        acting(backcast.registry, acts.ordering(order.kind, order.document())) as recorded,
        progress(what, 100) as advance,
    ):
        outcome = run_order(
            backcast,
            order,
            actor(),
            timeout=settings.operation_timeout,
            act=recorded.id,
            report=lambda step, fraction: advance(round(100 * fraction), step),
            say=note,
        )
    try:
        sweep(backcast, timedelta(seconds=settings.grace_seconds))
    except BackcastError as error:  # what was ordered is done
        note(f"What is over its grace period is still there, for a replica or gc: {error.message}")
    return outcome


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    """Print what is live, and what storing it cost."""
    live, stored = outcome.live, outcome.rounding
    if as_json:
        print_json(outcome.document())
        return
    say(f"Version {live.version} is live, from snapshot {live.snapshot}.")
    if stored is not None:
        say(f"Stored as {stored}.")


def rollback_command(
    dry_run: Annotated[bool, typer.Option(help="Say what would happen; change nothing.")] = False,
    to_snapshot: Annotated[
        str | None,
        typer.Option(
            help="A superseded snapshot in its grace period.",
            show_default="what was live before the last promotion",
        ),
    ] = None,
    expected_live: ExpectedLive = None,
    reason: Annotated[
        str | None,
        typer.Option(help="Why: consumers of the version that is left are told. Required."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go back to what was live before the last promotion, at once, in its grace period."""
    settings = Settings.load()
    with open_backcast(settings) as backcast:
        if dry_run:
            plan = plan_rollback(
                backcast,
                grace=timedelta(seconds=settings.grace_seconds),
                expected_live=expected_live,
                to_snapshot=to_snapshot,
            )
            _print_rollback(plan.document(), as_json)
            return
        if reason is None or not reason.strip():
            raise InvalidInput(
                "A rollback needs --reason: consumers of the newer version are told it."
            )
        order = Rollback(expected_live, reason, to_snapshot)
        print_outcome(perform(backcast, settings, order, "rolling back"), as_json)


def _print_rollback(plan: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(plan)
        return
    say(f"Version {plan['version']} would be live, from snapshot {plan['snapshot']}.")
    if not plan["loaded"]:
        say("The vector store has lost that snapshot: it would be loaded first.")
    say(f"It is sure to stay for {plan['grace_left_seconds']:.0f} s.")
    say(f"Servable would be {_named(plan['servable_versions'])}.")
    if plan["refused_versions"]:
        say(f"Refused with 409 would be {_named(plan['refused_versions'])}.")
    if plan["pinned_consumers"]:
        say(f"Consumers pinned to those: {', '.join(plan['pinned_consumers'])}.")
    for entity, ids in plan["lost_ids"].items():
        say(f"{len(ids)} {entity} ids, upserted since, would answer 404:")
        for id in ids:
            say(f"  {id}")


def _named(versions: Sequence[int]) -> str:
    numbers = ", ".join(map(str, versions))
    return f"version {numbers}" if len(versions) == 1 else f"versions {numbers}"


def refresh_command(
    dry_run: Annotated[bool, typer.Option(help="Check the gates and change nothing.")] = False,
    compacted: Annotated[
        bool, typer.Option("--compact", help="First write what is live, changes and all.")
    ] = False,
    expected_live: ExpectedLive = None,
    reason: Annotated[str | None, typer.Option(help="Why; kept with the deployment.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the newest snapshot of the live version live."""
    if dry_run and compacted:
        raise InvalidInput("--compact writes a snapshot, --dry-run changes nothing: give one.")
    settings = Settings.load()
    with open_backcast(settings) as backcast:
        live = backcast.registry.deployments.live()
        if live is None:
            raise Conflict("Nothing is live, so nothing can be refreshed; promote a version first.")
        version = live.version
        order = Refresh(version, expected_live, compacted, reason)
        if dry_run:
            order.check(backcast)
            plan = plan_promotion(backcast, version, expected_live=expected_live)
            print_plan(plan.document(), as_json)
            raise typer.Exit(0 if plan.passed else 1)
        outcome = perform(backcast, settings, order, f"refreshing version {version}")
        print_outcome(outcome, as_json)


def operations_command(
    id: Annotated[
        str | None, typer.Argument(help="One operation.", show_default="the newest ones")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 20,
    cancelled: Annotated[
        bool, typer.Option("--cancel", help="Call it off, if it has switched nothing yet.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Why; told to who runs it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show one operation, or list the newest of every replica and command, newest first."""
    if cancelled and id is None:
        raise InvalidInput("--cancel needs the operation: backcast operations ID --cancel.")
    if reason is not None and not cancelled:
        raise InvalidInput("--reason says why an operation is called off: give --cancel too.")
    with open_registry(Settings.load()) as registry:
        if id is not None and cancelled:
            with acting(registry, acts.cancelling(id, reason)):
                cancel(registry, id, actor=actor(), reason=reason)
        all_asked = [registry.operations.get(id)] if id else registry.operations.recent(limit)
    if as_json:
        print_json([asdict(operation) for operation in all_asked])
    elif not all_asked:
        say("There was no operation yet.")
    else:
        print_table(
            ("operation", "kind", "state", "step", "done", "by", "begun", "what became of it"),
            [_operation_row(operation) for operation in all_asked],
        )


def _operation_row(operation: Operation) -> tuple[object, ...]:
    result, error = operation.result or {}, operation.error or {}
    became = error.get("message") or (f"live: {result['snapshot']}" if "snapshot" in result else "")
    return (
        operation.id,
        operation.kind,
        operation.state,
        operation.step,
        f"{100 * operation.progress:.0f} %",
        operation.actor,
        f"{operation.created_at:%Y-%m-%d %H:%M:%S}",
        became,
    )


def gc_command(
    dry_run: Annotated[bool, typer.Option(help="List what would go; delete nothing.")] = False,
    litter: Annotated[
        bool,
        typer.Option(
            help="Also what no row of this registry names and is older than a day: folders of "
            "artifacts that a kill left behind, snapshots in the store."
        ),
    ] = False,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Delete what nobody needs any more: what is over its grace period, and what policy says."""
    settings = Settings.load()
    with open_backcast(settings) as backcast:
        policy = Policy.of(settings)
        if dry_run:
            doomed = plan_collection(backcast, policy)
            doomed += plan_litter(backcast) if litter else []
        else:
            with acting(backcast.registry, acts.collecting(litter, reason)) as recorded:
                doomed = collect(backcast, policy, actor())
                recorded.found["deleted"] = len(doomed)
                doomed += collect_litter(backcast, policy, actor()) if litter else []
                recorded.found["deleted"] = len(doomed)
    if as_json:
        print_json([asdict(one) for one in doomed])
        return
    if not doomed:
        say("There is nothing to delete.")
        return
    print_table(("what", "name", "why", "bytes"), [_doomed_row(one) for one in doomed])
    total, things = sum(one.bytes or 0 for one in doomed), "thing" if len(doomed) == 1 else "things"
    say(f"{'Would delete' if dry_run else 'Deleted'} {len(doomed)} {things}, {total} bytes known.")


def _doomed_row(one: Doomed) -> tuple[object, ...]:
    return one.what, one.name, one.reason, one.bytes
