"""Commands of the trainer: data, train, publish, demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from backcast.cli.output import print_json, print_table, progress, say
from backcast.errors import ConfigError
from trainer.data.cli import app as data_app

app = typer.Typer()
app.add_typer(data_app, name="data")

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
    method: Annotated[str, typer.Option(help="How to align.")] = "bc-aligner",
    preset: Annotated[str, typer.Option(help="Where settings start from: small, paper.")] = "small",
    config: Annotated[
        Path | None, typer.Option(help="TOML file with training settings.", show_default=False)
    ] = None,
    lam: Annotated[float | None, typer.Option("--lambda", help="Weight of the alignment.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs.")] = None,
    protocol: Annotated[str | None, typer.Option(help="strict or paper.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same result.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train the next version with its backward transformation and register both.

    Version 0 is trained on the intended task alone. Interrupting leaves nothing behind.
    """
    from backcast.artifacts import Artifacts
    from backcast.registry import open_registry
    from backcast.settings import Settings
    from trainer.config import TrainConfig
    from trainer.data.dataset import Dataset, resolve_until
    from trainer.fitting import EpochReport
    from trainer.training import BC_ALIGNER, TrainRequest, train_version

    if method != BC_ALIGNER:
        raise ConfigError(f"Method {method!r} is unknown; there is {BC_ALIGNER}.")
    settings = Settings.load()
    training = TrainConfig.load(
        preset,
        config,
        epochs=epochs,
        alignment_weight=lam,
        protocol=protocol,
        seed=seed,
        device=device or settings.device,
    )
    dataset = Dataset.read(data)
    request = TrainRequest(
        dataset,
        training,
        resolve_until(dataset, until),
        None if horizon is None else resolve_until(dataset, horizon),
        parent,
    )
    try:
        with (
            open_registry(settings) as registry,
            progress("epoch", training.epochs) as advance,
        ):

            def on_epoch(report: EpochReport) -> None:
                advance(report.epoch, describe(report))

            artifacts = Artifacts(settings.artifacts_root)
            version = train_version(registry, artifacts, request, on_epoch)
    except KeyboardInterrupt:
        say("Interrupted: nothing was registered.")
        raise typer.Exit(130) from None
    if as_json:
        print_json(
            {
                "version": version.number,
                "parent": version.parent,
                "dim": version.dim,
                "until": version.until,
                **version.details,
            }
        )
    else:
        _print_trained(version.number, version.dim, version.parent, version.details["metrics"])


def describe(report: Any) -> str:
    """Return how training goes in a few words."""
    words = [f"loss {report.loss:.4f}"]
    if report.alignment is not None:
        words.append(f"alignment {report.alignment:.4f}")
    if report.best_recall is not None:
        words.append(f"best Recall@50 {report.best_recall:.4f}")
    return " · ".join(words)


def _print_trained(number: int, dim: int, parent: int | None, metrics: dict[str, Any]) -> None:
    to = "" if parent is None else f", compatible with version {parent}"
    shown = [(name, value) for name, value in metrics.items() if value is not None]
    print_table(
        ("metric", "value"),
        [(name, f"{value:.4f}" if isinstance(value, float) else value) for name, value in shown],
        title=f"Version {number} is registered: {dim} dimensions{to}",
    )
    say(f"Next: backcast publish {number}, then backcast promote {number}")


@app.command(epilog="Example: backcast publish 1 --data shop")
def publish(
    version: Annotated[int, typer.Argument(help="Version whose model to run.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Data set folder.", show_default="the one it was trained on"),
    ] = None,
    until: Annotated[str, typer.Option(help=f"Use interactions until here: {UNTIL}.")] = "1.0",
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compute the vectors of all users and items, and write and register a snapshot of them."""
    from dataclasses import asdict

    from backcast.artifacts import Artifacts
    from backcast.registry import open_registry
    from backcast.settings import Settings
    from trainer.data.dataset import Dataset, resolve_until
    from trainer.publishing import publish_version

    settings = Settings.load()
    with open_registry(settings) as registry:
        dataset = Dataset.read(data or Path(registry.versions.get(version).dataset))
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
    if as_json:
        print_json(asdict(record))
    else:
        counts = ", ".join(f"{count} {entity}s" for entity, count in record.counts.items())
        say(f"Snapshot {record.id} of version {version}: {counts}, {record.dim} dimensions.")
        unseen = len(dataset.item_ids) - dataset.items_known(moment)
        if unseen:
            say(f"{unseen} items have no interaction until then and get no vector.")
        say(f"Next: backcast promote {version}")


@app.command(epilog="Example: backcast demo --data shop --epochs 60")
def demo(
    data: Annotated[
        Path | None, typer.Option(help="Data set folder.", show_default="generated data")
    ] = None,
    home: Annotated[Path, typer.Option(help="Folder to work in; made anew.")] = Path(".demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Training epochs of each version.")] = 60,
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
