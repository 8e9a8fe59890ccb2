"""Hostile input for as long as one likes, and figures: ``python -m tests.fuzz --minutes 10``.

A tenth of the time goes to each of the three callers of the HTTP interface, the rest to the readers
of bytes.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from backcast.cli.output import print_table, say
from tests import servers
from tests.fuzz.campaign import Outcome, attack
from tests.fuzz.document import Tally, fuzz
from tests.fuzz.targets import TARGETS
from tests.fuzz.world import serving

_CALLERS = ("admin", "read", "nobody")


def main() -> int:
    """Run as asked; return 1 where anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    seconds = 60 * asked.minutes
    logging.getLogger("service").setLevel(logging.ERROR)
    tallies = {caller: _call_as(caller, int(seconds / 10)) for caller in _CALLERS}
    share = 0.7 * seconds / len(TARGETS)
    outcomes = {
        name: attack(target, cases=10**12, seed=asked.seed, seconds=share)
        for name, target in TARGETS.items()
    }
    return _report(tallies, outcomes)


def _call_as(caller: str, seconds: int) -> Tally:
    """Try the document as one caller, on PostgreSQL and Redis of the run's own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        servers.postgres() as database,
        servers.redis() as store,
        serving(Path(folder), database_url=database, store_url=store) as world,
    ):
        key = {"admin": world.admin, "read": world.read}.get(caller)
        return fuzz(world.url, key, examples=100, seconds=max(1, seconds))


def _report(tallies: dict[str, Tally], outcomes: dict[str, Outcome]) -> int:
    operations = sorted({name for tally in tallies.values() for name in tally.operations})
    checks = sorted({name for tally in tallies.values() for name in tally.checks})
    rows = [[name, *(t.operations[name] for t in tallies.values())] for name in operations]
    total = [sum(t.operations.values()) for t in tallies.values()]
    print_table(["requests", *tallies], [*rows, ["all", *total]])
    rows = [[name, *(t.checks[name] for t in tallies.values())] for name in checks]
    print_table(["checks", *tallies], rows)
    rows = [[name, o.tried, o.accepted, len(o.failures)] for name, o in outcomes.items()]
    print_table(["reader", "contents", "accepted", "failures"], rows)
    failures = [
        *(f"{name}: {told}" for t in tallies.values() for name, told in t.failures.items()),
        *(f"{caller}: {error}" for caller, t in tallies.items() for error in t.errors),
        *(f"{name}: {told}" for name, o in outcomes.items() for told in o.failures.values()),
    ]
    say(f"{sum(total)} requests, {sum(o.tried for o in outcomes.values())} contents,")
    say(
        f"{sum(sum(t.checks.values()) for t in tallies.values())} checks, failures: {len(failures)}"
    )
    for failure in failures:
        say(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
