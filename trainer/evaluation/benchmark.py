"""The benchmark: every method on the same data, splits, seeds and first model.

The work is cut into units, each of which leaves its result in the output folder when it is done:
the models of a line, the consumers of a version, the measurements of a method. A run that is killed
goes on after the last finished model or unit when it is started again with the same settings.
"""

import hashlib
import itertools
import math
import os
import platform
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version as library_version
from itertools import pairwise
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import fmean
from threading import Thread
from typing import Any, Literal

import orjson
import torch

from backcast.devices import choose_device
from backcast.errors import ConfigError, DataError
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset, resolve_until
from trainer.evaluation.consumers import ConsumerConfig
from trainer.evaluation.results import MethodResult, Results, Run, task_auc
from trainer.evaluation.tasks import TASKS
from trainer.methods import Method, method
from trainer.methods.base import ModelStrategy
from trainer.split import holdout

FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FRONTIER_LAMBDAS = (0.01, 0.1, 0.3, 1.0, 4.0, 16.0, 32.0)
"""From next to no alignment to twice the paper's."""

_LITTER_AFTER = 3600.0
"""Seconds after which a draft is taken for one whose process was killed."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        data: data set folder.
        out: output folder; unfinished work is kept in ``work`` under it.
        preset: the name of the training preset, for the record.
        training: how to train; its seed and λ are replaced by those below.
        consumers: how to train consumers.
        methods: names of methods. Keep-All, which all others are measured against, is added.
        seeds: training seeds.
        lambdas: λs of the joint methods, empty for each method's own.
        consumed: versions that have consumers, None for all. Those of version 0 are shared by all
            methods; later ones are trained for each, and take most of the time.
        fractions: t_0 .. t_{K+1}.
    """

    data: Path
    out: Path
    preset: str
    training: TrainConfig
    consumers: ConsumerConfig
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    lambdas: tuple[float, ...]
    consumed: tuple[int, ...] | None = None
    fractions: tuple[float, ...] = FRACTIONS

    def __post_init__(self) -> None:
        """Refuse what cannot be measured; put the methods into the table's order."""
        lists = {"methods": self.methods, "training seeds": self.seeds, "λs": self.lambdas}
        for what, values in lists.items():
            if (not values and what != "λs") or len(set(values)) < len(values):
                raise ConfigError(
                    f"Benchmark: expected one or more {what}, all different; got {list(values)}."
                )
        if not all(0 <= seed < 2**63 for seed in self.seeds):
            raise ConfigError(f"Benchmark: expected seeds of 0 or more; got {list(self.seeds)}.")
        if not all(0 <= lam < math.inf for lam in self.lambdas):
            raise ConfigError(f"Benchmark: expected λs of 0 or more; got {list(self.lambdas)}.")
        named = {"keep-all": method("keep-all"), **{name: method(name) for name in self.methods}}
        ordered = sorted(named.values(), key=lambda m: m.place)
        object.__setattr__(self, "methods", tuple(m.name for m in ordered))

    @property
    def versions(self) -> int:
        """How many versions there are: K + 1."""
        return len(self.fractions) - 1

    @property
    def consumer_versions(self) -> Sequence[int]:
        """The versions that consumers are trained for: the last has nothing to be tested on."""
        every = range(self.versions - 1)
        return every if self.consumed is None else [j for j in every if j in self.consumed]

    @cached_property
    def work(self) -> Path:
        """Where finished units of exactly these settings lie."""
        settings = {
            "training": self.training.model_dump(mode="json", exclude={"seed", "alignment_weight"}),
            "consumers": asdict(self.consumers),
            "fractions": self.fractions,
            "consumed": list(self.consumer_versions),
            "data": Dataset.read(self.data).fingerprint,
            "torch": torch.__version__,
            "backcast": library_version("backcast"),
        }
        return self.out / "work" / digest(settings)

    def rows(self) -> Iterator["Contender"]:
        """Yield the rows of the table."""
        for name in self.methods:
            chosen = method(name)
            own = chosen.models.default_lambda
            for lam in (None,) if own is None else self.lambdas or (own,):
                yield Contender(chosen, lam)


