r"""Nothing is torn, wrong, lost or late: ``python benchmarks/soak.py --database-url … …``.

Real replicas, each a ``backcast serve`` of one worker, on a real PostgreSQL and a real Redis.
Readers ask them for vectors of random versions, in every format, one and many at a time, some of
them demanding one snapshot over many batches, and compare every vector with float64 arithmetic on
what the state S.d that the answer names must hold. Meanwhile versions are promoted, rolled back and
refreshed, ids upserted and erased, replicas and promoting processes killed, the Redis database
emptied and filled again, and the servers stopped for a while, where commands are given that do so.
A run of five minutes or more fails too where one of these never came about.

``make soak`` starts private servers and stops them now and then. On servers of your own, name an
empty database (``backcast db upgrade`` made its schema) and an empty Redis database; shell commands
that stop and start them are given in pairs:

    python benchmarks/soak.py --minutes 10 --database-url postgresql+psycopg://… \
      --store-url redis://… --stop-database 'docker stop pg' --start-database 'docker start pg'
"""

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from backcast.cli.output import print_table
from backcast.lifecycle import open_backcast
from backcast.settings import Settings
from backcast.versions import Scope
from benchmarks.measuring import machine
from benchmarks.serving_load import Unmeasured
from benchmarks.soak_acts import CONVERGED_S, Breaker, Changer, Outage, Switcher, Watcher
from benchmarks.soak_audit import audit
from benchmarks.soak_checker import Fault, Finding
from benchmarks.soak_ledger import Ledger
from benchmarks.soak_readers import ARROW, DATABASE, JSON, RAW, STORE, Field, Reader
from benchmarks.soak_replicas import Replica, replica_environment
from benchmarks.soak_tally import Absences, Tally
from benchmarks.soak_world import World, make_models, register

GRACE_S, TIMEOUT_S = 30.0, 3.0
SETTLE_S = 3.0
"""After a part is back, until whoever lost it has noticed."""

FORMATS = (JSON, ARROW, RAW)
_FOLLOW_S = 0.03

_ENOUGH_S = 300.0
"""In a run of this length everything comes about."""

_SWITCHES = ("promote", "refresh", "rollback")
_CHANGES = ("acknowledged upsert", "acknowledged erasure")
_FAULTS = (
    "kill -9 of a replica",
    "kill -9 of a command",
    "SIGSTOP of a replica",
    "flush of the store",
)


@dataclass(frozen=True)
class Plan:
    """What to run, for how long.

    Attributes:
        outages: servers that may be stopped: ``database``, ``store``.
        pause_s: about how long between two switches, and between two faults.
    """

    seconds: float
    database_url: str
    store_url: str
    replicas: int = 3
    readers: int = 3
    seed: int = 0
    pause_s: float = 2.0
    outages: Mapping[str, Outage] = field(default_factory=dict)


def soak(plan: Plan, folder: Path) -> Tally:
    """Run the soak in a folder of its own and return what was counted."""
    settings = Settings.load(
        home=folder,
        database_url=plan.database_url,
        artifacts_url=str(folder / "artifacts"),
        store_url=plan.store_url,
        grace_seconds=GRACE_S,
        operation_timeout=TIMEOUT_S,
        gate_coverage=0.0,  # vectors and maps are random
        gate_change=1e9,
    )
    ledger = Ledger(make_models(np.random.default_rng(plan.seed)))
    with ExitStack() as stack:
        backcast = stack.enter_context(open_backcast(settings))
        register(backcast, ledger.models)
        world = World(settings, backcast, ledger, np.random.default_rng([plan.seed, 1]))
        stack.callback(world.close)
        common = Field(
            world=world,
            replicas=[
                Replica(number, replica_environment(settings), folder)
                for number in range(plan.replicas)
            ],
            tally=Tally(),
            absences=Absences(SETTLE_S),
            headers={
                "Authorization": f"Bearer {backcast.registry.keys.create('soak', Scope.ADMIN)[1]}"
            },
            stopping=Event(),
        )
        breaker = Breaker(common, plan.outages, plan.seed + 1, plan.pause_s)
        watchers = [Watcher(common, replica) for replica in common.replicas]
        switcher = Switcher(common, settings, breaker.kill, plan.seed, plan.pause_s, watchers)
        switcher.start()
        stack.enter_context(_running(common.replicas))
        _run(plan, common, [switcher.run, breaker.run, *(watcher.run for watcher in watchers)])
        audit(common)
    return common.tally


@contextmanager
def _running(replicas: Sequence[Replica]) -> Iterator[None]:
    try:
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.wait(Event())
        yield
    finally:
        for replica in replicas:
            replica.stop()


def _run(plan: Plan, common: Field, disturbing: Sequence[Callable[[], None]]) -> None:
    acts: list[Callable[[], None]] = [
        partial(_follow, common),
        *disturbing,
        Changer(common, plan.seed + 2, plan.pause_s / 10).run,
        *(Reader(common, plan.seed + 3 + number).run for number in range(plan.readers)),
    ]
    with ThreadPoolExecutor(len(acts)) as pool:
        running = [pool.submit(act) for act in acts]
        ended, _ = wait(running, plan.seconds, FIRST_COMPLETED)
        common.stopping.set()
        _accuse_ended(common, ended)
    for act in running:
        if not isinstance(act.exception(), ValueError | AssertionError):
            act.result()


