"""What a server does with more load than it can take: ``python benchmarks/overload.py``.

A real ``backcast serve`` with one worker on a loopback port. More and more batches of 10,000 ids
come in a second, for JSON and raw float32 in turn, from as many connections as that takes; beside
them singles come at a steady rate. Then singles come over more and more connections, each as soon
as the last is answered. Both are done with the default limits and without. Who is not answered
within 10 s gives up.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import torch

from backcast.cli.output import print_table
from benchmarks.measuring import machine
from benchmarks.overload_load import Step, Tally, flood, offer
from benchmarks.serving_bench import say
from benchmarks.serving_data import Deployment, prepare, random_ids
from benchmarks.serving_load import Unmeasured
from benchmarks.serving_processes import Server, backcast_server, environment

DIMS = (64, 128)
BATCH = 10_000
UNLIMITED = {
    "BACKCAST_BATCHES_WAITING": "100000",
    "BACKCAST_BATCH_SECONDS": "3600",
    "BACKCAST_MAX_CONNECTIONS": "1000000",
}
"""Settings that limit nothing, but for how many batches are computed at once."""


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=100_000, help="vectors of the deployment")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each step")
    parser.add_argument("--singles", type=float, default=200.0, help="a second, beside batches")
    parser.add_argument("--batches", default="0,5,10,20,40,80", help="a second, step by step")
    parser.add_argument("--floods", default="16,256,1000,4000", help="connections, step by step")
    parser.add_argument("--only", choices=["on", "off"], help="limits")
    return parser.parse_args(arguments)


def main() -> int:
    """Measure, or say in one line why not."""
    arguments = parse(sys.argv[1:])
    torch.set_num_threads(1)
    print(machine(), flush=True)
    try:
        with TemporaryDirectory() as folder:
            settings = prepare(Path(folder), Deployment("overload", DIMS, 1, arguments.items))
            for name, more in (("on", {}), ("off", UNLIMITED)):
                if arguments.only in {None, name}:
                    print(f"Limits {name}", flush=True)
                    with backcast_server(environment(settings, 1, **more)) as server:
                        measure(server, arguments)
    except Unmeasured as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def measure(server: Server, arguments: argparse.Namespace) -> None:
    """Print what one server makes of all steps."""
    ids = random_ids(arguments.items, max(BATCH, 50_000))
    rows = []
    for rate in _numbers(arguments.batches):
        with peak(server) as memory:
            step = asyncio.run(
                offer(
                    server.url,
                    ids,
                    batch=BATCH,
                    rate=rate,
                    singles=arguments.singles,
                    seconds=arguments.seconds,
                )
            )
        rows.append(batch_row(step, memory[-1]))
        say(" ".join(map(str, rows[-1])))
    print_table(
        (
            "batches/s",
            "offered",
            "served",
            "shed",
            "p50",
            "p99",
            "singles",
            "served",
            "p50 ms",
            "p99 ms",
            "peak MiB",
        ),
        rows,
    )
    rows = []
    for connections in _numbers(arguments.floods):
        with peak(server) as memory:
            tally = asyncio.run(
                flood(server.url, ids, connections=connections, seconds=arguments.seconds)
            )
        rows.append(flood_row(connections, tally, arguments.seconds, memory[-1]))
        say(" ".join(map(str, rows[-1])))
    print_table(
        ("singles from", "served/s", "shed/s", "other", "p50 ms", "p99 ms", "peak MiB"), rows
    )


def batch_row(step: Step, mib: float) -> list[object]:
    """Return a line of the table."""
    batches, singles = step.batches, step.singles
    return [
        f"{step.rate:g}",
        sum(batches.statuses.values()),
        batches.served,
        f"{batches.shed} {batches.other or ''}",
        f"{batches.milliseconds(50):,.0f}",
        f"{batches.milliseconds(99):,.0f}",
        sum(singles.statuses.values()),
        f"{singles.served} {singles.other or ''}",
        f"{singles.milliseconds(50):.1f}",
        f"{singles.milliseconds(99):.1f}",
        f"{mib:,.0f}",
    ]


def flood_row(connections: int, tally: Tally, seconds: float, mib: float) -> list[object]:
    """Return a line of the table."""
    return [
        connections,
        f"{tally.served / seconds:,.0f}",
        f"{tally.shed / seconds:,.0f}",
        f"{tally.other or ''}",
        f"{tally.milliseconds(50):.1f}",
        f"{tally.milliseconds(99):.1f}",
        f"{mib:,.0f}",
    ]


@contextmanager
def peak(server: Server) -> Iterator[list[float]]:
    """Yield a list that has, when the block has ended, the most MiB the server had resident."""
    found: list[float] = []
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # forget the peak so far
    yield found
    httpx2.get(f"{server.url}/livez")
    status = Path(f"/proc/{server.pid}/status").read_text()
    found.append(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


if __name__ == "__main__":
    sys.exit(main())
