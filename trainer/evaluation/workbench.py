"""What a benchmark's units do: make models, teach consumers, measure a method."""

import errno
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from statistics import fmean, pstdev
from textwrap import shorten
from typing import Any

import numpy as np
import orjson
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from backcast.devices import choose_device
from backcast.errors import BackcastError, DataError
from backcast.transforms import AffineMap, compose
from backcast.versions import Lineage
from trainer.archive import ArchivedModel
from trainer.data.dataset import Dataset, resolve_until
from trainer.evaluation.benchmark import Contender, Line, Plan
from trainer.evaluation.consumers import Consumers, train_consumers
from trainer.evaluation.results import Auc, Run
from trainer.evaluation.tasks import TASKS, Timeline
from trainer.features import Vocabulary
from trainer.fitting import FitResult
from trainer.graph import Graph, Operator, mean_over_neighbours
from trainer.methods.base import Trained, train_alone
from trainer.model import GraphSAGE, embed
from trainer.ranking import recall_at_k
from trainer.split import Edges, Split, make_split
from trainer.step import Step

Vectors = tuple[Tensor, Tensor]
_RUN: TypeAdapter[Run] = TypeAdapter(Run)
_BYTES_KEPT = 2**31
"""Vectors that are kept from one measurement to the next, in each process."""


@lru_cache(maxsize=1)
def workbench(plan: Plan, seed: int) -> "Workbench":
    """Return the workbench of a plan and a seed, kept from one unit to the next."""
    return Workbench(plan, seed)


