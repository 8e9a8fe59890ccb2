"""Quality over time, published recipe and fast one: ``python benchmarks/recipes.py --data DIR``.

Version k is trained by both recipes with the same code, the same data and the same seeds: alone,
and with BC-Aligner at the published λ. Its ancestors come from the published recipe and are shared.
Every few epochs training stops, off the clock, for Recall@50 on what comes after t_k
(protocol=paper: the epoch is chosen on it too, as published) and for the alignment error: the mean
over users and items of ‖z̃_0 − z_0‖₂, z_0 being M_0 on version k's graph. What a recipe ends with is
its best epoch, chosen as in training: where a map is trained or weights are averaged, among the
later ones only.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from backcast.alignment import AlignmentLoss, BackwardTransformation, alignment_gram
from backcast.cli.output import print_table
from backcast.closed_form import least_squares
from backcast.transforms import AffineMap
from benchmarks.measuring import machine
from benchmarks.problems import seeded
from trainer.archive import ArchivedModel
from trainer.config import Protocol, TrainConfig
from trainer.data.dataset import Dataset, resolve_until
from trainer.evaluation.benchmark import FRACTIONS
from trainer.evaluation.drawing import Picture, drawing, head, look_of
from trainer.fitting import EpochReport, JointAlignment, Selection, first_selected, fit
from trainer.methods import make_version, method
from trainer.model import GraphSAGE, embed
from trainer.split import make_split
from trainer.step import Step

PUBLISHED, FAST = "published", "fast"
ALONE, ALIGNED = "Independent", "BC-Aligner"
LAMBDA = 16.0


@dataclass(frozen=True)
class Point:
    """A look at a model during its training.

    Attributes:
        seconds: of training until then, evaluations left out.
        recall: Recall@50.
        error: alignment error with the map trained jointly, None without one.
        refitted: alignment error with the map to the parent refitted by least squares.
    """

    epoch: int
    seconds: float
    recall: float
    error: float | None
    refitted: float | None


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        first_selected: no epoch before is chosen.
        norm: mean ‖z_0‖, None for version 0.
    """

    model: str
    recipe: str
    seed: int
    first_selected: int
    norm: float | None
    points: Sequence[Point]

    @property
    def seconds(self) -> float:
        """How long all of it took."""
        return self.points[-1].seconds

    @property
    def best(self) -> Point:
        """Where it is left."""
        chosen = [point for point in self.points if point.epoch >= self.first_selected]
        return max(chosen, key=lambda point: point.recall)

    def seconds_until(self, recall: float) -> float | None:
        """Return when it first reached a Recall@50 at which it may be left, None if never."""
        for point in self.points:
            if point.epoch >= self.first_selected and point.recall >= recall:
                return point.seconds
        return None


def config_of(recipe: str, seed: int, arguments: argparse.Namespace) -> TrainConfig:
    """Return the training settings of a recipe."""
    return TrainConfig.load(
        "small",
        recipe=recipe,
        protocol=Protocol.PAPER,
        alignment_weight=LAMBDA,
        seed=seed,
        epochs=arguments.epochs,
        evaluate_every=arguments.every,
        device="cpu",
    )


Chain = Mapping[int, AffineMap]


def step_of(
    dataset: Dataset,
    version: int,
    config: TrainConfig,
    models: Sequence[ArchivedModel],
    chain: Chain,
) -> Step:
    """Return the making of a version whose ancestors are made."""
    until, horizon = (resolve_until(dataset, f) for f in FRACTIONS[version : version + 2])
    return Step(
        number=version,
        dataset=dataset,
        split=make_split(dataset, until, horizon, config.protocol),
        config=config,
        device=torch.device("cpu"),
        parent=version - 1 if version else None,
        ancestors=range(version - 1, -1, -1),
        chain=chain,
        load=models.__getitem__,
        on_epoch=lambda _report: None,
    )


def ancestors(
    dataset: Dataset, version: int, config: TrainConfig
) -> tuple[Sequence[ArchivedModel], Chain]:
    """Make M_0 .. M_{k-1}, each BC-aligned to the one before; return them and W_{k-1}^j by j."""
    models: list[ArchivedModel] = []
    chain: dict[int, AffineMap] = {}
    for k in range(version):
        made = make_version(method("bc-aligner"), step_of(dataset, k, config, models, chain))
        models.append(made.trained.archived)
        chain = {j: older.after(made.maps[k - 1]) for j, older in chain.items()}
        chain[k] = AffineMap.identity(models[k].model.width)
    return models, chain


