"""The registry's first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "operations",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("progress", sa.Float(), nullable=False),
        sa.Column("step", sa.String(length=64), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("idempotency_key", sa.String(length=128), nullable=True),
        sa.Column("owner", sa.String(length=128), nullable=True),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('pending', 'running', 'succeeded', 'failed')",
            name=op.f("ck_operations_state_known"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_operations")),
        sa.UniqueConstraint("idempotency_key", name=op.f("uq_operations_idempotency_key")),
    )
    op.create_table(
        "versions",
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("parent", sa.Integer(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("dim", sa.Integer(), nullable=False),
        sa.Column("method", sa.String(length=64), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("dataset", sa.Text(), nullable=False),
        sa.Column("dataset_fingerprint", sa.String(length=64), nullable=False),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("deprecated_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("sunset_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("retired_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("weights_deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "state IN ('registered', 'live', 'superseded', 'retired', 'rolled_back', 'rejected')",
            name=op.f("ck_versions_state_known"),
        ),
        sa.CheckConstraint("dim > 0", name=op.f("ck_versions_dim_positive")),
        sa.CheckConstraint(
            "parent IS NULL OR parent < number", name=op.f("ck_versions_parent_is_older")
        ),
        sa.ForeignKeyConstraint(["parent"], ["versions.number"], name=op.f("fk_versions_parent")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_versions")),
        sa.UniqueConstraint("folder", name=op.f("uq_versions_folder")),
    )
    with op.batch_alter_table("versions", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_versions_parent"), ["parent"], unique=False)

    op.create_table(
        "consumers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("pin", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["pin"], ["versions.number"], name=op.f("fk_consumers_pin")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_consumers")),
        sa.UniqueConstraint("name", name=op.f("uq_consumers_name")),
    )
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("dim", sa.Integer(), nullable=False),
        sa.Column("counts", sa.JSON(), nullable=False),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False),
        sa.Column("head", sa.Integer(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("superseded_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("condemned_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["version"], ["versions.number"], name=op.f("fk_snapshots_version")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_snapshots")),
        sa.UniqueConstraint("folder", name=op.f("uq_snapshots_folder")),
    )
    with op.batch_alter_table("snapshots", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_snapshots_version"), ["version"], unique=False)

    op.create_table(
        "transforms",
        sa.Column("source", sa.Integer(), nullable=False),
        sa.Column("target", sa.Integer(), nullable=False),
        sa.Column("direct", sa.Boolean(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("cols", sa.Integer(), nullable=False),
        sa.Column("affine", sa.Boolean(), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("target < source", name=op.f("ck_transforms_target_is_older")),
        sa.ForeignKeyConstraint(["source"], ["versions.number"], name=op.f("fk_transforms_source")),
        sa.ForeignKeyConstraint(["target"], ["versions.number"], name=op.f("fk_transforms_target")),
        sa.PrimaryKeyConstraint("source", "target", "direct", name=op.f("pk_transforms")),
    )
    op.create_table(
        "api_keys",
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("consumer", sa.Integer(), nullable=False),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("scope IN ('read', 'admin')", name=op.f("ck_api_keys_scope_known")),
        sa.ForeignKeyConstraint(["consumer"], ["consumers.id"], name=op.f("fk_api_keys_consumer")),
        sa.PrimaryKeyConstraint("prefix", name=op.f("pk_api_keys")),
    )
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_api_keys_consumer"), ["consumer"], unique=False)

    op.create_table(
        "deltas",
        sa.Column("snapshot", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("entity", sa.String(length=16), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("entity IN ('item', 'user')", name=op.f("ck_deltas_entity_known")),
        sa.CheckConstraint("kind IN ('upsert', 'erase')", name=op.f("ck_deltas_kind_known")),
        sa.CheckConstraint("number > 0", name=op.f("ck_deltas_number_positive")),
        sa.ForeignKeyConstraint(["snapshot"], ["snapshots.id"], name=op.f("fk_deltas_snapshot")),
        sa.PrimaryKeyConstraint("snapshot", "number", name=op.f("pk_deltas")),
    )
    op.create_table(
        "deployments",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("snapshot", sa.String(length=64), nullable=False),
        sa.Column("from_version", sa.Integer(), nullable=True),
        sa.Column("from_snapshot", sa.String(length=64), nullable=True),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("forced", sa.Boolean(), nullable=False),
        sa.Column("gates", sa.JSON(), nullable=False),
        sa.Column("operation", sa.String(length=64), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "kind IN ('promote', 'rollback', 'refresh')", name=op.f("ck_deployments_kind_known")
        ),
        sa.ForeignKeyConstraint(
            ["from_snapshot"], ["snapshots.id"], name=op.f("fk_deployments_from_snapshot")
        ),
        sa.ForeignKeyConstraint(
            ["from_version"], ["versions.number"], name=op.f("fk_deployments_from_version")
        ),
        sa.ForeignKeyConstraint(
            ["operation"], ["operations.id"], name=op.f("fk_deployments_operation")
        ),
        sa.ForeignKeyConstraint(
            ["snapshot"], ["snapshots.id"], name=op.f("fk_deployments_snapshot")
        ),
        sa.ForeignKeyConstraint(
            ["version"], ["versions.number"], name=op.f("fk_deployments_version")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_deployments")),
        sa.UniqueConstraint("generation", name=op.f("uq_deployments_generation")),
    )
    op.create_table(
        "live",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("snapshot", sa.String(length=64), nullable=False),
        sa.Column("delta", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_live_single_row")),
        sa.ForeignKeyConstraint(["snapshot"], ["snapshots.id"], name=op.f("fk_live_snapshot")),
        sa.ForeignKeyConstraint(["version"], ["versions.number"], name=op.f("fk_live_version")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_live")),
    )
    op.create_table(
        "usage",
        sa.Column("consumer", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("vectors", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["consumer"], ["consumers.id"], name=op.f("fk_usage_consumer")),
        sa.ForeignKeyConstraint(["version"], ["versions.number"], name=op.f("fk_usage_version")),
        sa.PrimaryKeyConstraint("consumer", "version", "day", name=op.f("pk_usage")),
    )
    with op.batch_alter_table("usage", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_usage_version_day"), ["version", "day"], unique=False)

    op.create_table(
        "diffs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("target", sa.Integer(), nullable=False),
        sa.Column("snapshot", sa.String(length=64), nullable=False),
        sa.Column("baseline_snapshot", sa.String(length=64), nullable=False),
        sa.Column("deployment", sa.Integer(), nullable=True),
        sa.Column("figures", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["baseline_snapshot"], ["snapshots.id"], name=op.f("fk_diffs_baseline_snapshot")
        ),
        sa.ForeignKeyConstraint(
            ["deployment"], ["deployments.id"], name=op.f("fk_diffs_deployment")
        ),
        sa.ForeignKeyConstraint(["snapshot"], ["snapshots.id"], name=op.f("fk_diffs_snapshot")),
        sa.ForeignKeyConstraint(["target"], ["versions.number"], name=op.f("fk_diffs_target")),
        sa.ForeignKeyConstraint(["version"], ["versions.number"], name=op.f("fk_diffs_version")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_diffs")),
        sa.UniqueConstraint(
            "snapshot",
            "baseline_snapshot",
            "target",
            name=op.f("uq_diffs_snapshot_baseline_snapshot_target"),
        ),
    )


def downgrade() -> None:
    op.drop_table("diffs")
    with op.batch_alter_table("usage", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_usage_version_day"))

    op.drop_table("usage")
    op.drop_table("live")
    op.drop_table("deployments")
    op.drop_table("deltas")
    with op.batch_alter_table("api_keys", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_api_keys_consumer"))

    op.drop_table("api_keys")
    op.drop_table("transforms")
    with op.batch_alter_table("snapshots", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_snapshots_version"))

    op.drop_table("snapshots")
    op.drop_table("consumers")
    with op.batch_alter_table("versions", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_versions_parent"))

    op.drop_table("versions")
    op.drop_table("operations")