class Workbench:
    """One training seed of a plan."""

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.seed = plan, seed
        self.dataset = Dataset.read(plan.data)
        self.device = choose_device(plan.training.device)
        self.moments = [resolve_until(self.dataset, f) for f in plan.fractions]
        self.timeline = Timeline(self.dataset, self.moments, plan.training.protocol)
        self._vectors: dict[tuple[str, int, int], Vectors] = {}

    # Making models

    def make_first(self, folder: Path) -> None:
        """Train M_0, which all methods share."""
        trained = train_alone(self._step(0, None, {}, []))
        with _new(folder / "0") as new:
            _write_trained(new, trained)

    def make_line(self, line: Line, folder: Path) -> None:
        """Train M_1 .. M_K of a line; each version is kept as soon as it is made."""
        models = [self._first()]
        chain: dict[int, AffineMap] = {0: AffineMap.identity(models[0].archived.model.width)}
        steps: dict[tuple[int, int], AffineMap] = {}
        for k in range(1, self.plan.versions):
            step = self._step(k, line.lam, chain, models)
            if not (folder / str(k)).exists():
                trained = line.models.train(step)
                with _new(folder / str(k)) as new:
                    _write_trained(new, trained)
            models.append(self._read_trained(folder / str(k)))
            joint_map = models[k].joint_map
            if joint_map is not None:
                steps[k, k - 1] = joint_map
                chain = _composed(k, joint_map.cols, steps)

    def _first(self) -> Trained:
        return self._read_trained(self.plan.work / f"seed-{self.seed}/models/first/0")

    def _read_trained(self, folder: Path) -> Trained:
        trained = read_trained(folder)
        trained.archived.model.to(self.device)
        return trained

    @lru_cache(maxsize=16)  # noqa: B019
    def models(self, line: Line) -> Sequence[Trained]:
        """Return M_0 .. M_K of a line that is made."""
        folder = self.plan.work / f"seed-{self.seed}/models/{line.name}"
        later = [self._read_trained(folder / str(k)) for k in range(1, self.plan.versions)]
        return [self._first(), *later]

    def _step(
        self,
        k: int,
        lam: float | None,
        chain: Mapping[int, AffineMap],
        models: Sequence[Trained],
    ) -> Step:
        changes: dict[str, Any] = {"seed": self.seed}
        if lam is not None:
            changes["alignment_weight"] = lam
        return Step(
            number=k,
            dataset=self.dataset,
            split=self._split(k),
            config=self.plan.training.model_copy(update=changes),
            device=self.device,
            parent=k - 1 if k else None,
            ancestors=range(k - 1, -1, -1),
            chain=chain,
            load=lambda version: models[version].archived,
            on_epoch=lambda _report: None,
        )

    @cache  # noqa: B019
    def _split(self, k: int) -> Split:
        protocol = self.plan.training.protocol
        return make_split(self.dataset, self.moments[k], self.moments[k + 1], protocol)

    # Teaching consumers

    def teach(self, line: Line, version: int, folder: Path) -> None:
        """Train the consumers of a version on its true vectors."""
        consumers = train_consumers(
            self.timeline,
            version,
            lambda k: self.true(line, version, k),
            self.plan.consumers,
        )
        with _new(folder) as new:
            save_file(consumers.state(), new / "consumers.safetensors")
            (new / "about.json").write_bytes(orjson.dumps(consumers.about()))

    def _consumers(self, line: Line, version: int) -> Consumers:
        owner = "first" if version == 0 else line.name
        folder = self.plan.work / f"seed-{self.seed}/consumers/{owner}-{version}"
        with _reading(folder / "about.json") as file:
            about = orjson.loads(file.read_bytes())
        with _reading(folder / "consumers.safetensors") as file:
            return Consumers.load(self.timeline, about, load_file(file))

    # Vectors that are measured

    def true(self, line: Line, version: int, k: int) -> Vectors:
        """Return z_j of a line on the version-k graph: users (U, D_j) and items (I, D_j)."""
        owner = "first" if version == 0 else line.name
        key = (owner, version, k)
        if key not in self._vectors:
            made = self._first() if version == 0 else self.models(line)[version]
            graph = self._graph(k, made.archived.vocabulary)
            self._vectors[key] = embed(made.archived.model, graph)
            while len(self._vectors) > 1 and _bytes(self._vectors.values()) > _BYTES_KEPT:
                del self._vectors[next(iter(self._vectors))]
        return self._vectors[key]

    def _graph(self, k: int, vocabulary: Vocabulary) -> Graph:
        """Return the version-k graph: what vectors are measured on."""
        mean, users, items = self._mean(k)
        return Graph.build(mean, vocabulary.encode(self.dataset, items), users).to(self.device)

    @cache  # noqa: B019
    def _mean(self, k: int) -> tuple[Operator, int, int]:
        edges, users, items = self._seen(k)
        return mean_over_neighbours(edges, users, items), users, items

    def _seen(self, k: int) -> tuple[Edges, int, int]:
        """Return the edges of the version-k graph and how many users and items are in it.

        As published, new users' edges after t_k that are not to be predicted are in it; the strict
        protocol sees what was known at t_k.
        """
        if self.timeline.protocol == "paper":
            split = self._split(k)
            return split.train, split.users, split.items
        known, moment = self.timeline.edges(k), self.moments[k]
        edges = Edges(self.dataset.users[:known], self.dataset.items[:known])
        return edges, self.dataset.users_known(moment), self.dataset.items_known(moment)

    # Measuring

    def measure(self, row: Contender, folder: Path) -> None:
        """Measure a method: its maps, and the three metrics for every (k, j)."""
        composed = self.composed(row)
        models = self.models(row.line)
        grids: dict[str, list[list[float]]] = {name: [] for name in _GRIDS}
        aucs: dict[str, _Table] = {task.name: _Table() for task in TASKS}
        consumers = {j: self._consumers(row.line, j) for j in self.plan.consumer_versions}
        for k in range(self.plan.versions):
            for grid in grids.values():
                grid.append([])
            for table in aucs.values():
                table.start_row()
            latest = self.true(row.line, k, k)
            for j in range(k + 1):
                true = self.true(row.line, j, k)
                found = composed[k][j] if composed else None
                served = true if found is None else tuple(_apply(found, z) for z in latest)
                for name, value in _compare(served, true, found).items():
                    grids[name][k].append(value)
                if j in consumers:
                    compatible = consumers[j].auc(k, *served)
                    exact = consumers[j].auc(k, *true)
                    for task, table in aucs.items():
                        table.add(compatible.get(task), exact.get(task))
                else:
                    for table in aucs.values():
                        table.add(None, None)
        run = Run(
            seed=self.seed,
            recall=[self._recall(models[k], k) for k in range(self.plan.versions)],
            auc={task: table.auc() for task, table in aucs.items()},
            epochs=[made.fit.epoch for made in models],
            seconds=[made.fit.seconds for made in models],
            **grids,
        )
        with _new(folder) as new:
            (new / "run.json").write_bytes(_RUN.dump_json(run))

    def _recall(self, made: Trained, k: int) -> float:
        """Return Recall@50 of M_k on what it is to predict after t_k."""
        test = self._split(k).test
        assert test is not None
        if self.timeline.protocol == "paper":
            vectors = embed(made.archived.model, self._graph(k, made.archived.vocabulary))
        else:
            graph = Graph.of(
                self.dataset, test.visible, test.users, test.items, made.archived.vocabulary
            )
            vectors = embed(made.archived.model, graph.to(self.device))
        return recall_at_k(*vectors, test)

    def composed(self, row: Contender) -> list[dict[int, AffineMap]] | None:
        """Return W_k^j by k and j; None where all vectors are kept."""
        strategy = row.method.maps
        if strategy is None:
            return None
        models = self.models(row.line)
        chain = {0: AffineMap.identity(models[0].archived.model.width)}
        steps: dict[tuple[int, int], AffineMap] = {}
        by_version = [chain]
        for k in range(1, self.plan.versions):
            step = self._step(k, row.lam, chain, models)
            maps = strategy.fit(step, models[k])
            steps |= {(k, j): found for j, found in maps.items()}
            chain = _composed(k, models[k].archived.model.width, steps)
            by_version.append(chain)
        return by_version