@dataclass(frozen=True)
class Contender:
    """A method at a λ (None where it has none)."""

    method: Method
    lam: float | None

    @property
    def name(self) -> str:
        """A name for people."""
        return self.method.name if self.lam is None else f"{self.method.name}, λ = {self.lam:g}"

    @property
    def file(self) -> str:
        """A name for files; another one where the method is declared in another way."""
        declared = (self.line.name, repr(self.method.maps))
        return f"{self.method.name}-{digest([*declared, self.lam])}"

    @property
    def line(self) -> "Line":
        """The models it shares with other contenders."""
        return Line(self.method.models, self.lam)


@dataclass(frozen=True)
class Line:
    """Models M_0 .. M_K that come about in the same way.

    Attributes:
        models: how.
        lam: the λ they depend on, if they do.
    """

    models: ModelStrategy
    lam: float | None

    @property
    def name(self) -> str:
        """A name for files, the same for equal lines."""
        return f"{self.kind.lower()}-{digest(repr(self))}"

    @property
    def kind(self) -> str:
        """How the models come about, in a word."""
        return type(self.models).__name__

    def __str__(self) -> str:
        lam = "" if self.lam is None else f", λ = {self.lam:g}"
        return f"{self.kind} models{lam}"


def digest(value: Any) -> str:
    """Return a short name for ``value``, a JSON document."""
    text = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(text).hexdigest()[:12]


Kind = Literal["first model", "models", "consumers", "measurement"]


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done or not.

    Attributes:
        version: of consumers, the version they are for.
        contender: of a measurement, what is measured.
    """

    kind: Kind
    seed: int
    line: Line
    version: int = 0
    contender: Contender | None = None

    @property
    def key(self) -> str:
        """Where its result lies, below the plan's ``work``."""
        seed = f"seed-{self.seed}"
        if self.kind == "measurement":
            assert self.contender is not None
            return f"{seed}/measured/{self.contender.file}"
        if self.kind == "consumers":
            # All lines share the first model, so its consumers too.
            owner = "first" if self.version == 0 else self.line.name
            return f"{seed}/consumers/{owner}-{self.version}"
        return f"{seed}/models/{'first' if self.kind == 'first model' else self.line.name}"

    @property
    def pace(self) -> tuple[str, str]:
        """What takes about equally long has the same pace."""
        if self.kind == "measurement":
            assert self.contender is not None
            return self.kind, type(self.contender.method.maps).__name__
        return self.kind, self.line.kind if self.kind == "models" else ""

    def __str__(self) -> str:
        what = {
            "first model": "the first model",
            "models": str(self.line),
            "consumers": f"consumers of version {self.version}",
            "measurement": self.contender.name if self.contender else "",
        }[self.kind]
        return f"seed {self.seed}, {what}"


def default_processes(device: str) -> int:
    """Return one process a core, or one in all for the models of one GPU."""
    return 1 if choose_device(device).type == "cuda" else os.cpu_count() or 1


def phases(plan: Plan) -> list[list[Unit]]:
    """Return all units; those of a phase need only what earlier phases made."""
    rows = list(plan.rows())
    lines = list(dict.fromkeys(row.line for row in rows))
    alone = Contender(method("keep-all"), None).line
    first = [Unit("first model", seed, alone) for seed in plan.seeds]
    models = [Unit("models", seed, line) for seed in plan.seeds for line in lines]
    consumers = {
        unit.key: unit
        for seed, line, version in itertools.product(plan.seeds, lines, plan.consumer_versions)
        for unit in [Unit("consumers", seed, line, version)]
    }
    measured = [
        Unit("measurement", seed, row.line, contender=row) for seed in plan.seeds for row in rows
    ]
    return [first, models, list(consumers.values()), measured]


def count_units(plan: Plan) -> int:
    """Return how many units there are in all."""
    return sum(len(phase) for phase in phases(plan))


Told = Callable[[int, int, str], None]
"""Called with units done, units in all, and a few words that include the time left."""


