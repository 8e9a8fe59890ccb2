"""Consumer models of the unintended tasks, trained once on vectors of one version.

A consumer is a small MLP on the vector of a user, of an item, or of both joined. All consumers
with the same input rows (tasks × seeds × dropouts of one hidden width) are trained together; see
``trainer.evaluation.ensemble``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby, product
from math import ceil
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc

from backcast.errors import DimensionMismatch, InvalidInput
from trainer.evaluation.ensemble import Ensemble, Member
from trainer.evaluation.tasks import TASKS, Examples, Numbers, Task, Timeline

Vectors = tuple[Tensor, Tensor]
"""The vectors of users (U, D) and items (I, D), by number."""

_CELLS = 2**24
"""Hidden values that are computed at once in training; more consumers are trained in turns."""
_CELLS_SCORED = 2**21


@dataclass(frozen=True)
class ConsumerConfig:
    """How consumers are trained.

    Attributes:
        hidden: hidden widths to choose from.
        dropout: dropouts to choose from. The pair is chosen on the validation AUC of the first
            seed, and all seeds are trained with it.
        seeds: one consumer for each.
        epochs: passes over the examples. The best one is chosen on validation AUC.
        batch_size: rows of a step, at most; the steps of an epoch differ by one row at most.
        hidden_layers: 1, as the paper's text: Linear–BatchNorm–ReLU–Dropout–Linear; or 2, as the
            published code: Linear–BatchNorm–ReLU–Dropout–Linear–BatchNorm–Dropout–Linear.
        evaluate_every: epochs between two looks at the validation AUC.
        rows_per_epoch: of more rows than these, each epoch takes so many at random; None for all.
    """

    hidden: tuple[int, ...]
    dropout: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    learning_rate: float
    hidden_layers: int = 1
    evaluate_every: int = 1
    rows_per_epoch: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        sizes = (*self.hidden, self.epochs, self.batch_size, self.evaluate_every)
        if not (self.hidden and self.dropout and self.seeds) or min(sizes) < 1:
            raise InvalidInput(f"Consumers: expected grids, seeds and sizes above 0; got {self}.")
        if not all(0 <= p < 1 for p in self.dropout) or self.learning_rate <= 0:
            raise InvalidInput(
                f"Consumers: expected 0 <= dropout < 1 and a learning rate above 0; got {self}."
            )
        if self.rows_per_epoch is not None and self.rows_per_epoch < 2:
            raise InvalidInput(f"Consumers: expected two rows an epoch or more; got {self}.")
        if self.hidden_layers not in {1, 2}:
            raise InvalidInput(f"Consumers: expected 1 or 2 hidden layers; got {self}.")

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """Read back what ``asdict`` and JSON made of a configuration."""
        grids = {name: tuple(document[name]) for name in ("hidden", "dropout", "seeds")}
        return cls(**{**document, **grids})


PAPER = ConsumerConfig(
    hidden=(128, 256, 512, 1024),
    dropout=(0.0, 0.25, 0.5),
    seeds=tuple(range(10)),
    epochs=300,
    batch_size=2048,
    learning_rate=0.001,
)

SMALL = ConsumerConfig(
    hidden=(128,),
    dropout=(0.25,),
    seeds=(0, 1, 2),
    epochs=50,
    batch_size=512,
    learning_rate=0.01,
    rows_per_epoch=2**14,
)
"""Fits two CPU cores. Edge rating is cut short: on the review data its validation AUC goes on
rising for hundreds of epochs, its test AUC does not."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Rows of vectors, gathered when they are needed.

    Attributes:
        parts: (table (N, D), index (n,)) each; a row joins what its indices point at.
    """

    parts: Sequence[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, examples: Examples, vectors: Vectors) -> Self:
        """Look the rows of ``examples`` up in ``vectors``.

        Raises:
            InvalidInput: a vector is not finite, or there are fewer than the examples name.
        """
        users, items = vectors
        named = (("users", users, examples.users), ("items", items, examples.items))
        return cls([_part(what, table, rows) for what, table, rows in named if rows is not None])

    def __len__(self) -> int:
        return len(self.parts[0][1])

    @property
    def width(self) -> int:
        """How many numbers a row has."""
        return sum(table.shape[1] for table, _ in self.parts)

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.parts[0][0].device

    def take(self, rows: Tensor) -> Tensor:
        """Return the rows (E, b) as columns, (E, D, b)."""
        return torch.cat([table[index[rows]] for table, index in self.parts], dim=2).mT


def _part(what: str, table: Tensor, rows: Numbers) -> tuple[Tensor, Tensor]:
    needed = int(rows.max()) + 1 if len(rows) else 0
    if table.ndim != 2 or len(table) < needed:
        raise DimensionMismatch(f"vectors of {what}", f"({needed} or more, D)", tuple(table.shape))
    if not bool(torch.isfinite(table).all()):
        raise InvalidInput(f"A vector of the {what} is not finite; consumers cannot take it.")
    index = torch.from_numpy(rows).to(table.device)
    return table.detach().to(torch.float32), index


@dataclass(frozen=True, eq=False)
class _Lesson:
    """Tasks with the same inputs, and the labels (n,) of each, by name."""

    training: Inputs
    validation: Inputs
    training_labels: Mapping[str, Tensor]
    validation_labels: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained consumer: its weights, the epoch they are from, and its validation AUC.

    Where validation lacks a class, the last epoch stays and the AUC is None.
    """

    member: Member
    weights: Mapping[str, Tensor]
    epoch: int
    validation: float | None


