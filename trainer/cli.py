"""Commands of the trainer: data, train, publish, infer, methods, benchmark, demo."""

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from backcast.cli.acting import Reason
from backcast.cli.output import interruptible, note, print_json, print_table, progress, say
from backcast.errors import ConfigError
from trainer.data.cli import app as data_app

if TYPE_CHECKING:
    from backcast.versions import Live, Version

app = typer.Typer()
app.add_typer(data_app, name="data")

Number = TypeVar("Number", int, float)
RECIPE = "How long and fast to train: fast, or published as in the paper."

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
UNTIL = "a fraction of the edges, a Unix timestamp or a date"


@app.command(
    epilog="Example: backcast train --data shop --until 0.6 --horizon 0.7 --epochs 200",
)
def train(
    data: Annotated[Path, typer.Option(help="Data set folder.", show_default=False)],
    until: Annotated[
        str, typer.Option(help=f"Use interactions until here: {UNTIL}.", show_default=False)
    ],
    horizon: Annotated[
        str | None, typer.Option(help="Also measure Recall@50 on the edges until here.")
    ] = None,
    parent: Annotated[
        int | None,
        typer.Option(help="Version to be compatible with.", show_default="newest fit one"),
    ] = None,
    method: Annotated[
        str, typer.Option(help="How to make it compatible; `backcast methods` lists the ways.")
    ] = "grown-direct",
    recipe: Annotated[str, typer.Option(help=RECIPE)] = "fast",
    preset: Annotated[str, typer.Option(help="Where settings start from: small, paper.")] = "small",
    config: Annotated[
        Path | None, typer.Option(help="TOML file with training settings.", show_default=False)
    ] = None,
    lam: Annotated[
        float | None, typer.Option("--lambda", help="λ: weight of the alignment in joint methods.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs.")] = None,
    protocol: Annotated[str | None, typer.Option(help="strict or paper.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same result.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Train the next version with its maps to older versions and register them.

    Version 0 is trained on the intended task alone. Interrupting leaves nothing behind.
    """
    from backcast import acts
    from backcast.artifacts import Artifacts
    from backcast.cli.acting import acting
    from backcast.registry import open_registry
    from backcast.settings import Settings
    from trainer.config import TrainConfig
    from trainer.data.dataset import Dataset, resolve_until
    from trainer.fitting import EpochReport
    from trainer.methods import method as method_named
    from trainer.training import TrainRequest, choose_parent, train_version

    settings = Settings.load()
    training = TrainConfig.load(
        preset,
        config,
        recipe=recipe,
        epochs=epochs,
        alignment_weight=lam,
        protocol=protocol,
        seed=seed,
        device=device or settings.device,
    )
    with interruptible("Interrupted: nothing was registered."):
        dataset = Dataset.read(data)
    request = TrainRequest(
        dataset,
        training,
        resolve_until(dataset, until),
        method_named(method),
        None if horizon is None else resolve_until(dataset, horizon),
        parent,
    )
    with (
        interruptible("Interrupted: nothing was registered."),
        open_registry(settings) as registry,
        acting(registry, acts.training(method, parent, reason)) as recorded,
        progress("epoch", training.epochs) as advance,
    ):

        def on_epoch(report: EpochReport) -> None:
            advance(report.epoch, describe(report))

        artifacts = Artifacts(settings.artifacts_root)
        chosen = choose_parent(registry.deployments.catalog(), parent)
        if chosen is not None and request.until < chosen.until:
            note(
                f"It sees less than its parent: interactions until {_shown(request.until)}, "
                f"version {chosen.number} until {_shown(chosen.until)}.",
                logging.WARNING,
            )
        version = train_version(registry, artifacts, request, on_epoch)
        recorded.found["version"] = version.number
    if as_json:
        print_json(
            {
                "version": version.number,
                "parent": version.parent,
                "method": version.method,
                "dim": version.dim,
                "until": version.until,
                **version.details,
            }
        )
    else:
        _print_trained(version)


@app.command(epilog="Example: backcast methods")
def methods(as_json: AsJson = False) -> None:
    """List the methods of `benchmark`, and which of them `train` can use and λ matters to."""
    from trainer.methods import methods as known

    if as_json:
        print_json(
            [
                {
                    "name": m.name,
                    "title": m.title,
                    "trainable": m.servable,
                    "lambda": m.models.default_lambda,
                    "summary": m.summary,
                }
                for m in known().values()
            ]
        )
    else:
        yes = {True: "yes", False: ""}
        print_table(
            ("method", "train", "λ", "what it does"),
            [
                (m.name, yes[m.servable], m.models.default_lambda, m.summary)
                for m in known().values()
            ],
        )


@app.command(
    epilog="Example: backcast benchmark --data shop --out report "
    "--methods non-bc,post-affine,bc-aligner --seeds 0,1,2",
)
def benchmark(
    data: Annotated[Path, typer.Option(help="Data set folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for report and work.", show_default=False)],
    preset: Annotated[str, typer.Option(help="Where settings start from: small, paper.")] = "small",
    names: Annotated[
        str | None,
        typer.Option("--methods", help="Names, with commas.", show_default="all"),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="strict, or paper as published.", show_default="strict"),
    ] = None,
    recipe: Annotated[str, typer.Option(help=RECIPE)] = "fast",
    lambdas: Annotated[
        str | None,
        typer.Option(
            help="λs of the joint methods, with commas.",
            show_default="the methods'; with --frontier, seven",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Training seeds, with commas.")] = "0",
    frontier: Annotated[
        bool,
        typer.Option("--frontier", help="The trade-off over many λ, for consumers of version 0."),
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with training settings.", show_default=False)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each version.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="one a core; one on a GPU")
    ] = None,
) -> None:
    """Train five versions by each method, measure them, and write a report.

    What is finished is kept in OUT/work: the same command goes on where it was stopped.
    """
    from backcast.settings import Settings
    from trainer.config import TrainConfig
    from trainer.evaluation import benchmark as bench
    from trainer.evaluation.consumers import PAPER, SMALL
    from trainer.evaluation.report import write_report
    from trainer.evaluation.table import NOTHING, headings, lines
    from trainer.methods import methods as known

    training = TrainConfig.load(
        preset,
        config,
        recipe=recipe,
        epochs=epochs,
        protocol=protocol,
        device=device or Settings.load().device,
    )
    given = training.alignment_weight
    usual = bench.FRONTIER_LAMBDAS if frontier else () if given is None else (given,)
    plan = bench.Plan(
        data=data,
        out=out,
        preset=preset,
        training=training,
        consumers=PAPER if preset == "paper" else SMALL,
        methods=tuple(known() if names is None else _listed(names)),
        seeds=_numbers("--seeds", seeds, int),
        lambdas=usual if lambdas is None else _numbers("--lambdas", lambdas, float),
        consumed=(0,) if frontier else None,
    )
    with interruptible("Stopped. What is finished is kept: the same command goes on from there."):
        with progress("benchmark", bench.count_units(plan), estimated=False) as advance:
            results = bench.run(
                plan,
                processes=processes or bench.default_processes(training.device),
                told=lambda done, _total, note: advance(done, note),
            )
        written = write_report(results, out)
    print_table(
        headings(results),
        [
            [
                None if text == NOTHING else text
                for text in (
                    line.title,
                    line.lam,
                    *(cell.text for cell in line.cells),
                    *line.published,
                )
            ]
            for line in lines(results)
        ],
        title=f"{results.dataset}, protocol {results.protocol}",
    )
    untested = bench.untested_tasks(results)
    if untested:
        say(f"Not tested, for want of examples of both classes: {', '.join(untested)}.")
    say(f"Report: {next(path for path in written if path.suffix == '.html')}")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in _listed(text))
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is no list of numbers with commas.") from None


def describe(report: Any) -> str:
    """Return how training goes in a few words."""
    words = [f"loss {report.loss:.4f}"]
    if report.alignment is not None:
        words.append(f"alignment {report.alignment:.4f}")
    if report.best_recall is not None:
        words.append(f"best Recall@50 {report.best_recall:.4f}")
    return " · ".join(words)


def _shown(moment: int) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _print_trained(version: "Version") -> None:
    to = "" if version.parent is None else f", compatible with version {version.parent}"
    metrics = version.details["metrics"].items()
    print_table(
        ("metric", "value"),
        [
            (name, f"{value:.4f}" if isinstance(value, float) else value)
            for name, value in metrics
            if value is not None
        ],
        title=f"Version {version.number} is registered: {version.dim} dimensions{to}",
    )
    say(f"Method: {version.method}; interactions until {_shown(version.until)}")
    say(f"Next: backcast publish {version.number}, then backcast promote {version.number}")


@app.command(epilog="Example: backcast publish 1 --data shop")
def publish(
    version: Annotated[int, typer.Argument(help="Version whose model to run.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Data set folder.", show_default="the one it was trained on"),
    ] = None,
    until: Annotated[str, typer.Option(help=f"Use interactions until here: {UNTIL}.")] = "1.0",
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Compute the vectors of all users and items, and write and register a snapshot of them."""
    from dataclasses import asdict

    from backcast import acts
    from backcast.artifacts import Artifacts
    from backcast.cli.acting import acting
    from backcast.lifecycle import demand_promotable
    from backcast.registry import open_registry
    from backcast.settings import Settings
    from trainer.data.dataset import Dataset, resolve_until
    from trainer.publishing import publish_version

    settings = Settings.load()
    with (
        interruptible(f"Interrupted; publish version {version} again."),
        open_registry(settings) as registry,
        acting(registry, acts.publishing(version, reason)) as recorded,
    ):
        known = registry.versions.get(version)
        demand_promotable(known)
        dataset = Dataset.read(data or Path(known.dataset))
        moment = resolve_until(dataset, until)
        rows = dataset.users_known(moment) + dataset.items_known(moment)
        with progress("vectors", rows) as advance:
            record = publish_version(
                registry,
                Artifacts(settings.artifacts_root),
                version,
                dataset,
                until=moment,
                device=device or settings.device,
                on_rows=advance,
            )
        recorded.found["snapshot"] = record.id
        live = registry.deployments.live()
    if as_json:
        print_json(asdict(record))
    else:
        counts = ", ".join(f"{count} {entity}s" for entity, count in record.counts.items())
        say(f"Snapshot {record.id} of version {version}: {counts}, {record.dim} dimensions.")
        unseen = len(dataset.item_ids) - dataset.items_known(moment)
        if unseen:
            say(f"{unseen} items have no interaction until {_shown(moment)} and get no vector.")
        say(f"Next: {after_publishing(version, live)}")


def after_publishing(version: int, live: "Live | None") -> str:
    """Return the command that follows a publication, given what is live."""
    if live is None:
        return f"backcast promote {version}"
    if live.version == version:
        return "backcast refresh --dry-run, then backcast refresh"
    return f"backcast diff {version}, then backcast promote {version}"


@app.command(epilog="Example: backcast infer --data shop --upsert")
def infer(
    data: Annotated[Path, typer.Option(help="Data set folder.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="Parquet file to write, as `backcast upsert` reads it."),
    ] = None,
    upsert: Annotated[bool, typer.Option("--upsert", help="Put the vectors at once.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="All users and items, not only new ones.")
    ] = False,
    until: Annotated[str, typer.Option(help=f"Use interactions until here: {UNTIL}.")] = "1.0",
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    reason: Reason = None,
    as_json: AsJson = False,
) -> None:
    """Compute vectors of new users and items with the live version's model, without training."""
    from backcast import acts
    from backcast.cli.acting import acting, actor
    from backcast.errors import InvalidInput
    from backcast.lifecycle import open_backcast, upsert_batches
    from backcast.settings import Settings
    from backcast.vector_files import write_vector_file
    from trainer.data.dataset import Dataset, resolve_until
    from trainer.inference import infer as run
    from trainer.inference import only_new

    if out is None and not upsert:
        raise InvalidInput("Say where the vectors go: --out FILE, --upsert, or both.")
    settings = Settings.load()
    dataset = Dataset.read(data)
    with open_backcast(settings) as backcast:
        inferred = run(
            backcast,
            dataset,
            until=resolve_until(dataset, until),
            device=device or settings.device,
        )
        if not everything:
            inferred = only_new(backcast, inferred)
        if out is not None:
            write_vector_file(out, inferred.dim, inferred.batches, {"version": inferred.version})
        live = None
        if upsert and inferred.batches:
            with acting(backcast.registry, acts.upserting(inferred.counts, reason)) as recorded:
                live = upsert_batches(
                    backcast,
                    inferred.batches,
                    actor=actor(),
                    most_changed=settings.max_changed,
                    expected_live=inferred.version,
                )
                recorded.found["snapshot"] = live.name
    snapshot = None if live is None else live.name
    if as_json:
        document = {"version": inferred.version, "vectors": inferred.counts, "snapshot": snapshot}
        print_json({**document, "out": None if out is None else str(out)})
        return
    counts = ", ".join(f"{n} {entity}s" for entity, n in inferred.counts.items()) or "none"
    say(f"Vectors of version {inferred.version}: {counts}.")
    if out is not None:
        say(f"Written to {out}." if upsert else f"Next: backcast upsert {out}")
    if snapshot is not None:
        say(f"Put: {snapshot} is live.")


@app.command(epilog="Example: backcast demo --data shop --epochs 40")
def demo(
    data: Annotated[
        Path | None, typer.Option(help="Data set folder.", show_default="generated data")
    ] = None,
    home: Annotated[Path, typer.Option(help="Folder to work in; made anew.")] = Path(".demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Training epochs of each version.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs a training step.")] = 1024,
    versions: Annotated[int, typer.Option(min=2, max=5, help="How many versions to train.")] = 3,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Show the whole story: train, serve, promote, and a consumer that never retrains."""
    from trainer.demo import DemoConfig, run_demo

    config = DemoConfig(data, home, epochs, batch_size, versions, seed)
    result = run_demo(config, (lambda _line: None) if as_json else say)
    if as_json:
        print_json(result.document())
    else:
        for table in result.tables():
            print_table(table.columns, table.rows, title=table.title)
        say(result.verdict())
