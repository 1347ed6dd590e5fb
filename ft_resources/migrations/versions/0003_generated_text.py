"""Answers that are texts, the decision on a label, and corrected texts in feedback."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    for column in (
        sa.Column("decision", sa.String(8)),
        sa.Column("output", sa.Text),
        sa.Column("finish_reason", sa.String(16)),
        sa.Column("prompt_tokens", sa.Integer),
        sa.Column("completion_tokens", sa.Integer),
    ):
        op.add_column("predictions", column)
    op.add_column("feedback", sa.Column("text", sa.Text))