def train_consumers(
    timeline: Timeline,
    version: int,
    vectors: Callable[[int], Vectors],
    config: ConsumerConfig = SMALL,
    tasks: Sequence[Task] = TASKS,
) -> "Consumers":
    """Train the consumers of ``version`` on true ver-``version`` vectors, where they have a test.

    Args:
        timeline: the moments, and the protocol by which examples are chosen.
        version: j.
        vectors: of k, gives the version's own vectors on the version-k graph; asked for k = j and,
            where a task is validated one version later, k = j + 1. Training happens on the device
            that they are on.
        config: how to train.
        tasks: which to train; those that are tested at no k get no consumers.

    Raises:
        InvalidInput: a vector is not finite. DimensionMismatch: there are too few vectors.
    """
    tested = [task for task in tasks if version + task.tested_after < timeline.versions]
    examples = {task.name: task.training(timeline, version) for task in tested}
    taught = [task for task in tested if examples[task.name].has_both_classes]
    at = cache(vectors)
    fitted: dict[str, Sequence[Fitted]] = {}
    for group in _with_same_rows(taught, examples):
        validation = {task.name: task.validation(timeline, version) for task in group}
        first = group[0]
        lesson = _Lesson(
            Inputs.of(examples[first.name], at(version)),
            Inputs.of(validation[first.name], at(version + first.validated_after)),
            {task.name: torch.from_numpy(examples[task.name].labels) for task in group},
            {name: torch.from_numpy(found.labels) for name, found in validation.items()},
        )
        fitted |= _teach(lesson, config)
    return Consumers(timeline, version, config, tasks, fitted)


def _with_same_rows(tasks: Sequence[Task], examples: Mapping[str, Examples]) -> list[list[Task]]:
    groups: dict[object, list[Task]] = {}
    for task in tasks:
        rows = (examples[task.name].users, examples[task.name].items)
        key = (task.validated_after, *(None if r is None else r.tobytes() for r in rows))
        groups.setdefault(key, []).append(task)
    return list(groups.values())


def _teach(lesson: _Lesson, config: ConsumerConfig) -> dict[str, Sequence[Fitted]]:
    """Choose each task's width and dropout with the first seed, then train all seeds."""
    grid = list(product(config.hidden, config.dropout))
    names = list(lesson.training_labels)
    # Without a choice to make there is no reason to train the first seed by itself.
    together = config.seeds if len(grid) == 1 else config.seeds[:1]
    members = [Member(name, s, *point) for name in names for s in together for point in grid]
    fitted = {f.member: f for f in _fit_all(members, lesson, config)}
    chosen = {
        name: max(grid, key=lambda point: _merit(fitted[Member(name, config.seeds[0], *point)]))
        for name in names
    }
    wanted = {name: [Member(name, s, *chosen[name]) for s in config.seeds] for name in names}
    missing = [m for members in wanted.values() for m in members if m not in fitted]
    fitted |= {f.member: f for f in _fit_all(missing, lesson, config)}
    return {name: [fitted[member] for member in members] for name, members in wanted.items()}


def _merit(fitted: Fitted) -> float:
    return -1.0 if fitted.validation is None else fitted.validation


