"""Settings, read from the environment (prefix ``BACKCAST_``) once, at the edge."""

import difflib
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from backcast.errors import ConfigError

SECRETS = ("database_url", "store_url", "limits_url", "key")
"""Fields that may hold a password, and can be read from the file that ``BACKCAST_…_FILE`` names."""


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
    max_body: int = Field(
        default=64 << 20,
        ge=1024,
        le=2 << 30,
        description="Most bytes of a request's body, where it carries ids or vectors; others have "
        "at most 64 KiB.",
    )
    max_connections: int = Field(
        default=1000,
        ge=1,
        le=1_000_000,
        description="Connections that one worker serves at once; requests over more of them are "
        "answered with 503.",
    )
    batches_at_once: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="Batches that one worker answers at once.",
    )
    batches_waiting: int = Field(
        default=32,
        ge=0,
        le=100_000,
        description="Batches beyond those that one worker takes on; more are answered with 503 "
        "before their bodies are read.",
    )
    batch_seconds: float = Field(
        default=60.0,
        gt=0,
        le=3600,
        description="How long a batch may take, from its first line to the last byte of its "
        "answer.",
    )
    body_seconds: float = Field(
        default=10.0, gt=0, le=3600, description="How long a request's body may take to arrive."
    )
    head_seconds: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        description="How long a connection may take to bring a request's line and headers, or to "
        "take anything of an answer; looked at this often, so it may be twice as long.",
    )
    keep_alive_seconds: int = Field(
        default=75,
        ge=1,
        le=3600,
        description="How long a connection is kept open between two requests; longer than a proxy "
        "in front of the service keeps it.",
    )
    requests_per_second: int = Field(
        default=0,
        ge=0,
        le=1_000_000_000,
        description="Reads that a consumer may send in a second; 0: any number.",
    )
    vectors_per_second: int = Field(
        default=0,
        ge=0,
        le=1_000_000_000,
        description="Vectors that a consumer may ask for in a second, on average over as many "
        "seconds as the largest batch needs; 0: any number.",
    )
    limits_url: str = Field(
        default="",
        description="Redis in which all workers and replicas count what consumers ask for. "
        "Default: the vector store's where that is Redis; otherwise each worker counts alone.",
    )
    drain_seconds: float = Field(
        default=1.0,
        ge=0,
        le=3600,
        description="How long a worker that was told to stop goes on as before, but for "
        "`/readyz`: until proxies send their requests elsewhere.",
    )
    shutdown_seconds: int = Field(
        default=30,
        ge=1,
        le=3600,
        description="How long requests may then take to be finished.",
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
        description="How long a replica trusts a key it has seen; a revocation or rotation takes "
        "effect everywhere within this time.",
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
    metrics_folder: Path | None = Field(
        default=None,
        description="Folder on this host in which the workers of one replica put their metrics "
        "together; `backcast serve --workers N` makes one.",
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
    log_format: Literal["text", "json"] = Field(
        default="text",
        description="How log lines are written to standard error: `text`, or `json`, one object a "
        "line.",
    )
    access_log: Literal["off", "on"] = Field(
        default="off",
        description="Whether every request is logged (`on`): by its route, never by an id or a "
        "key.",
    )
    traces: Literal["off", "otlp"] = Field(
        default="off",
        description="Whether traces are sent by OTLP over HTTP (`otlp`), to where the standard "
        "`OTEL_EXPORTER_OTLP_…` variables say; needs the extra `otel`.",
    )
    url: str = Field(
        default="http://127.0.0.1:8000", description="For the client: where the service answers."
    )
    key: SecretStr | None = Field(default=None, description="For the client: the bearer key.")

    @classmethod
    def load(cls, **overrides: object) -> Self:
        """Read the environment; raise ConfigError naming the variable that is wrong."""
        given = _secrets_in_files() | overrides
        try:
            return cls(**given)  # type: ignore[arg-type]
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

    @property
    def shared_limits_url(self) -> str:
        """``limits_url``, or ``store_url`` where that is Redis; empty where workers count alone."""
        shared = self.store_url.startswith(("redis://", "rediss://"))
        return self.limits_url or (self.store_url if shared else "")


def _secrets_in_files() -> dict[str, object]:
    found: dict[str, object] = {}
    for name in SECRETS:
        variable = f"BACKCAST_{name.upper()}"
        path = os.environ.get(f"{variable}_FILE")
        if path is None:
            continue
        if variable in os.environ:
            raise ConfigError(
                f"{variable} and {variable}_FILE are both set; unset one of them.",
                variable=variable,
            )
        found[name] = _read_secret(f"{variable}_FILE", path)
    return found


def _read_secret(variable: str, path: str) -> str:
    """Return what a file holds but for the line break at its end; no error shows any of it."""
    try:
        secret = Path(path).read_text(encoding="utf-8").removesuffix("\n").removesuffix("\r")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"{variable}={path!r} cannot be read: {reason}.", variable=variable
        ) from None
    if not secret or "\n" in secret:
        found = "several lines" if secret else "nothing"
        raise ConfigError(
            f"{variable}={path!r} holds {found}; it must hold one line, the value.",
            variable=variable,
        )
    return secret


def read_argument(option: str, given: str) -> str:
    """Return the value of a command's option, which ``@FILE`` keeps out of its arguments.

    Raises:
        ConfigError: the file cannot be read, or does not hold one line.
    """
    return _read_secret(option, given[1:]) if given.startswith("@") else given


def check_environment() -> None:
    """Raise ConfigError for a BACKCAST_ variable that no setting reads: it is misspelt.

    ``BACKCAST_TEST_`` is left to the tests.
    """
    known = [f"BACKCAST_{name.upper()}" for name in Settings.model_fields]
    known += [f"BACKCAST_{name.upper()}_FILE" for name in SECRETS]
    for variable in os.environ:
        ours = variable.startswith("BACKCAST_") and not variable.startswith("BACKCAST_TEST_")
        if ours and variable not in known:
            near = difflib.get_close_matches(variable, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"The settings are {', '.join(known)}."
            raise ConfigError(f"{variable} is no setting. {hint}", variable=variable)