def run(plan: Plan, *, processes: int, told: Told) -> Results:
    """Do what is not done yet and return all results.

    With more than one process each computes on its share of the threads; results do not depend on
    the number of processes but, in the last bits, on the threads of each. Two runs of one plan at
    the same time do the same work twice and leave the same files.

    Raises:
        ConfigError: the output folder cannot be written; a worker process was killed.
        DataError: the data do not divide into the versions; a file of earlier work is damaged.
    """
    _check_data(plan)
    _make_folder(plan)
    work = phases(plan)
    clock = Clock([unit for phase in work for unit in phase], processes)
    started = time.perf_counter()
    with _workers(processes) as each:
        for phase in work:
            left = []
            for unit in phase:
                if is_done(plan, unit):
                    clock.skip(unit)
                else:
                    left.append(unit)
            told(clock.done, clock.total, clock.note())
            for unit, seconds in each(plan, left):
                clock.took(unit, seconds)
                told(clock.done, clock.total, " · ".join(filter(None, (str(unit), clock.note()))))
    return collect(plan, None if clock.skipped else time.perf_counter() - started)


def _check_data(plan: Plan) -> None:
    dataset = Dataset.read(plan.data)
    edges = [dataset.edges_until(resolve_until(dataset, share)) for share in plan.fractions]
    for k, (start, stop) in enumerate(pairwise(edges)):
        if holdout(dataset, start, stop) is None:
            raise DataError(
                f"{plan.data} is too small for a benchmark of {plan.versions} versions: of its "
                f"{len(dataset.users)} interactions, the {stop - start} between "
                f"t_{k} = {plan.fractions[k]:g} and t_{k + 1} = {plan.fractions[k + 1]:g} hold "
                "none that could be predicted."
            )


def _make_folder(plan: Plan) -> None:
    try:
        plan.work.mkdir(parents=True, exist_ok=True)
        probe = plan.work / f".{os.getpid()}"
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError as error:
        raise ConfigError(
            f"{plan.out} is no folder that can be written to: {error.strerror}. "
            "Name another one with --out."
        ) from error
    for draft in plan.work.glob("seed-*/**/.*"):
        if time.time() - draft.stat().st_mtime > _LITTER_AFTER:
            shutil.rmtree(draft, ignore_errors=True)


def is_done(plan: Plan, unit: Unit) -> bool:
    """Tell whether a unit's result is there, whole: folders appear when all is written."""
    folder = _path(plan, unit)
    if unit.kind == "first model":
        return (folder / "0").exists()
    if unit.kind == "models":
        return all((folder / str(k)).exists() for k in range(1, plan.versions))
    return folder.exists()


class Clock:
    """How much is done, and about how long the rest takes.

    Units of one pace are expected to take as long as those of it that are finished, and the others
    what is guessed for their kind, on the scale of the slowest pace known.
    """

    def __init__(self, units: Sequence[Unit], processes: int) -> None:
        self.total, self.done, self.skipped = len(units), 0, 0
        self._left = Counter(unit.pace for unit in units)
        self._took: dict[tuple[str, str], list[float]] = {}
        self._processes = processes

    def skip(self, unit: Unit) -> None:
        """Count a unit that was done before."""
        self.skipped += 1
        self._count(unit)

    def took(self, unit: Unit, seconds: float) -> None:
        """Count a unit that is finished now."""
        self._took.setdefault(unit.pace, []).append(seconds)
        self._count(unit)

    def _count(self, unit: Unit) -> None:
        self.done += 1
        self._left[unit.pace] -= 1

    def seconds_left(self) -> float | None:
        """Return about how long the rest takes; None while nothing is known."""
        if not self._took:
            return None
        known = {pace: fmean(took) for pace, took in self._took.items()}
        scale = max(seconds / _GUESSES[pace[0]] for pace, seconds in known.items())
        expected = sum(
            count * known.get(pace, scale * _GUESSES[pace[0]]) for pace, count in self._left.items()
        )
        return expected / max(1, min(self._processes, self.total - self.done))

    def note(self) -> str:
        """Return the time left in words; nothing while it is unknown or when all is done."""
        left = self.seconds_left()
        if left is None or self.done == self.total:
            return ""
        minutes = round(left / 60)
        if minutes >= 90:
            return f"about {minutes // 60} h {minutes % 60} min left"
        return f"about {minutes} min left" if left >= 90 else f"about {left:.0f} s left"


