"""Rotated keys, and the audit log, which can be added to and not changed."""

import sqlalchemy as sa
from alembic import op

revision = "0003_for_0002"
down_revision = "0002"

_LOG = ("audit", "audit_outcomes")


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("successor", sa.String(length=16), nullable=True))
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("key", sa.String(length=16), nullable=True),
        sa.Column("act", sa.String(length=32), nullable=False),
        sa.Column("target", sa.String(length=256), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_audit_at"), "audit", ["at"])
    op.create_table(
        "audit_outcomes",
        sa.Column("act", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("code", sa.String(length=64), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.CheckConstraint(
            "outcome IN ('succeeded', 'refused', 'failed')",
            name=op.f("ck_audit_outcomes_outcome_known"),
        ),
        sa.ForeignKeyConstraint(["act"], ["audit.id"], name=op.f("fk_audit_outcomes_act")),
        sa.PrimaryKeyConstraint("act", name=op.f("pk_audit_outcomes")),
    )
    # No foreign key: SQLite would have to make the table anew, which others refer to.
    op.add_column("operations", sa.Column("act", sa.Integer(), nullable=True))
    op.create_index(op.f("ix_operations_act"), "operations", ["act"], unique=True)
    if op.get_bind().dialect.name == "sqlite":
        _seal_on_sqlite()
    else:
        _seal_on_postgresql()


def _seal_on_sqlite() -> None:
    for table, column in zip(_LOG, ("id", "act"), strict=True):
        refused = f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} {refused}"
            )
        # INSERT OR REPLACE deletes what is in its way, and asks no trigger of deletions.
        op.execute(
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} "
            f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {column} = NEW.{column}) {refused}"
        )


def _seal_on_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION refuse_to_change_the_log() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$"
    )
    for table in _LOG:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_to_change_the_log()"
        )


def downgrade() -> None:
    op.drop_index(op.f("ix_operations_act"), "operations")
    op.drop_column("operations", "act")
    op.drop_table("audit_outcomes")  # the triggers go with their tables
    op.drop_index(op.f("ix_audit_at"), "audit")
    op.drop_table("audit")
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP FUNCTION refuse_to_change_the_log()")
    op.drop_column("api_keys", "successor")
