"""Small data sets, configurations that train in a blink, and places to train in."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backcast.artifacts import Artifacts
from backcast.registry import Registry, open_registry
from backcast.settings import Settings
from backcast.transforms import AffineMap
from backcast.versions import Version
from trainer.archive import ArchivedModel
from trainer.config import Protocol, TrainConfig
from trainer.data.dataset import Dataset, MultiHot, resolve_until, write_dataset
from trainer.data.synth import SynthConfig, synthesize
from trainer.fitting import EpochReport, OnEpoch
from trainer.graph import Operator, SparseMatrix
from trainer.methods import Made, Method, make_version, method, methods
from trainer.methods.maps import GradientFitted
from trainer.split import Edges, make_split
from trainer.step import Step
from trainer.training import TrainRequest, train_version

TINY = TrainConfig(
    widths=(8, 10, 12),
    layers=(1, 2, 2),
    epochs=6,
    batch_size=512,
    learning_rate=0.01,
    evaluate_every=2,
    seed=1,
    device="cpu",
)
"""Three versions of it take about half a second on the data of ``synthetic``."""

Attributes = Mapping[str, Mapping[str, Sequence[str]]]
"""Values by column and item id; an item that is not named has none."""


def dataset_of(
    edges: Sequence[tuple[str, str, int]],
    attributes: Attributes | None = None,
    *,
    ratings: Sequence[float] | None = None,
) -> Dataset:
    """Make a data set in memory from (user id, item id, timestamp), which are in time order."""
    assert [t for _, _, t in edges] == sorted(t for _, _, t in edges)
    assert len({(user, item) for user, item, _ in edges}) == len(edges)
    user_ids = list(dict.fromkeys(user for user, _, _ in edges))
    item_ids = list(dict.fromkeys(item for _, item, _ in edges))
    return Dataset(
        name="by hand",
        folder=Path("by-hand"),
        fingerprint="f" * 64,
        user_ids=np.array(user_ids, dtype=np.object_),
        item_ids=np.array(item_ids, dtype=np.object_),
        users=np.array([user_ids.index(user) for user, _, _ in edges], dtype=np.int64),
        items=np.array([item_ids.index(item) for _, item, _ in edges], dtype=np.int64),
        ratings=np.array([np.nan] * len(edges) if ratings is None else ratings, dtype=np.float32),
        timestamps=np.array([t for _, _, t in edges], dtype=np.int64),
        attributes={
            name: _multi_hot([values.get(item, ()) for item in item_ids])
            for name, values in (attributes or {}).items()
        },
    )


def _multi_hot(rows: Sequence[Sequence[str]]) -> MultiHot:
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    return MultiHot(offsets, np.array([v for row in rows for v in row], dtype=np.object_))


def synthetic(folder: Path) -> Dataset:
    """Write a generated data set of 300 users, 150 items and 4000 edges, and read it."""
    config = SynthConfig(users=300, items=150, interactions=4000, seed=1)
    interactions, items = synthesize(config)
    write_dataset(folder, interactions, items, name="synthetic", source=asdict(config), counts={})
    return Dataset.read(folder)


def edges_of(*pairs: tuple[int, int]) -> Edges:
    """Make edges from (user number, item number)."""
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Edges(array[:, 0], array[:, 1])


def pairs_of(edges: Edges) -> list[tuple[int, int]]:
    """Return edges as (user number, item number)."""
    return list(zip(edges.users.tolist(), edges.items.tolist(), strict=True))


def dense_mean(edges: Edges, users: int, x: Tensor) -> Tensor:
    """Return the mean of each node's neighbours, zero without any, node by node: (N, D)."""
    neighbours: list[list[int]] = [[] for _ in x]
    for user, item in pairs_of(edges):
        neighbours[user].append(users + item)
        neighbours[users + item].append(user)
    return torch.stack([x[ns].mean(dim=0) if ns else torch.zeros_like(x[0]) for ns in neighbours])


def dense(matrix: SparseMatrix | Tensor) -> Tensor:
    """Return either form of a matrix as a dense tensor."""
    return matrix if isinstance(matrix, Tensor) else matrix.dense()


def widened(operator: Operator) -> Operator:
    """Return the operator in float64."""
    return Operator(_double(operator.matrix), _double(operator.transposed))


