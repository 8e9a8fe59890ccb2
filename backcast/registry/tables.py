"""The registry's tables. Their schema is made and changed by Alembic only."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
)

from backcast.acts import Outcome
from backcast.versions import Entity, OperationState, Scope, VersionState

SCHEMA_REVISION = "0003_for_0002"
"""The Alembic revision that this code is written for."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes on every database; SQLite forgets the zone, so it is put back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store in UTC; refuse a naive value."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"naive datetime {value!r}")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Read back as aware UTC."""
        if value is None:
            return None
        aware: datetime = value if value.tzinfo else value.replace(tzinfo=UTC)
        return aware.astimezone(UTC)


def _one_of(column: str, values: type[Any]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=f"{column}_known")


def _id(name: str, target: str | None = None, **options: Any) -> Column[str]:
    return Column(name, String(64), *([ForeignKey(target)] if target else []), **options)


versions = Table(
    "versions",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("parent", Integer, ForeignKey("versions.number")),
    Column("state", String(16), nullable=False),
    Column("dim", Integer, nullable=False),
    Column("method", String(64), nullable=False),
    Column("until", BigInteger, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("dataset", Text, nullable=False),
    Column("dataset_fingerprint", String(64), nullable=False),
    Column("folder", Text, nullable=False, unique=True),
    Column("files", JSON, nullable=False),
    Column("details", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("deprecated_at", UtcDateTime),
    Column("sunset_at", UtcDateTime),
    Column("retired_at", UtcDateTime),
    Column("weights_deleted_at", UtcDateTime),
    Column("note", Text),
    CheckConstraint("parent IS NULL OR parent < number", name="parent_is_older"),
    CheckConstraint("dim > 0", name="dim_positive"),
    _one_of("state", VersionState),
)

transforms = Table(
    "transforms",
    metadata,
    Column("source", Integer, ForeignKey("versions.number"), primary_key=True),
    Column("target", Integer, ForeignKey("versions.number"), primary_key=True),
    Column("direct", Boolean, primary_key=True),
    Column("rows", Integer, nullable=False),
    Column("cols", Integer, nullable=False),
    Column("affine", Boolean, nullable=False),
    Column("file", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("target < source", name="target_is_older"),
)

snapshots = Table(
    "snapshots",
    metadata,
    _id("id", primary_key=True),
    Column("version", Integer, ForeignKey("versions.number"), nullable=False, index=True),
    Column("dim", Integer, nullable=False),
    Column("counts", JSON, nullable=False),
    Column("folder", Text, nullable=False, unique=True),
    Column("manifest_sha256", String(64), nullable=False),
    Column("head", Integer, nullable=False, default=0),
    Column("details", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("superseded_at", UtcDateTime),
    Column("condemned_at", UtcDateTime),
    Column("deleted_at", UtcDateTime),
    Column("base_snapshot", String(64)),
    Column("base_delta", Integer),
)

deltas = Table(
    "deltas",
    metadata,
    _id("snapshot", "snapshots.id", primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("entity", String(16), nullable=False),
    Column("count", Integer, nullable=False),
    Column("file", Text, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("actor", String(128), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("number > 0", name="number_positive"),
    CheckConstraint("kind IN ('upsert', 'erase')", name="kind_known"),
    _one_of("entity", Entity),
)

operations = Table(
    "operations",
    metadata,
    _id("id", primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("progress", Float, nullable=False, default=0.0),
    Column("step", String(64), nullable=False, default=""),
    Column("request", JSON, nullable=False),
    Column("result", JSON),
    Column("error", JSON),
    Column("actor", String(128), nullable=False),
    Column("idempotency_key", String(128), unique=True),
    Column("owner", String(128)),
    Column("heartbeat_at", UtcDateTime),
    Column("created_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    Column("slot", String(16), index=True, unique=True),
    Column("beat", Integer, nullable=False, default=0, server_default="0"),
    Column("resumable", Boolean, nullable=False, default=False, server_default=false()),
    Column("act", Integer, index=True, unique=True),
    _one_of("state", OperationState),
)

deployments = Table(
    "deployments",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("version", Integer, ForeignKey("versions.number"), nullable=False),
    _id("snapshot", "snapshots.id", nullable=False),
    Column("from_version", Integer, ForeignKey("versions.number")),
    _id("from_snapshot", "snapshots.id"),
    Column("generation", Integer, nullable=False, unique=True),
    Column("actor", String(128), nullable=False),
    Column("reason", Text),
    Column("forced", Boolean, nullable=False),
    Column("gates", JSON, nullable=False),
    _id("operation", "operations.id"),
    Column("created_at", UtcDateTime, nullable=False),
    Column("delta", Integer, nullable=False, default=0, server_default="0"),
    Column("from_delta", Integer),
    CheckConstraint("kind IN ('promote', 'rollback', 'refresh')", name="kind_known"),
)

diffs = Table(
    "diffs",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", Integer, ForeignKey("versions.number"), nullable=False),
    Column("target", Integer, ForeignKey("versions.number"), nullable=False),
    _id("snapshot", "snapshots.id", nullable=False),
    _id("baseline_snapshot", "snapshots.id", nullable=False),
    Column("deployment", Integer, ForeignKey("deployments.id")),
    Column("figures", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("baseline_delta", Integer, nullable=False, default=0, server_default="0"),
    UniqueConstraint("deployment", "target"),
)

drifts = Table(
    "drifts",
    metadata,
    _id("snapshot", "snapshots.id", primary_key=True),
    _id("id", nullable=False, unique=True),
    Column("targets", JSON, nullable=False),
    Column("counts", JSON, nullable=False),
    Column("folder", Text, nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("unsettled", JSON, nullable=False),
    Column("figures", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

erasures = Table(
    "erasures",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("entity", String(16), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("actor", String(128), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("entity", "sha256"),
    _one_of("entity", Entity),
    sqlite_autoincrement=True,  # a number is never given again: it says what came later
)

live = Table(
    "live",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, ForeignKey("versions.number"), nullable=False),
    _id("snapshot", "snapshots.id", nullable=False),
    Column("delta", Integer, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    CheckConstraint("id = 1", name="single_row"),
)

consumers = Table(
    "consumers",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("pin", Integer, ForeignKey("versions.number")),
    Column("created_at", UtcDateTime, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("prefix", String(16), primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("consumer", Integer, ForeignKey("consumers.id"), nullable=False, index=True),
    Column("scope", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("successor", String(16)),
    _one_of("scope", Scope),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", UtcDateTime, nullable=False, index=True),
    Column("actor", String(128), nullable=False),
    Column("key", String(16)),
    Column("act", String(32), nullable=False),
    Column("target", String(256)),
    Column("reason", Text),
    Column("details", JSON, nullable=False),
    sqlite_autoincrement=True,
)
"""What was asked for, before it was begun. Triggers refuse to change or delete a row."""

audit_outcomes = Table(
    "audit_outcomes",
    metadata,
    Column("act", Integer, ForeignKey("audit.id"), primary_key=True, autoincrement=False),
    Column("at", UtcDateTime, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("code", String(64)),
    Column("details", JSON, nullable=False),
    _one_of("outcome", Outcome),
)
"""What became of it, once that is known. Triggers refuse to change or delete a row."""

usage = Table(
    "usage",
    metadata,
    Column("consumer", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("day", Date, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("vectors", BigInteger, nullable=False),
    ForeignKeyConstraint(["consumer"], ["consumers.id"]),
    ForeignKeyConstraint(["version"], ["versions.number"]),
)

Index(None, versions.c.parent)
Index(None, usage.c.version, usage.c.day)