def _fit_all(
    members: Iterable[Member], lesson: _Lesson, config: ConsumerConfig
) -> Iterator[Fitted]:
    def width(member: Member) -> int:
        return member.hidden

    for hidden, same_width in groupby(sorted(members, key=width), key=width):
        alike = list(same_width)
        at_once = max(1, _CELLS // (hidden * min(config.batch_size, len(lesson.training))))
        for start in range(0, len(alike), at_once):
            yield from _fit(alike[start : start + at_once], lesson, config)


def _fit(members: Sequence[Member], lesson: _Lesson, config: ConsumerConfig) -> Iterator[Fitted]:
    """Train some consumers of one hidden width together."""
    inputs, device = lesson.training, lesson.training.device
    labels = _labels_of(members, lesson.training_labels).to(device, torch.float32)  # (E, n)
    ensemble = Ensemble(inputs.width, config.hidden_layers, members).to(device)
    ensemble.draw_dropout_from([member.generator("dropout", device) for member in members])
    orders = [member.generator("order", torch.device("cpu")) for member in members]
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=config.learning_rate, fused=True)
    best = _Best(ensemble)
    for epoch in range(1, config.epochs + 1):
        ensemble.train()
        for rows in _batches(len(inputs), config, orders):
            rows = rows.to(device)
            optimizer.zero_grad()
            logits = ensemble(inputs.take(rows))  # (E, b)
            losses = binary_cross_entropy_with_logits(
                logits, labels.gather(1, rows), reduction="none"
            )
            torch.autograd.backward(losses.mean(dim=1).sum())
            optimizer.step()
        if epoch % config.evaluate_every == 0 or epoch == config.epochs:
            best.offer(epoch, _aucs(ensemble, lesson.validation, lesson.validation_labels))
    return best.fitted()


