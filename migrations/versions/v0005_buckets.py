"""Jobs from bucket to bucket: a project's own credentials, the version of an input object, files put by presigned URL."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("batches", sa.Column("input_etag", sa.Text(), nullable=True))
    op.add_column("batches", sa.Column("input_changed", sa.Boolean(), nullable=True))
    op.create_index("ix_batches_output", "batches", ["output_uri"], unique=False, postgresql_where=sa.text("output_uri IS NOT NULL"))
    op.create_table(
        "bucket_access",
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("access_key_id", sa.Text(), nullable=False),
        sa.Column("sealed_secret", sa.LargeBinary(), nullable=False),
        sa.Column("endpoint_url", sa.Text(), nullable=True),
        sa.Column("region", sa.Text(), nullable=True),
        sa.Column("path_style", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("checksums", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_bucket_access_project_id")),
        sa.PrimaryKeyConstraint("project_id", name=op.f("pk_bucket_access")),
    )
    op.create_table(
        "pending_uploads",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=True),
        sa.Column("storage_key", sa.Text(), nullable=False),
        sa.Column("file_expires_after", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_pending_uploads_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pending_uploads")),
    )
    op.create_index("ix_pending_uploads_expires_at", "pending_uploads", ["expires_at"], unique=False)


def downgrade() -> None:
    op.drop_table("pending_uploads")
    op.drop_table("bucket_access")
    op.drop_index("ix_batches_output", table_name="batches", postgresql_where=sa.text("output_uri IS NOT NULL"))
    op.drop_column("batches", "input_changed")
    op.drop_column("batches", "input_etag")