@dataclass(frozen=True, eq=False)
class Timed(Selection):
    """A selection that takes down how long looking took."""

    away: list[float]

    def recall(self, model: GraphSAGE) -> float:
        """Return Recall@50."""
        started = time.perf_counter()
        found = super().recall(model)
        self.away.append(time.perf_counter() - started)
        return found


class Watch:
    """Looks at what is evaluated; its looking does not count as training time."""

    def __init__(self, step: Step, joint: JointAlignment | None) -> None:
        selection = step.selection(step.vocabulary)
        assert selection is not None
        self.selection = Timed(selection.holdout, selection.graph, [])
        self.joint = joint
        # W_{k-1}^0, z_{k-1} and z_0, the vectors on version k's graph
        self.older = None
        if step.parent is not None:
            self.older = step.chain[0], vectors_of(step, step.parent), vectors_of(step, 0)
        self.points: list[Point] = []

    @property
    def norm(self) -> float | None:
        """Mean ‖z_0‖, None for version 0."""
        return None if self.older is None else mean_length(self.older[2])

    def look(self, report: EpochReport) -> None:
        """Take down recall and alignment error."""
        if report.recall is None:
            return
        started = time.perf_counter()
        error = refitted = None
        if self.older is not None:
            chain, parent, first = self.older
            model = cast("GraphSAGE", report.kept[0])
            newer = torch.cat(embed(model, self.selection.graph)).numpy()
            refitted = mean_length(chain.after(least_squares(newer, parent))(newer) - first)
            if self.joint is not None:
                error = mean_length(chain.after(map_of(report.kept[1]))(newer) - first)
        seconds = report.seconds - sum(self.selection.away)
        self.points.append(Point(report.epoch, seconds, report.recall, error, refitted))
        self.selection.away.append(time.perf_counter() - started)


def mean_length(vectors: NDArray[np.float64]) -> float:
    """Return the mean length of vectors (n, D)."""
    return float(np.linalg.norm(vectors, axis=1).mean())


def vectors_of(step: Step, version: int) -> NDArray[np.float64]:
    """Return z_j: M_j on version k's graph, (U + I, D_j)."""
    found = step.older(version)
    assert found is not None
    return found.to(torch.float64).numpy()


def map_of(transformation: nn.Module) -> AffineMap:
    """Return the map trained jointly, as it is now."""
    assert isinstance(transformation, BackwardTransformation)
    return AffineMap(transformation.weight.detach().numpy())


def joint_of(step: Step) -> JointAlignment:
    """Return what BC-Aligner aligns the version to, with a new B_k."""
    target = step.target
    with seeded(step.config.seed):
        transformation = BackwardTransformation(step.config.width(step.number), target.shape[1])
    gram = alignment_gram(torch.from_numpy(older.weight) for older in step.chain.values())
    return JointAlignment(transformation, AlignmentLoss(gram), target)


def train(step: Step, name: str, recipe: str) -> Run:
    """Train the version by a recipe and look at it every few epochs."""
    config, model = step.config, step.new_model()
    joint = joint_of(step) if name == ALIGNED else None
    watch, graph = Watch(step, joint), step.training_graph(step.vocabulary)
    fit(
        model,
        graph,
        step.split.train,
        config,
        joint=joint,
        selection=watch.selection,
        on_epoch=watch.look,
    )
    first = first_selected(config, joined=joint is not None)
    return Run(name, recipe, config.seed, first, watch.norm, watch.points)


def runs_of(arguments: argparse.Namespace) -> list[Run]:
    """Train all: for each seed the ancestors, then each model by both recipes in turn."""
    dataset, version, runs = Dataset.read(arguments.data), arguments.version, []
    for seed in map(int, arguments.seeds.split(",")):
        configs = {r: config_of(r, seed, arguments) for r in (PUBLISHED, FAST)}
        models, chain = ancestors(dataset, version, configs[PUBLISHED])
        for name in (ALONE, ALIGNED) if version else (ALONE,):
            for recipe, config in configs.items():
                step = step_of(dataset, version, config, models, chain)
                runs.append(train(step, name, recipe))
                print(f"seed {seed}, {name}, {recipe}: {runs[-1].seconds:.1f} s", file=sys.stderr)
    return runs


