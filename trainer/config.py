"""What a training run is told. The edge: files and flags become one frozen object."""

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from backcast.errors import ConfigError


class Protocol(StrEnum):
    """How data is split; see ``trainer.split``."""

    STRICT = "strict"
    PAPER = "paper"


class TrainConfig(BaseModel):
    """How to train one version.

    ``widths`` and ``layers`` are schedules: version k takes entry k, and the last one repeats.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    widths: tuple[PositiveInt, ...] = Field(default=(32, 40, 48, 56, 64), min_length=1)
    layers: tuple[PositiveInt, ...] = Field(default=(2, 2, 3, 3, 3), min_length=1)
    epochs: PositiveInt = 20
    batch_size: PositiveInt = 4096
    learning_rate: float = Field(default=0.015, gt=0)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """How long Adam remembers squared gradients: 1 / (1 - β₂) steps."""
    averaging: bool = True
    """Leave the average of the weights along the way, not the last ones."""
    unit_scores: bool = True
    """Start with scores of a standard deviation near 1 (see :func:`trainer.model.unit_scores`)."""
    weight_decay: float = Field(default=0.01, ge=0)
    alignment_weight: float | None = Field(default=None, ge=0)
    """λ of the joint objective, None for the method's own."""
    protocol: Protocol = Protocol.STRICT
    evaluate_every: PositiveInt = 5
    first_selected_epoch: PositiveInt = 50
    """Joint training or averaging: epochs before this one are not selected, for map or average have
    not settled yet. Never later than half of ``epochs``, or three quarters with averaging."""
    patience: PositiveInt | None = None
    """Stop at an evaluation when the best epoch is this many epochs ago; None to train all of
    ``epochs``, as without a holdout to evaluate on."""
    min_value_count: PositiveInt = 5
    """Attribute values on fewer items are left out of the vocabulary."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def width(self, version: int) -> int:
        """Return D_k of version k."""
        return self.widths[min(version, len(self.widths) - 1)]

    def depth(self, version: int) -> int:
        """Return the number of GraphSAGE layers of version k."""
        return self.layers[min(version, len(self.layers) - 1)]

    @classmethod
    def load(
        cls,
        preset: str = "small",
        file: Path | None = None,
        *,
        recipe: str = "fast",
        **overrides: Any,
    ) -> Self:
        """Combine preset, recipe, a TOML file of the same keys, and overrides that are not None.

        Raises:
            ConfigError: the preset or recipe is unknown, the file unreadable, a key unknown or out
                of range.
        """
        for what, name, known in (("Preset", preset, PRESETS), ("Recipe", recipe, RECIPES)):
            if name not in known:
                raise ConfigError(f"{what} {name!r} is unknown; there are {', '.join(known)}.")
        given = {key: value for key, value in overrides.items() if value is not None}
        try:
            named = {**PRESETS[preset], **RECIPES[recipe][preset]}
            return cls(**{**named, **_read_toml(file), **given})
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"Training setting {key}: {first['msg']}. "
                f"The settings are {', '.join(cls.model_fields)}."
            ) from error


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "paper": {"widths": (256, 320, 384, 448, 512)},
}
"""``small`` fits two CPU cores; ``paper`` is the published schedule of the smaller data sets."""

_FAST = {"adam_beta2": 0.95, "averaging": True, "unit_scores": True}
_PUBLISHED = {"evaluate_every": 10, "adam_beta2": 0.999, "averaging": False, "unit_scores": False}

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "small": {
            "epochs": 20,
            "batch_size": 4096,
            "learning_rate": 0.015,
            "evaluate_every": 5,
            **_FAST,
        },
        "paper": {
            "epochs": 100,
            "batch_size": 4096,
            "learning_rate": 0.003,
            "evaluate_every": 10,
            **_FAST,
        },
    },
    "published": {
        "small": {"epochs": 100, "batch_size": 4096, "learning_rate": 0.001, **_PUBLISHED},
        "paper": {"epochs": 500, "batch_size": 2048, "learning_rate": 0.001, **_PUBLISHED},
    },
}
"""How long and how fast to train, by preset: as published, or to the same quality in less time."""


def _read_toml(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as TOML: {error}.") from error
