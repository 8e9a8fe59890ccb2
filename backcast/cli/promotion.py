"""Commands around a promotion: what it would change, and what earlier ones changed."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from backcast.cli.output import print_json, print_table, progress, say
from backcast.lifecycle import compare_with_live, deployment_diff, open_backcast
from backcast.lifecycle.gates import UNCOMPARED
from backcast.registry import open_registry
from backcast.settings import Settings
from backcast.versions import Entity

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]

_SHOWN = 5  # of the most changed ids, and of those gained and lost


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for name, command, example in (
        ("diff", diff_command, "backcast diff 1 --entity item"),
        ("deployments", deployments_command, "backcast deployments 2 --json"),
    ):
        app.command(name, epilog=f"Example: {example}")(command)


def diff_command(
    version: Annotated[int, typer.Argument(help="Version to compare with what is live.")],
    entity: Annotated[
        Entity | None, typer.Option(help="Show this kind only.", show_default="all")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what every consumer would see change if a version's newest snapshot went live."""
    with (
        open_backcast(Settings.load()) as backcast,
        progress(f"comparing version {version}", 100) as advance,
    ):
        compared = compare_with_live(backcast, version, lambda done: advance(round(100 * done)))
    document = _only(compared.document(), entity)
    if as_json:
        print_json(document)
    else:
        print_diff(document)


def deployments_command(
    generation: Annotated[
        int | None,
        typer.Argument(help="Show what this one changed.", show_default="list all"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every change of what is live, or show one with its gates and its diff."""
    with open_registry(Settings.load()) as registry:
        if generation is not None:
            _show_one(
                registry.deployments.get(generation), deployment_diff(registry, generation), as_json
            )
            return
        history = registry.deployments.history()
    if as_json:
        print_json(history)
    else:
        print_table(
            ("generation", "kind", "version", "snapshot", "from", "by", "when", "reason"),
            [_row(deployment) for deployment in history],
        )


def _row(deployment: Mapping[str, Any]) -> Sequence[object]:
    return (
        deployment["generation"],
        deployment["kind"] + (", forced" if deployment["forced"] else ""),
        deployment["version"],
        f"{deployment['snapshot']}.{deployment['delta']}",
        deployment["from_version"],
        deployment["actor"],
        f"{deployment['created_at']:%Y-%m-%d %H:%M}",
        deployment["reason"] or "",
    )


def _show_one(deployment: Mapping[str, Any], diff: Mapping[str, Any] | None, as_json: bool) -> None:
    if as_json:
        print_json({**deployment, "diff": diff})
        return
    print_table([*(name for name in _COLUMNS)], [_row(deployment)])
    print_gates([{"name": name, **_gate(found)} for name, found in deployment["gates"].items()])
    if diff is None:
        say("What was served was not compared.")
    else:
        print_diff(diff)


_COLUMNS = ("generation", "kind", "version", "snapshot", "from", "by", "when", "reason")


def _gate(found: Any) -> Mapping[str, Any]:
    # Up to version 0.1 only the finding was kept.
    empty = {"passed": True, "figure": None, "threshold": None}
    return {**empty, "finding": found} if isinstance(found, str) else found


def print_plan(plan: Mapping[str, Any], as_json: bool) -> None:
    """Print what a promotion would do."""
    if as_json:
        print_json(plan)
        return
    title = f"Promotion of version {plan['version']}, snapshot {plan['snapshot']}"
    print_gates(plan["gates"], title)
    if plan["diff"] is not None:
        print_diff(plan["diff"])


def print_gates(gates: Sequence[Mapping[str, Any]], title: str = "Gates") -> None:
    """Print each gate with its figure and its threshold."""
    print_table(
        ("gate", "result", "figure", "threshold", "finding"),
        [
            (
                gate["name"],
                _result(gate),
                _short(gate["figure"]),
                _short(gate["threshold"]),
                gate["finding"],
            )
            for gate in gates
        ],
        title=title,
    )


def _result(gate: Mapping[str, Any]) -> str:
    if not gate["passed"]:
        return "FAILED"
    return "not measured" if gate["name"] in UNCOMPARED else "passed"


def print_diff(diff: Mapping[str, Any]) -> None:
    """Print a diff as tables: ids, vectors by version, and the most changed ids."""
    kinds = diff["ids"]
    print_table(
        ("ids", "live", "candidate", "in both", "gained", "lost"),
        [
            (kind, ids["before"], ids["after"], ids["compared"], ids["gained"], ids["lost"])
            for kind, ids in kinds.items()
        ],
        title=_title(diff),
    )
    for kind, ids in kinds.items():
        for what in ("gained", "lost"):
            if ids[what]:
                more = ", …" if ids[what] > _SHOWN else ""
                say(f"{kind}s {what}: {', '.join(ids[f'{what}_ids'][:_SHOWN])}{more}")
    for version in diff["versions"]:
        say(
            f"Map to version {version['version']}: largest singular value "
            f"{_short(version['gain'])}, condition {_short(version['condition'])}"
        )
    for kind in kinds:
        _print_changes(kind, diff["versions"])


def _title(diff: Mapping[str, Any]) -> str:
    return (
        f"Version {diff['version']} from {diff['snapshot']}, beside version "
        f"{diff['live_version']} from {diff['baseline']}"
    )


_SPREAD = ("mean", "p50", "p95", "p99", "max")


def _print_changes(kind: str, versions: Sequence[Mapping[str, Any]]) -> None:
    changes = [(v, v["entities"][kind]) for v in versions if kind in v["entities"]]
    if not changes:
        say(f"No version serves {kind}s both now and then: no change is measured.")
        return
    print_table(
        ("version", "‖Δ‖", *_SPREAD),
        [
            row
            for version, change in changes
            for row in (
                (str(version["version"]), "absolute", *_cells(change["absolute"])),
                ("", "relative", *_cells(change["relative"])),
                ("", "cosine", *_cosines(change["cosine"])),
            )
        ],
        title=f"What changes in {kind} vectors, by version",
    )
    for version, change in changes:
        most = ", ".join(
            f"{mover['id']} ({100 * mover['relative']:.3g} %)"
            for mover in change["most_changed"][:_SHOWN]
        )
        if most:
            say(f"{kind}s of version {version['version']} that change most: {most}")


def _cells(spread: Mapping[str, float] | None) -> Sequence[str]:
    return ["-"] * len(_SPREAD) if spread is None else [_short(spread[name]) for name in _SPREAD]


def _cosines(turn: Mapping[str, float] | None) -> Sequence[str]:
    if turn is None:
        return ["-"] * len(_SPREAD)
    return [f"{turn['mean']:.4f}", "", f"{turn['p05']:.4f} (5 %)", "", f"{turn['min']:.4f} (least)"]


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"


def _only(diff: Mapping[str, Any], entity: Entity | None) -> dict[str, Any]:
    if entity is None:
        return dict(diff)

    def chosen(kinds: Mapping[str, Any]) -> dict[str, Any]:
        return {kind: found for kind, found in kinds.items() if kind == entity}

    versions = [{**v, "entities": chosen(v["entities"])} for v in diff["versions"]]
    return {**diff, "ids": chosen(diff["ids"]), "versions": versions}
