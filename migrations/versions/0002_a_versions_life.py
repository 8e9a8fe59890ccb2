"""Deltas on snapshots, erasures, resumable operations, diffs and drift bounds, reasons."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("versions", sa.Column("note", sa.Text(), nullable=True))
    op.add_column("snapshots", sa.Column("base_snapshot", sa.String(length=64), nullable=True))
    op.add_column("snapshots", sa.Column("base_delta", sa.Integer(), nullable=True))
    op.add_column(
        "deployments", sa.Column("delta", sa.Integer(), nullable=False, server_default="0")
    )
    op.add_column("deployments", sa.Column("from_delta", sa.Integer(), nullable=True))
    op.add_column("operations", sa.Column("slot", sa.String(length=16), nullable=True))
    op.add_column("operations", sa.Column("beat", sa.Integer(), nullable=False, server_default="0"))
    op.add_column(
        "operations",
        sa.Column("resumable", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    # An index and no constraint: SQLite would have to make the table anew, which others refer to.
    op.create_index(op.f("ix_operations_slot"), "operations", ["slot"], unique=True)
    with op.batch_alter_table("diffs") as table:
        table.add_column(
            sa.Column("baseline_delta", sa.Integer(), nullable=False, server_default="0")
        )
        table.drop_constraint(op.f("uq_diffs_snapshot_baseline_snapshot_target"), type_="unique")
        table.create_unique_constraint(op.f("uq_diffs_deployment_target"), ["deployment", "target"])
    op.create_table(
        "drifts",
        sa.Column("snapshot", sa.String(length=64), nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("targets", sa.JSON(), nullable=False),
        sa.Column("counts", sa.JSON(), nullable=False),
        sa.Column("folder", sa.Text(), nullable=False),
        sa.Column("manifest_sha256", sa.String(length=64), nullable=False),
        sa.Column("unsettled", sa.JSON(), nullable=False),
        sa.Column("figures", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["snapshot"], ["snapshots.id"], name=op.f("fk_drifts_snapshot")),
        sa.PrimaryKeyConstraint("snapshot", name=op.f("pk_drifts")),
        sa.UniqueConstraint("id", name=op.f("uq_drifts_id")),
    )
    op.create_table(
        "erasures",
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("entity", sa.String(length=16), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("entity IN ('item', 'user')", name=op.f("ck_erasures_entity_known")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_erasures")),
        sa.UniqueConstraint("entity", "sha256", name=op.f("uq_erasures_entity_sha256")),
        sqlite_autoincrement=True,
    )


def downgrade() -> None:
    op.drop_table("erasures")
    op.drop_table("drifts")
    with op.batch_alter_table("diffs") as table:
        table.drop_constraint(op.f("uq_diffs_deployment_target"), type_="unique")
        table.create_unique_constraint(
            op.f("uq_diffs_snapshot_baseline_snapshot_target"),
            ["snapshot", "baseline_snapshot", "target"],
        )
        table.drop_column("baseline_delta")
    op.drop_index(op.f("ix_operations_slot"), "operations")
    for column in ("resumable", "beat", "slot"):
        op.drop_column("operations", column)
    op.drop_column("deployments", "from_delta")
    op.drop_column("deployments", "delta")
    op.drop_column("snapshots", "base_delta")
    op.drop_column("snapshots", "base_snapshot")
    op.drop_column("versions", "note")
