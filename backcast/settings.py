"""Settings, read from the environment (prefix ``BACKCAST_``) once, at the edge."""

import difflib
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from backcast.errors import ConfigError


class Settings(BaseSettings):
    """Where things are kept and how they are served. Each field is one environment variable."""

    model_config = SettingsConfigDict(env_prefix="BACKCAST_", frozen=True, extra="ignore")

    home: Path = Field(
        default=Path(".backcast"),
        description="Folder that the defaults below lie in.",
    )
    database_url: str = Field(
        default="",
        description="SQLAlchemy URL of the registry. Default: `registry.db` (SQLite) under home.",
    )
    artifacts_url: str = Field(
        default="",
        description="fsspec URL of models, maps and snapshots. Default: `artifacts` under home.",
    )
    store_url: str = Field(
        default="embedded:",
        description="Vector store: `embedded:` (folder `store` under home; one host), "
        "`embedded:/path`, `redis://…` or `rediss://…`.",
    )
    store_precision: Literal["float32", "float16", "bfloat16"] = Field(
        default="float32",
        description="How vectors are stored, from the next snapshot on: `float32`, `float16` or "
        "`bfloat16`. Answers are float32 all the same.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where maps are applied; `auto` takes CUDA where there is one."
    )
    max_batch: int = Field(
        default=10_000, ge=1, le=1_000_000, description="Most ids that one batch request may carry."
    )
    max_changed: int = Field(
        default=100_000,
        ge=1,
        le=100_000_000,
        description="Most ids that may be changed on the live snapshot before "
        "`backcast refresh --compact` must take them up; they are held in memory.",
    )
    reads: Literal["keyed", "open"] = Field(
        default="keyed", description="Whether reads need a key (`keyed`) or not (`open`)."
    )
    grace_seconds: float = Field(
        default=3600.0,
        ge=0,
        le=31_536_000,
        description="How long a superseded snapshot stays in the store after a promotion; longer "
        "than `BACKCAST_POLL_SECONDS`, or replicas on Redis answer 503 until they have followed.",
    )
    poll_seconds: float = Field(
        default=0.5,
        gt=0,
        le=3600,
        description="How often a replica looks whether another version went live.",
    )
    key_cache_seconds: float = Field(
        default=5.0,
        ge=0,
        le=3600,
        description="How long a replica trusts a key it has seen; a revocation takes effect "
        "everywhere within this time.",
    )
    operation_timeout: float = Field(
        default=15.0,
        ge=0.2,
        le=3600,
        description="Seconds without a sign of life after which an operation counts as abandoned; "
        "the same for every replica and command.",
    )
    keep_models: Literal["all", "fit"] = Field(
        default="all",
        description="Models whose weights are kept: `all`, or `fit`: those that can be served or "
        "trained on. Maps are always kept.",
    )
    key_outage_seconds: float = Field(
        default=600.0,
        ge=0,
        le=86_400,
        description="How long keys seen before are trusted while the registry does not answer.",
    )
    usage_seconds: float = Field(
        default=5.0,
        gt=0,
        le=60,
        description="How often a replica writes the requests it has counted to the registry; a "
        "kill loses at most those of this time.",
    )
    retire_idle_days: float = Field(
        default=7.0,
        ge=0,
        le=3650,
        description="For how many days a version must not have been used before it is retired "
        "without force.",
    )
    gate_coverage: float = Field(
        default=0.99,
        ge=0,
        le=1,
        description="A promotion is refused unless its snapshot holds this fraction of the live "
        "ids, of each kind.",
    )
    gate_change: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="A promotion is refused where more than 5 % of a servable version's vectors "
        "change by more than this, relative to their length.",
    )
    gate_metric: float = Field(
        default=0.9,
        ge=0,
        allow_inf_nan=False,
        description="A promotion is refused where Recall@50 is less than this times that of the "
        "parent on the same edges.",
    )
    url: str = Field(
        default="http://127.0.0.1:8000", description="For the client: where the service answers."
    )
    key: SecretStr | None = Field(default=None, description="For the client: the bearer key.")

    @classmethod
    def load(cls, **overrides: object) -> Self:
        """Read the environment; raise ConfigError naming the variable that is wrong."""
        try:
            return cls(**overrides)  # type: ignore[arg-type]
        except ValidationError as error:
            first = error.errors()[0]
            name = f"BACKCAST_{'_'.join(str(part) for part in first['loc'])}".upper()
            raise ConfigError(
                f"{name}={first['input']!r}: {first['msg']}.", variable=name
            ) from error

    @property
    def registry_url(self) -> str:
        """``database_url``, or the SQLite file under home."""
        return self.database_url or f"sqlite:///{self.home.absolute() / 'registry.db'}"

    @property
    def artifacts_root(self) -> str:
        """``artifacts_url``, or the folder under home."""
        return self.artifacts_url or str(self.home.absolute() / "artifacts")

    @property
    def vector_store_url(self) -> str:
        """``store_url``, with the embedded default resolved to a folder under home."""
        if self.store_url == "embedded:":
            return f"embedded:{self.home.absolute() / 'store'}"
        return self.store_url


def check_environment() -> None:
    """Raise ConfigError for a BACKCAST_ variable that no setting reads: it is misspelt.

    ``BACKCAST_TEST_`` is left to the tests.
    """
    known = [f"BACKCAST_{name.upper()}" for name in Settings.model_fields]
    for variable in os.environ:
        ours = variable.startswith("BACKCAST_") and not variable.startswith("BACKCAST_TEST_")
        if ours and variable not in known:
            near = difflib.get_close_matches(variable, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The settings are {', '.join(known)}."
            raise ConfigError(f"{variable} is no setting. {hint}", variable=variable)