# The table and the picture


def spread(values: Sequence[float | None], digits: int) -> str | None:
    """Return mean ± standard deviation of what is known, and how many are not."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    around = f" ± {pstdev(known):.{digits}f}" if len(known) > 1 else ""
    missing = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{fmean(known):.{digits}f}{around}{missing}"


def table_rows(runs: Sequence[Run]) -> list[list[object]]:
    """Return the rows of each model: both recipes, and the ratio of their times."""
    rows: list[list[object]] = []
    for name in dict.fromkeys(run.model for run in runs):
        by_recipe = {
            r: [run for run in runs if (run.model, run.recipe) == (name, r)]
            for r in (PUBLISHED, FAST)
        }
        goals = [run.best.recall for run in by_recipe[PUBLISHED]]
        until = {
            recipe: [run.seconds_until(goal) for run, goal in zip(found, goals, strict=True)]
            for recipe, found in by_recipe.items()
        }
        for recipe, found in by_recipe.items():
            best = [run.best for run in found]
            rows.append(
                [
                    f"{name}, {recipe}",
                    spread([run.seconds for run in found], 1),
                    spread(until[recipe], 1),
                    spread([point.recall for point in best], 4),
                    spread([point.error for point in best], 3),
                    spread([point.refitted for point in best], 3),
                ]
            )
        totals = [[run.seconds for run in found] for found in by_recipe.values()]
        ratios = [ratio(*totals), ratio(until[PUBLISHED], until[FAST])]
        rows.append([f"{name}, ratio", *(spread(r, 1) for r in ratios), None, None, None])
    return rows


def ratio(slower: Sequence[float | None], faster: Sequence[float | None]) -> list[float | None]:
    """Return the ratios, seed by seed, of times that are known."""
    return [a / b if a and b else None for a, b in zip(slower, faster, strict=True)]


def draw(runs: Sequence[Run], version: int) -> Picture:
    """Draw Recall@50, and the alignment error, over training time: a line a seed."""
    panels = [(ALONE, "recall", "Recall@50")]
    if any(run.model == ALIGNED for run in runs):
        panels += [
            (ALIGNED, "recall", "Recall@50"),
            (ALIGNED, "error", "alignment error, mean ‖z̃₀ − z₀‖₂"),
        ]
    with drawing(len(panels), height=3.0) as picture:
        for axes, (name, quantity, unit) in zip(picture.axes, panels, strict=True):
            for at, recipe in enumerate((PUBLISHED, FAST), start=1):
                look, label = look_of(at), f"{recipe} recipe"
                for run in runs:
                    if (run.model, run.recipe) == (name, recipe):
                        seconds = [point.seconds for point in run.points]
                        values = [getattr(point, quantity) for point in run.points]
                        axes.plot(
                            seconds,
                            values,
                            color=look.color,
                            marker=look.marker,
                            markersize=3,
                            label=label,
                        )
                        label = "_"  # one entry a recipe
            head(axes, name, unit)
            axes.set_xlabel("training time, s")
            axes.set_xlim(left=0)
        picture.legend("outside lower center", columns=2)
        title = f"Version {version} by the published and by the fast recipe"
        return picture.picture("recipes", title, "A line a seed; evaluations are not counted.")


def main() -> None:
    """Train, print the table, write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="data set folder")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures")
    parser.add_argument("--version", type=int, default=2, help="k")
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--every", type=int, default=5, help="epochs from one look to the next")
    parser.add_argument("--epochs", type=int, help="of both recipes, to try the script")
    arguments = parser.parse_args()
    print(machine())
    runs = runs_of(arguments)
    print_table(
        (
            "model, recipe",
            "seconds in all",
            "seconds to the published Recall@50",
            "Recall@50",
            "alignment error",
            "the same, map refitted",
        ),
        table_rows(runs),
        title=f"Version {arguments.version}, preset small, protocol=paper",
    )
    norms = [run.norm for run in runs if run.norm is not None]
    if norms:
        print(f"Alignment errors are to ver-0 vectors, whose mean length is {fmean(norms):.2f}.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    picture = draw(runs, arguments.version)
    for suffix, content in (("png", picture.png), ("svg", picture.svg)):
        path = arguments.out / f"{picture.name}.{suffix}"
        path.write_bytes(content)
        print(path)


if __name__ == "__main__":
    main()