_GUESSES = {"first model": 1.0, "models": 5.0, "consumers": 2.0, "measurement": 0.2}
"""How long a unit takes, in first models, before any of its pace is finished."""


Each = Callable[[Plan, Sequence[Unit]], Iterator[tuple[Unit, float]]]


@contextmanager
def _workers(processes: int) -> Iterator[Each]:
    """Give a function that does units in any order and yields each with its seconds."""
    if processes == 1:
        yield lambda plan, units: ((unit, perform(plan, unit)) for unit in units)
        return
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_start, initargs=(threads,)
    ) as pool:

        def each(plan: Plan, units: Sequence[Unit]) -> Iterator[tuple[Unit, float]]:
            with _interrupts_held_back():
                futures = {pool.submit(perform, plan, unit): unit for unit in units}
            for future in as_completed(futures):
                yield futures[future], future.result()

        try:
            yield each
        except BaseException as error:
            # Whatever is not finished is done again next time; nothing waits for it.
            for worker in list((pool._processes or {}).values()):
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ConfigError(
                    "A worker process was killed, perhaps for want of memory. The same command "
                    f"goes on from here; give it fewer --processes than {processes}."
                ) from error
            raise


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C reaches this process afterwards, and those started meanwhile never."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with a parent that was killed: without it this process would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def perform(plan: Plan, unit: Unit) -> float:
    """Do one unit, leave its result, and return the seconds it took."""
    from trainer.evaluation.workbench import workbench

    started = time.perf_counter()
    bench = workbench(plan, unit.seed)
    folder = _path(plan, unit)
    if unit.kind == "first model":
        bench.make_first(folder)
    elif unit.kind == "models":
        bench.make_line(unit.line, folder)
    elif unit.kind == "consumers":
        bench.teach(unit.line, unit.version, folder)
    else:
        assert unit.contender is not None
        bench.measure(unit.contender, folder)
    return time.perf_counter() - started


def _path(plan: Plan, unit: Unit) -> Path:
    return plan.work / unit.key


def collect(plan: Plan, seconds: float | None) -> Results:
    """Read the measurements of a plan whose units are all done.

    Args:
        plan: what was measured.
        seconds: how long all of it took; None where it was not done in one go.
    """
    dataset = Dataset.read(plan.data)
    results = Results(
        dataset=dataset.name,
        users=len(dataset.user_ids),
        items=len(dataset.item_ids),
        interactions=len(dataset.users),
        fingerprint=dataset.fingerprint,
        preset=plan.preset,
        protocol=plan.training.protocol.value,
        times=plan.fractions,
        machine=_machine(),
        config={
            "training": plan.training.model_dump(mode="json", exclude={"seed", "alignment_weight"}),
            "consumers": asdict(plan.consumers),
            "seeds": plan.seeds,
            "lambdas": plan.lambdas,
            **({} if seconds is None else {"seconds": round(seconds, 1)}),
        },
        methods=[],
    )
    return replace(results, methods=[_method_result(plan, row) for row in plan.rows()])


def _method_result(plan: Plan, row: Contender) -> MethodResult:
    from trainer.evaluation.workbench import read_run

    units = [Unit("measurement", seed, row.line, contender=row) for seed in plan.seeds]
    runs: Sequence[Run] = [read_run(_path(plan, unit)) for unit in units]
    chosen = row.method
    return MethodResult(
        name=chosen.name,
        title=chosen.title,
        lam=row.lam,
        stores_all=chosen.maps is None,
        summary=chosen.summary,
        runs=runs,
    )


def untested_tasks(results: Results) -> list[str]:
    """Return the consumer tasks that the data has no examples of both classes for, at any k > 0."""
    tested = {
        task
        for found in results.methods
        for run in found.runs
        for task, auc in run.auc.items()
        if task_auc(auc, true=True) is not None
    }
    return [task.name for task in TASKS if task.name not in tested]


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{device}, {os.cpu_count()} cores, torch {torch.__version__}"
