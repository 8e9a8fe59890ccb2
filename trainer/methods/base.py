"""What a method is, and how it makes a version."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from backcast.transforms import AffineMap
from trainer.archive import ArchivedModel
from trainer.fitting import FitResult
from trainer.step import Step


@dataclass(frozen=True, eq=False)
class Trained:
    """M_k, the map that was trained jointly with it, if any, and how training went."""

    archived: ArchivedModel
    joint_map: AffineMap | None
    fit: FitResult


class ModelStrategy(Protocol):
    """How M_k comes about, for k after the first version."""

    @property
    def default_lambda(self) -> float | None:
        """λ where none is asked for; None where the result does not depend on one."""
        ...

    def train(self, step: Step) -> Trained:
        """Train M_k."""
        ...


class MapStrategy(Protocol):
    """How the maps of version k come about once M_k is fixed."""

    def fit(self, step: Step, trained: Trained) -> Mapping[int, AffineMap]:
        """Return a map to the parent, and direct maps to older versions if there are any."""
        ...


@dataclass(frozen=True)
class Method:
    """A way of serving old versions.

    Attributes:
        name: what it is called on the command line.
        title: what it is called in the table.
        place: where it stands in the table.
        summary: what it does, in one sentence.
        models: how M_k comes about.
        maps: how its maps come about; None where every z_j is kept, so that none is needed.
        trains: whether it makes new versions at all.
    """

    name: str
    title: str
    place: int
    summary: str
    models: ModelStrategy
    maps: MapStrategy | None
    trains: bool = True

    @property
    def servable(self) -> bool:
        """Whether its versions can be registered and served from the latest vectors."""
        return self.trains and self.maps is not None


@dataclass(frozen=True, eq=False)
class Made:
    """A version that was made: M_k, and its maps by the older version they lead to."""

    trained: Trained
    maps: Mapping[int, AffineMap]


def make_version(method: Method, step: Step) -> Made:
    """Make version k; the first one is trained on the intended task alone, whatever the method."""
    if step.parent is None:
        return Made(train_alone(step), {})
    trained = method.models.train(step)
    return Made(trained, {} if method.maps is None else method.maps.fit(step, trained))


def train_alone(step: Step) -> Trained:
    """Train M_k on the intended task alone."""
    from trainer.methods.models import Independent

    return Independent().train(step)
