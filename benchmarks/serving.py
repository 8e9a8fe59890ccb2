"""How fast the service is: ``python benchmarks/serving.py``.

Real servers, each a ``python -m backcast serve`` of its own on a loopback port, under load from
wrk; both sides of a ratio are measured in turn, round after round, and the median of the rounds'
ratios is given. Items have random vectors and random maps, 512 → 448 → 384 → 320 → 256, and ids of
10 characters; requests ask for random ids with ver-0 vectors. Bars that are missed are shown.

The machine is shared by the servers and wrk: a ratio says more than a rate. wrk's latencies are
those of a client that waits for its answer, corrected for the requests it did not send meanwhile.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from backcast.cli.output import print_table
from benchmarks.feast_comparison import against_feast
from benchmarks.measuring import machine
from benchmarks.serving_bench import Bench, Row, say
from benchmarks.serving_load import Unmeasured, find_wrk
from benchmarks.serving_processes import ROOT, THREADS
from benchmarks.serving_rows import (
    BATCHES_AT_ONCE,
    SINGLES_AT_ONCE,
    WORKERS_AT_ONCE,
    binary_batches,
    json_batches,
    keys,
    large_memory,
    long_chains,
    mixed,
    redis_store,
    single_gets,
    storage,
    two_workers,
)

LARGE, MANY = "large", 10_000_000
ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "singles": single_gets,
    "key": keys,
    "batches": binary_batches,
    "json": json_batches,
    "feast": against_feast,
    "redis": redis_store,
    "workers": two_workers,
    "mixed": mixed,
    "storage": storage,
    "chains": long_chains,
    LARGE: large_memory,
}
"""By the names that ``--only`` takes."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1_000_000, help="vectors of each deployment")
    parser.add_argument("--duration", type=int, default=10, help="seconds a measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=1, help="of a matrix product")
    parser.add_argument("--only", help=f"rows, with commas: {', '.join(ROWS)}")
    parser.add_argument("--folder", type=Path, help="keep what is prepared here, and use it again")
    parser.add_argument(
        "--feast",
        type=Path,
        default=ROOT / ".venv-feast",
        help="virtual environment that has Feast, which `make bench-feast` makes",
    )
    parser.add_argument(
        "--large",
        type=int,
        nargs="?",
        const=MANY,
        help="also measure start-up and memory with so many vectors (5 GB of disk)",
    )
    parsed = parser.parse_args(arguments)
    for name in ("items", "duration", "rounds", "threads"):
        if getattr(parsed, name) <= 0:
            parser.error(f"--{name} must be more than 0")
    return parsed


def chosen_rows(only: str | None, large: int | None) -> list[str]:
    """Return the names of the rows to measure; raise Unmeasured for one that is unknown."""
    names = only.split(",") if only else [name for name in ROWS if name != LARGE]
    if large and LARGE not in names:
        names.append(LARGE)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise Unmeasured(f"--only: there is no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    return names


def measure_row(name: str, bench: Bench) -> list[Row]:
    """Measure a row; one that cannot be measured says why."""
    say(name)
    try:
        return ROWS[name](bench)
    except Unmeasured as error:
        return [Row(name, f"not measured: {error}", met=False)]


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print the table."""
    names = chosen_rows(arguments.only, arguments.large)
    find_wrk()
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(
            folder=folder.resolve(),
            items=arguments.items,
            seconds=arguments.duration,
            rounds=arguments.rounds,
            threads=arguments.threads,
            large=arguments.large or MANY,
            feast=arguments.feast.absolute(),
        )
        torch.set_num_threads(bench.threads)
        print(machine())
        print(
            f"Servers with {', '.join(f'{name}={bench.threads}' for name in THREADS)}, one worker. "
            f"{bench.items:,} items; {bench.rounds} rounds of {bench.seconds:g} s. wrk, one "
            f"thread: {SINGLES_AT_ONCE} connections for single vectors ({WORKERS_AT_ONCE} to "
            f"compare workers), {BATCHES_AT_ONCE} for batches.",
            flush=True,
        )
        rows = [row for name in names for row in measure_row(name, bench)]
    print_table(("what", "figure", "bar", "met"), [row.cells() for row in rows])


def main() -> int:
    """Measure, or say in one line why not."""
    try:
        run(parse(sys.argv[1:]))
    except Unmeasured as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