def _accuse_ended(common: Field, ended: "set[Future[None]]") -> None:
    for act in ended:
        if isinstance(error := act.exception(), ValueError | AssertionError):
            common.tally.accuse([Finding(Fault.WRONG, str(error))])


def _follow(common: Field) -> None:
    while not common.stopping.wait(_FOLLOW_S):
        try:
            common.world.follow()
        except SQLAlchemyError:  # the database is away
            continue


def report(tally: Tally, seconds: float) -> None:
    """Print what was counted."""
    rows: list[tuple[str, Any]] = [
        ("seconds", round(seconds)),
        ("requests verified", f"{tally.requests:,}"),
        ("vectors verified", f"{tally.vectors:,}"),
        *_lines("verified", tally.answers),
        *_lines("fault injected", tally.injected),
        *_lines("switch", tally.switches),
        *_lines("change", tally.changes),
        *_lines("error allowed", tally.allowed),
        ("replicas that followed a switch", len(tally.converged)),
        *_convergence(tally.converged),
        *((f"{fault} responses", tally.faults[fault]) for fault in Fault),
    ]
    print_table(("what", "figure"), rows)
    for example in tally.examples:
        print(example, file=sys.stderr)


def left_out(tally: Tally, plan: Plan) -> list[str]:
    """Return what never came about, of all that a run of some minutes is to see."""
    faults = [*_FAULTS, *(f"stop of the {part}" for part in plan.outages)]
    wanted: list[tuple[str, Counter[str], Sequence[str]]] = [
        ("verified", tally.answers, FORMATS),
        ("fault injected", tally.injected, faults),
        ("switch", tally.switches, _SWITCHES),
        ("change", tally.changes, _CHANGES),
    ]
    never = [
        f"{what}: {kind}"
        for what, counts, kinds in wanted
        for kind in kinds
        if not any(counted.startswith(kind) for counted in counts)
    ]
    return never if tally.converged else [*never, "replicas that followed a switch"]


def _lines(what: str, counts: "Counter[str]") -> list[tuple[str, str]]:
    return [(f"{what}: {kind}", f"{count:,}") for kind, count in sorted(counts.items())]


def _convergence(seconds: Sequence[float]) -> list[tuple[str, str]]:
    if not seconds:
        return []
    return [
        ("seconds until they followed, p95", f"{np.percentile(seconds, 95):.2f}"),
        (f"the same, longest (bound {CONVERGED_S:g})", f"{max(seconds):.2f}"),
    ]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="how long")
    parser.add_argument("--replicas", type=int, default=3, help="serving processes")
    parser.add_argument("--readers", type=int, default=3, help="threads that read")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two faults")
    parser.add_argument("--database-url", required=True, help="PostgreSQL, an empty registry")
    parser.add_argument("--store-url", required=True, help="Redis, an empty database")
    for part in (DATABASE, STORE):
        for act in ("stop", "start"):
            parser.add_argument(f"--{act}-{part}", metavar="COMMAND", help=f"{act}s the {part}")
    parsed = parser.parse_args(arguments)
    for name in ("minutes", "replicas", "readers", "pause"):
        if getattr(parsed, name) <= 0:
            parser.error(f"--{name} must be more than 0")
    for part in (DATABASE, STORE):
        if bool(getattr(parsed, f"stop_{part}")) != bool(getattr(parsed, f"start_{part}")):
            parser.error(f"--stop-{part} and --start-{part} come together")
    return parsed


def plan_of(parsed: argparse.Namespace) -> Plan:
    """Return the plan that a command line describes."""
    outages = {
        part: Outage(
            *(partial(_call, getattr(parsed, f"{act}_{part}")) for act in ("stop", "start"))
        )
        for part in (DATABASE, STORE)
        if getattr(parsed, f"stop_{part}")
    }
    return Plan(
        seconds=60 * parsed.minutes,
        database_url=parsed.database_url,
        store_url=parsed.store_url,
        replicas=parsed.replicas,
        readers=parsed.readers,
        seed=parsed.seed,
        pause_s=parsed.pause,
        outages=outages,
    )


def _call(command: str) -> None:
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


def run(plan: Plan) -> int:
    """Run a plan, print what was counted, and return the exit status."""
    with TemporaryDirectory(prefix="backcast-soak-") as folder:
        print(f"{machine()}. {plan.replicas} replicas, {plan.readers} readers, seed {plan.seed}.")
        started = time.monotonic()
        tally = soak(plan, Path(folder))
        report(tally, time.monotonic() - started)
    never = left_out(tally, plan) if plan.seconds >= _ENOUGH_S else []
    for what in never:
        print(f"never, in {plan.seconds:.0f} s: {what}", file=sys.stderr)
    return 0 if tally.clean and not never else 1


def main() -> int:
    """Run the soak, or say in one line why not."""
    try:
        return run(plan_of(parse(sys.argv[1:])))
    except Unmeasured as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
