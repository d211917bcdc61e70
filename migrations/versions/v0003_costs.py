"""What plain decoding would have taken, and spending against a batch's cap."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("plain_ns", "modelled_ns"):
        op.add_column("token_ledger", sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.create_table(
        "spending",
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("charged", sa.Numeric(precision=38, scale=0), server_default=sa.text("0"), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_spending_batch_id")),
        sa.PrimaryKeyConstraint("batch_id", name=op.f("pk_spending")),
    )
    op.create_table(
        "reservations",
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("line_no", sa.Integer(), nullable=False),
        sa.Column("group_id", sa.BigInteger(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("amount", sa.Numeric(precision=38, scale=0), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["spending.batch_id"], name=op.f("fk_reservations_batch_id")),
        sa.PrimaryKeyConstraint("batch_id", "line_no", name=op.f("pk_reservations")),
    )


def downgrade() -> None:
    op.drop_table("reservations")
    op.drop_table("spending")
    for name in ("modelled_ns", "plain_ns"):
        op.drop_column("token_ledger", name)