def _double(matrix: SparseMatrix | Tensor) -> SparseMatrix | Tensor:
    if isinstance(matrix, Tensor):
        return matrix.double()
    return replace(matrix, values=matrix.values.double())


def ignore_epochs(_report: EpochReport) -> None:
    """Take note of nothing."""


def quick_methods() -> dict[str, Method]:
    """Return all methods by name; maps fitted by gradient descent take four epochs."""
    return {name: _quick(found) for name, found in methods().items()}


def _quick(found: Method) -> Method:
    if isinstance(found.maps, GradientFitted):
        return replace(found, maps=replace(found.maps, epochs=4, first_selected=2))
    return found


def step_of(
    dataset: Dataset,
    older: Sequence[Made] = (),
    *,
    config: TrainConfig = TINY,
    chain: Mapping[int, AffineMap] | None = None,
    gone: Sequence[int] = (),
    on_epoch: OnEpoch = ignore_epochs,
) -> Step:
    """Return the step to the next version after ``older``, the parent its last, in memory.

    Versions are cut at 0.5, 0.6, …; ``chain`` is that of the older maps unless it is given; the
    models of the versions that are ``gone`` cannot be read.
    """
    number = len(older)
    until = resolve_until(dataset, 0.5 + 0.1 * number)

    def load(version: int) -> ArchivedModel | None:
        return None if version in gone else older[version].trained.archived

    return Step(
        number=number,
        dataset=dataset,
        split=make_split(dataset, until, None, Protocol.STRICT),
        config=config,
        device=torch.device("cpu"),
        parent=number - 1 if older else None,
        ancestors=list(reversed(range(number))),
        chain=chain_of(older) if chain is None else chain,
        load=load,
        on_epoch=on_epoch,
    )


def chain_of(made: Sequence[Made]) -> dict[int, AffineMap]:
    """Return the maps from the last version to all: those trained jointly, if there are any."""
    last = len(made) - 1
    chain = {last: AffineMap.identity(made[last].trained.archived.model.width)} if made else {}
    for version in reversed(range(last)):
        newer = made[version + 1]
        link = newer.trained.joint_map or newer.maps.get(version)
        if link is None:
            break
        chain[version] = link.after(chain[version + 1])
    return chain


def make_line(
    dataset: Dataset, by: Method, versions: int = 3, *, config: TrainConfig = TINY
) -> list[Made]:
    """Make versions one on another, in memory."""
    made: list[Made] = []
    for _ in range(versions):
        made.append(make_version(by, step_of(dataset, made, config=config)))
    return made


@dataclass(frozen=True)
class Workshop:
    """A registry and artifacts, and the data to train on."""

    settings: Settings
    registry: Registry
    artifacts: Artifacts
    dataset: Dataset

    def train(
        self,
        until: float,
        horizon: float | None = None,
        *,
        config: TrainConfig = TINY,
        parent: int | None = None,
        by: str | Method = "bc-aligner",
        on_epoch: OnEpoch = ignore_epochs,
    ) -> Version:
        """Train and register the next version; moments are as ``--until`` takes them."""
        request = TrainRequest(
            self.dataset,
            config,
            resolve_until(self.dataset, until),
            method(by) if isinstance(by, str) else by,
            None if horizon is None else resolve_until(self.dataset, horizon),
            parent,
        )
        return train_version(self.registry, self.artifacts, request, on_epoch)

    def folders(self) -> list[str]:
        """Return the names of all folders of artifacts."""
        root = Path(self.settings.artifacts_root)
        return sorted(path.relative_to(root).as_posix() for path in root.glob("*/*"))


@contextmanager
def open_workshop(folder: Path, dataset: Dataset) -> Iterator[Workshop]:
    """Open a place to train in, SQLite and a local folder."""
    settings = Settings.load(home=folder, database_url="", artifacts_url="")
    with open_registry(settings) as registry:
        yield Workshop(settings, registry, Artifacts(settings.artifacts_root), dataset)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on so many threads. On arrays as small as these, two only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def command(*arguments: str) -> list[str]:
    """Return the ``backcast`` command as a person in this environment would run it."""
    return [str(Path(sys.executable).with_name("backcast")), *arguments]


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Return the variables of a process that works in ``home``, on one thread."""
    others = {k: v for k, v in os.environ.items() if not k.startswith("BACKCAST_")}
    return {**others, "BACKCAST_HOME": str(home), "OMP_NUM_THREADS": "1", **variables}
