"""Every load of a model by a worker: where the time of a start went, and why a model could not be loaded."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "model_loads",
        sa.Column("id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("worker_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=True),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("first_result_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("profile_reused", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        *(
            sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False)
            for name in ("spawn_ns", "load_ns", "profile_ns", "prefill_ns", "decode_ns")
        ),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("lasting", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_model_loads_batch_id")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_model_loads_worker_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_loads")),
    )
    op.create_index(op.f("ix_model_loads_worker_id"), "model_loads", ["worker_id"])
    op.create_index("ix_model_loads_model", "model_loads", ["model", "ended_at"])


def downgrade() -> None:
    op.drop_table("model_loads")