_GRIDS = ("error", "error_users", "error_items", "norm", "amplification", "condition")


def _compare(served: Sequence[Tensor], true: Vectors, found: AffineMap | None) -> dict[str, float]:
    errors = [(a.double() - b.double()).norm(dim=1) for a, b in zip(served, true, strict=True)]
    return {
        "error": float(torch.cat(errors).mean()),
        "error_users": float(errors[0].mean()),
        "error_items": float(errors[1].mean()),
        "norm": float(torch.cat(true).norm(dim=1).mean()),
        "amplification": 1.0 if found is None else found.norm,
        "condition": 1.0 if found is None else float(np.linalg.cond(found.weight)),
    }


def _bytes(kept: Iterable[Vectors]) -> int:
    return sum(vectors.nbytes for pair in kept for vectors in pair)


def _apply(found: AffineMap, z: Tensor) -> Tensor:
    weight = torch.from_numpy(found.weight).to(z)
    bias = None if found.bias is None else torch.from_numpy(found.bias).to(z)
    return torch.nn.functional.linear(z, weight, bias)


def _composed(k: int, dim: int, steps: Mapping[tuple[int, int], AffineMap]) -> dict[int, AffineMap]:
    parents = {version: version - 1 if version else None for version in range(k + 1)}
    return compose(k, dim, Lineage(parents), steps)


class _Table:
    """The AUCs of one task, row by row."""

    def __init__(self) -> None:
        self._columns: tuple[list[list[float | None]], ...] = ([], [], [])

    def start_row(self) -> None:
        for column in self._columns:
            column.append([])

    def add(self, compatible: Sequence[float] | None, true: Sequence[float] | None) -> None:
        values = (
            fmean(compatible) if compatible else None,
            fmean(true) if true else None,
            pstdev(compatible) if compatible else None,
        )
        for column, value in zip(self._columns, values, strict=True):
            column[-1].append(value)

    def auc(self) -> Auc:
        return Auc(*self._columns)


def read_run(folder: Path) -> Run:
    """Read what :meth:`Workbench.measure` left."""
    with _reading(folder / "run.json") as file:
        return _RUN.validate_json(file.read_bytes())


# Files of finished units


@contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """Give a draft that appears as ``folder`` when all is written."""
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    draft.mkdir(parents=True)
    try:
        yield draft
        _place(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _place(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError as error:
        # Another run of the same plan was faster, and its result is the same.
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise


_DAMAGE = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError),
    *(SafetensorError, BackcastError),
)


@contextmanager
def _reading(file: Path) -> Iterator[Path]:
    """Give a file of earlier work; where it cannot be read, say which, and what to do about it."""
    try:
        yield file
    except _DAMAGE as error:
        raise DataError(
            f"{file} is damaged: {shorten(str(error), 160).rstrip('.')}. "
            f"Delete the folder {file.parent}; the same command makes it again."
        ) from error


def read_trained(folder: Path) -> Trained:
    """Read a version of a line: M_k on the CPU, its trained map, and how training went."""
    with _reading(folder / "about.json") as file:
        about = orjson.loads(file.read_bytes())
        vocabulary = Vocabulary.from_document(about["vocabulary"])
        model = GraphSAGE(about["width"], about["layers"], vocabulary.sizes)
        fit = FitResult(about["epoch"], about["recall"], about["seconds"])
    with _reading(folder / "model.safetensors") as file:
        model.load_state_dict(load_file(file))
    with _reading(folder / "map.safetensors") as file:
        arrays = {name: tensor.numpy() for name, tensor in load_file(file).items()}
        joint_map = AffineMap(arrays["weight"], arrays.get("bias")) if arrays else None
    archived = ArchivedModel(model.eval().requires_grad_(False), vocabulary)
    return Trained(archived, joint_map, fit)


def _write_trained(folder: Path, trained: Trained) -> None:
    model = trained.archived.model
    save_file({n: t.cpu() for n, t in model.state_dict().items()}, folder / "model.safetensors")
    arrays = {} if trained.joint_map is None else vars(trained.joint_map)
    given = {n: a for n in ("weight", "bias") if (a := arrays.get(n)) is not None}
    save_file({n: torch.from_numpy(a.copy()) for n, a in given.items()}, folder / "map.safetensors")
    about = {
        "width": model.width,
        "layers": model.layers,
        "vocabulary": trained.archived.vocabulary.document(),
        "epoch": trained.fit.epoch,
        "recall": trained.fit.recall,
        "seconds": trained.fit.seconds,
    }
    (folder / "about.json").write_bytes(orjson.dumps(about))
