"""``backcast data``: commands that build a data set folder."""

import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from backcast.cli.output import print_json, print_table, progress, say

app = typer.Typer(no_args_is_help=True, help="Build a data set folder, which the trainer reads.")


class TimestampUnit(StrEnum):
    """How a timestamp is written."""

    s = "s"
    ms = "ms"
    iso = "iso"


Out = Annotated[Path, typer.Option("--out", help="Data set folder to write.", show_default=False)]
Name = Annotated[
    str | None,
    typer.Option("--name", help="What to call it.", show_default="the folder's name"),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the data set that is in the folder.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")]


AMAZON_EXAMPLE = """\b
Example:
  backcast data amazon --out instruments \\
    --reviews Musical_Instruments_5.json.gz \\
    --meta meta_Musical_Instruments.json.gz
"""

CSV_EXAMPLE = """\b
Example:
  backcast data csv --out shop \\
    --interactions interactions.csv.gz \\
    --items items.csv --list-column categories
"""

SYNTH_EXAMPLE = """\b
Example:
  backcast data synth --out shop --users 5000 --seed 7
"""


@app.command("amazon", epilog=AMAZON_EXAMPLE)
def amazon_command(
    reviews: Annotated[
        Path,
        typer.Option(help="File with one review per line, plain or gzip.", show_default=False),
    ],
    meta: Annotated[
        Path,
        typer.Option(help="File with one item per line, plain or gzip.", show_default=False),
    ],
    out: Out,
    min_value_count: Annotated[
        int, typer.Option(help="Drop a brand or category that fewer items have.")
    ] = 5,
    skip_malformed: Annotated[
        bool, typer.Option("--skip-malformed", help="Drop and count malformed lines.")
    ] = False,
    name: Name = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Import the Amazon review dumps, in the layout of 2018 or of 2014.

    Items get their brand and categories; those without metadata are dropped with their reviews. A
    malformed line stops the import. Only a user's earliest review of an item is kept.
    """
    from trainer.data.amazon import AmazonSource, import_amazon

    source = AmazonSource(reviews, meta, min_value_count, skip_malformed)
    with progress("MB read", _megabytes(source.size())) as advance:
        import_amazon(
            source,
            out,
            name=_name(name, out),
            overwrite=overwrite,
            advance=lambda done: advance(_megabytes(done)),
        )
    _report(out, as_json)


@app.command("csv", epilog=CSV_EXAMPLE)
def csv_command(
    interactions: Annotated[
        Path,
        typer.Option(
            help="Text file with a header and one interaction per line, plain or gzip.",
            show_default=False,
        ),
    ],
    out: Out,
    items: Annotated[
        Path | None, typer.Option(help="Text file with a header and one item per line.")
    ] = None,
    user_column: Annotated[str, typer.Option(help="Column of the user's id.")] = "user_id",
    item_column: Annotated[str, typer.Option(help="Column of the item's id.")] = "item_id",
    rating_column: Annotated[
        str, typer.Option(help="Column of the rating; an empty cell is no rating.")
    ] = "rating",
    no_rating: Annotated[
        bool, typer.Option("--no-rating", help="The interactions have no ratings.")
    ] = False,
    timestamp_column: Annotated[str, typer.Option(help="Column of the time.")] = "timestamp",
    timestamp_unit: Annotated[
        TimestampUnit,
        typer.Option(help="Seconds or milliseconds since 1970, or ISO 8601 dates or times."),
    ] = TimestampUnit.s,
    item_id_column: Annotated[
        str, typer.Option(help="Column of the item's id in the items file.")
    ] = "item_id",
    list_column: Annotated[
        list[str] | None,
        typer.Option(help="Column of the items file with several values a cell; repeatable."),
    ] = None,
    separator: Annotated[str, typer.Option(help="Text between the values of such a cell.")] = "|",
    attribute: Annotated[
        list[str] | None,
        typer.Option(help="Column of the items file to keep; repeatable.", show_default="all"),
    ] = None,
    delimiter: Annotated[
        str, typer.Option(help=r"Character between two columns; \t is the tabulator.")
    ] = ",",
    skip_malformed: Annotated[
        bool, typer.Option("--skip-malformed", help="Drop and count malformed rows.")
    ] = False,
    name: Name = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Import interactions, and items if there are any, from text files with a header.

    Every row needs a user, an item and a time. A malformed row stops the import, with its line.
    Only the earliest interaction of a user with an item is kept.
    """
    from trainer.data.csv import CsvSource, import_csv

    source = CsvSource(
        interactions=interactions,
        items=items,
        user_column=user_column,
        item_column=item_column,
        rating_column=None if no_rating else rating_column,
        timestamp_column=timestamp_column,
        timestamp_unit=timestamp_unit.value,
        item_id_column=item_id_column,
        list_columns=tuple(list_column or ()),
        separator=separator,
        attributes=tuple(attribute) if attribute else None,
        delimiter=delimiter.replace(r"\t", "\t"),
        skip_malformed=skip_malformed,
    )
    import_csv(source, out, name=_name(name, out), overwrite=overwrite)
    _report(out, as_json)


@app.command("synth", epilog=SYNTH_EXAMPLE)
def synth_command(
    out: Out,
    users: Annotated[int, typer.Option(help="Users, each with an interaction.")] = 2000,
    items: Annotated[int, typer.Option(help="Items.")] = 1000,
    interactions: Annotated[
        int, typer.Option(help="Interactions, at least one per user.")
    ] = 40_000,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal data.")] = 0,
    name: Name = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Generate a graph of users and items that grows over time.

    Activity and popularity follow power laws, users and items keep arriving, tastes drift, items
    have a brand and categories that matter, and ratings follow an item's quality.
    """
    from dataclasses import asdict

    from trainer.data.dataset import check_free, write_dataset
    from trainer.data.synth import SynthConfig, synthesize

    config = SynthConfig(users=users, items=items, interactions=interactions, seed=seed)
    check_free(out, overwrite)
    with progress("interactions", interactions) as advance:
        edges, catalogue = synthesize(config, advance)
    write_dataset(
        out,
        edges,
        catalogue,
        name=_name(name, out),
        source={"importer": "synth", **asdict(config)},
        counts={},
        overwrite=overwrite,
    )
    _report(out, as_json)


def _name(name: str | None, out: Path) -> str:
    return name or out.resolve().name


def _megabytes(size: int) -> int:
    return math.ceil(size / 1e6)


def _report(folder: Path, as_json: bool) -> None:
    """Print what the data set now in ``folder`` holds."""
    from trainer.data.dataset import Manifest

    manifest = Manifest.read(folder)
    if as_json:
        print_json(
            {
                "name": manifest.name,
                "folder": str(folder),
                "fingerprint": manifest.fingerprint,
                "counts": dict(manifest.counts),
            }
        )
    else:
        print_table(["what", "count"], _counted(manifest.counts), title=manifest.name)
        say(f"Written to {folder}")


def _counted(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(what.replace("_", " "), count) for what, count in counts.items()]