def _labels_of(members: Sequence[Member], labels: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([labels[member.task] for member in members])


def _batches(
    count: int, config: ConsumerConfig, generators: Sequence[torch.Generator]
) -> Iterator[Tensor]:
    """Yield the rows of an epoch in a random order, each member's its own: (E, b) int64.

    All batches are of one size, give or take a row: a last one of a single row would have no
    variance to normalise by.
    """
    order = torch.stack([torch.randperm(count, generator=g) for g in generators])  # (E, n)
    order = order[:, : config.rows_per_epoch]
    rows = order.shape[1]
    yield from order.tensor_split(max(1, min(ceil(rows / config.batch_size), rows // 2)), dim=1)


class _Best:
    """The best epoch of each member so far, kept as a copy of its weights."""

    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble
        self._weights = {name: value.clone() for name, value in ensemble.state_dict().items()}
        self._epochs = [0 for _ in ensemble.members]
        self._aucs: list[float | None] = [None for _ in ensemble.members]

    def offer(self, epoch: int, aucs: Sequence[float | None]) -> None:
        better = [
            e
            for e, (new, old) in enumerate(zip(aucs, self._aucs, strict=True))
            if new is None or old is None or new > old
        ]
        for e in better:
            self._epochs[e], self._aucs[e] = epoch, aucs[e]
        for name, value in self._ensemble.state_dict().items():
            self._weights[name][better] = value[better]

    def fitted(self) -> Iterator[Fitted]:
        for e, member in enumerate(self._ensemble.members):
            weights = {name: value[e].cpu() for name, value in self._weights.items()}
            yield Fitted(member, weights, self._epochs[e], self._aucs[e])


def _aucs(ensemble: Ensemble, inputs: Inputs, labels: Mapping[str, Tensor]) -> list[float | None]:
    """Return each member's ROC-AUC; None where its labels lack a class."""
    scores = _scores(ensemble, inputs)
    return [
        _roc_auc(own, labels[member.task])
        for own, member in zip(scores, ensemble.members, strict=True)
    ]


@torch.no_grad()
def _scores(ensemble: Ensemble, inputs: Inputs) -> Tensor:
    """Return the logits of all rows, (E, n)."""
    ensemble.eval()
    rows = torch.arange(len(inputs), device=inputs.device).unsqueeze(0)
    at_once = max(1, _CELLS_SCORED // (len(ensemble.members) * ensemble.hidden))
    parts = [ensemble(inputs.take(some)) for some in torch.split(rows, at_once, dim=1)]
    return torch.cat(parts, dim=1)


def _roc_auc(scores: Tensor, labels: Tensor) -> float | None:
    labels = labels.to(scores.device)
    if not labels.any() or labels.all():
        return None
    if not bool(torch.isfinite(scores).all()):
        raise InvalidInput("A consumer's scores are not finite: the vectors are too large.")
    # Ranks in [0, 1]: logits would be squashed, which ties some and splits others.
    _, ranks = torch.unique(scores, return_inverse=True)
    return float(binary_auroc(ranks.double() / max(1, int(ranks.max())), labels.long()))


class Consumers:
    """The trained consumers of one version.

    Args:
        timeline: where their examples come from.
        version: j, whose vectors they were trained on.
        config: how they were trained.
        tasks: all tasks that were asked for.
        fitted: the consumers by task, one per seed; tasks without a test or without both classes
            have none.
    """

    def __init__(
        self,
        timeline: Timeline,
        version: int,
        config: ConsumerConfig,
        tasks: Sequence[Task],
        fitted: Mapping[str, Sequence[Fitted]],
    ) -> None:
        self.timeline, self.version, self.config = timeline, version, config
        self._asked = tuple(tasks)
        self._fitted = dict(fitted)
        self._ensembles = {name: _joined(f, config) for name, f in fitted.items()}
        self._tests: dict[tuple[str, int], Examples] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that have consumers."""
        return tuple(task.name for task in self._asked if task.name in self._fitted)

    def auc(self, k: int, users: Tensor, items: Tensor) -> dict[str, list[float] | None]:
        """Return the ROC-AUC of each consumer while version k is live, by task and seed.

        None stands for a task that has no consumers, is not tested at k yet, or has no examples of
        both classes there.

        Args:
            k: the live version.
            users: (U, D_j), ver-j vectors of the version-k graph, true or compatible.
            items: (I, D_j), likewise.

        Raises:
            InvalidInput: a vector is not finite, or there is no such version.
            DimensionMismatch: the vectors are too few or not of D_j dimensions.
        """
        if not 0 <= k < self.timeline.versions:
            raise InvalidInput(f"Version: expected 0..{self.timeline.versions - 1}, got {k}.")
        return {
            task.name: self.auc_on(task.name, self._test(task, k), users, items)
            if task.name in self._fitted and k >= self.version + task.tested_after
            else None
            for task in self._asked
        }

    def auc_on(
        self, task: str, examples: Examples, users: Tensor, items: Tensor
    ) -> list[float] | None:
        """Return the ROC-AUC of each of a task's consumers on any examples; see ``auc``."""
        if not examples.has_both_classes:
            return None
        labels = torch.from_numpy(examples.labels)
        found = [_roc_auc(own, labels) for own in self.scores(task, examples, users, items)]
        return [auc for auc in found if auc is not None]

    def scores(self, task: str, examples: Examples, users: Tensor, items: Tensor) -> Tensor:
        """Return the logits that each of a task's consumers gives to examples: (S, n)."""
        ensemble, inputs = self._ensembles[task], Inputs.of(examples, (users, items))
        if inputs.width != ensemble.inputs:
            raise DimensionMismatch(f"input of {task}", ensemble.inputs, inputs.width)
        return _scores(ensemble.to(inputs.device), inputs)

    def _test(self, task: Task, k: int) -> Examples:
        if (task.name, k) not in self._tests:
            self._tests[task.name, k] = task.test(self.timeline, self.version, k)
        return self._tests[task.name, k]

    def state(self) -> dict[str, Tensor]:
        """Return all weights, stacked over the seeds, on the CPU: what `about` describes."""
        return {
            f"{task}.{name}": value.cpu().contiguous()
            for task, ensemble in self._ensembles.items()
            for name, value in ensemble.state_dict().items()
        }

    def about(self) -> dict[str, Any]:
        """Return what the weights are, as a JSON document."""
        return {
            "version": self.version,
            "config": asdict(self.config),
            "asked": [task.name for task in self._asked],
            "tasks": {task: _about(fitted) for task, fitted in self._fitted.items()},
        }

    @classmethod
    def load(
        cls,
        timeline: Timeline,
        about: Mapping[str, Any],
        state: Mapping[str, Tensor],
        tasks: Sequence[Task] = TASKS,
    ) -> Self:
        """Make the consumers again from ``about()`` and ``state()``."""
        config = ConsumerConfig.of(about["config"])
        asked = [task for task in tasks if task.name in about["asked"]]
        fitted = {
            task: [
                Fitted(
                    Member(task, seed, facts["hidden"], facts["dropout"]),
                    _weights_of(task, n, state),
                    facts["epochs"][n],
                    facts["validation"][n],
                )
                for n, seed in enumerate(config.seeds)
            ]
            for task, facts in about["tasks"].items()
        }
        return cls(timeline, about["version"], config, asked, fitted)


def _about(fitted: Sequence[Fitted]) -> dict[str, Any]:
    return {
        "hidden": fitted[0].member.hidden,
        "dropout": fitted[0].member.dropout,
        "epochs": [one.epoch for one in fitted],
        "validation": [one.validation for one in fitted],
    }


def _weights_of(task: str, n: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{task}."
    return {
        name.removeprefix(start): value[n]
        for name, value in state.items()
        if name.startswith(start)
    }


def _joined(fitted: Sequence[Fitted], config: ConsumerConfig) -> Ensemble:
    names = list(fitted[0].weights)
    stacked = {name: torch.stack([one.weights[name] for one in fitted]) for name in names}
    inputs = stacked["layers.0.weight"].shape[2]
    ensemble = Ensemble(inputs, config.hidden_layers, [one.member for one in fitted])
    ensemble.load_state_dict(stacked)
    return ensemble
