"""Trainings that ended: what each was made from, what it took, what came of it."""

import sqlalchemy as sa
from alembic import op

from ft_resources.ledger_schema import UtcTime

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "training_runs",
        sa.Column("run_id", sa.String(64), primary_key=True),
        sa.Column("dagster_run_id", sa.String(64), nullable=False, index=True),
        sa.Column("task", sa.String(128), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("adapter", sa.String(64)),
        sa.Column("trained_from", sa.String(64), nullable=False),
        sa.Column("training_rows_digest", sa.String(64), nullable=False),
        sa.Column("validation_rows_digest", sa.String(64), nullable=False),
        sa.Column("base", sa.String(512), nullable=False),
        sa.Column("base_digest", sa.String(64), nullable=False),
        sa.Column("template", sa.String(128), nullable=False),
        sa.Column("method", sa.String(32), nullable=False),
        sa.Column("device", sa.String(64)),
        sa.Column("precision", sa.String(16)),
        sa.Column("rows", sa.BigInteger),
        sa.Column("tokens", sa.BigInteger),
        sa.Column("steps", sa.BigInteger),
        sa.Column("wall_seconds", sa.Float),
        sa.Column("cpu_seconds", sa.Float),
        sa.Column("gpu_seconds", sa.Float),
        sa.Column("peak_memory_bytes", sa.BigInteger),
        sa.Column("peak_gpu_memory_bytes", sa.BigInteger),
        sa.Column("energy_wh", sa.Float),
        sa.Column("energy_source", sa.String(32)),
        sa.Column("cost", sa.Float),
        sa.Column("accuracy", sa.Float),
        sa.Column("macro_f1", sa.Float),
        sa.Column("loss", sa.Float),
        sa.Column("started", UtcTime, nullable=False),
        sa.Column("ended", UtcTime, nullable=False),
        sa.Column("error", sa.String(64)),
    )
    op.create_index("training_runs_by_task_and_time", "training_runs", ["task", "started"])
