"""The schema, once. Migrations must agree with it (tested); stores query it through SQLAlchemy Core."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _at(name: str, *, nullable: bool = True, now: bool = False) -> Column:
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=func.now() if now else None)


def _count(name: str) -> Column:
    return Column(name, BigInteger, nullable=False, server_default=text("0"))


# --- who ----------------------------------------------------------------------------------------------------------------------

projects = Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    _at("created_at", nullable=False, now=True),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False, index=True),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("scopes", ARRAY(Text), nullable=False),
    _at("created_at", nullable=False, now=True),
    _at("last_used_at"),
    _at("revoked_at"),
)

files = Table(
    "files",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("storage_key", Text, nullable=False),
    _at("created_at", nullable=False, now=True),
    _at("expires_at"),
    _at("deleted_at"),
    Column("object_removed", Boolean, nullable=False, server_default=text("false")),
    Column("seq", BigInteger, Identity(), nullable=False, unique=True),  # listing order where created_at ties
    Index("ix_files_listing", "project_id", "seq"),
)

# How a project reaches its own buckets; the secret is encrypted with a key that the database does not have.
bucket_access = Table(
    "bucket_access",
    metadata,
    Column("project_id", ForeignKey("projects.id"), primary_key=True),
    Column("access_key_id", Text, nullable=False),
    Column("sealed_secret", LargeBinary, nullable=False),
    Column("endpoint_url", Text),
    Column("region", Text),
    Column("path_style", Boolean, nullable=False, server_default=text("false")),
    Column("checksums", Text, nullable=False),
    _at("updated_at", nullable=False, now=True),
)

# Files on their way into the object store by a presigned URL.
pending_uploads = Table(
    "pending_uploads",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text),
    Column("storage_key", Text, nullable=False),
    Column("file_expires_after", Integer),
    _at("created_at", nullable=False, now=True),
    _at("expires_at", nullable=False),
    Index("ix_pending_uploads_expires_at", "expires_at"),
)

# --- jobs ---------------------------------------------------------------------------------------------------------------------

batches = Table(
    "batches",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("api_key_id", ForeignKey("api_keys.id")),
    Column("status", Text, nullable=False),
    Column("outcome", Text),
    Column("endpoint", Text, nullable=False),
    Column("completion_window", Text, nullable=False),
    Column("input_file_id", ForeignKey("files.id")),
    Column("input_uri", Text),
    Column("input_etag", Text),
    Column("input_changed", Boolean),
    Column("output_uri", Text),
    Column("metadata", JSONB, nullable=False, server_default=text("'{}'")),
    Column("priority", SmallInteger, nullable=False, server_default=text("0")),
    Column("on_invalid_line", Text, nullable=False),
    Column("drafter", Text, nullable=False, server_default=text("'auto'")),
    Column("max_cost", Numeric(38, 0)),
    Column("price_version", ForeignKey("price_books.version"), nullable=False),
    Column("parent_batch_id", ForeignKey("batches.id")),
    Column("output_expires_after", Integer),
    Column("request_digest", LargeBinary),
    Column("model", Text),
    _count("total"),
    _count("completed"),
    _count("failed"),
    _count("input_tokens"),
    _count("cached_tokens"),
    _count("output_tokens"),
    _count("reasoning_tokens"),
    _count("commit_no"),
    Column("errors", JSONB, nullable=False, server_default=text("'[]'")),
    Column("output_file_id", ForeignKey("files.id")),
    Column("error_file_id", ForeignKey("files.id")),
    _at("created_at", nullable=False, now=True),
    _at("expires_at", nullable=False),
    _at("in_progress_at"),
    _at("finalizing_at"),
    _at("completed_at"),
    _at("failed_at"),
    _at("expired_at"),
    _at("cancelling_at"),
    _at("cancelled_at"),
    Column("seq", BigInteger, Identity(), nullable=False, unique=True),
    CheckConstraint("completed + failed <= total", name="counts"),
    CheckConstraint("input_file_id IS NOT NULL OR input_uri IS NOT NULL", name="input"),
    Index("ix_batches_listing", "project_id", "seq"),
    Index("ix_batches_open", "expires_at", postgresql_where=text("status IN ('validating', 'in_progress')")),
    Index("ix_batches_digest", "project_id", "request_digest", "seq"),
    Index("ix_batches_output", "output_uri", postgresql_where=text("output_uri IS NOT NULL")),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("project_id", ForeignKey("projects.id"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_digest", LargeBinary, nullable=False),
    Column("batch_id", ForeignKey("batches.id"), nullable=False),
    _at("created_at", nullable=False, now=True),
)

groups = Table(
    "groups",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("batch_id", ForeignKey("batches.id"), nullable=False, index=True),
    Column("model", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("priority", SmallInteger, nullable=False, server_default=text("0")),
    _at("expires_at", nullable=False),
    Column("lines", Integer, nullable=False),
    Column("expected_tokens", BigInteger, nullable=False),
    Column("suspect", Boolean, nullable=False, server_default=text("false")),
    _count("token"),
    Column("worker_id", Text),
    _at("lease_until"),
    _at("not_before", nullable=False, now=True),
    _at("closed_at"),
    # Claims walk this index in claim order and stop early.
    Index("ix_groups_due", "model", text("priority DESC"), "expires_at", "id", postgresql_where=text("closed_at IS NULL")),
    Index("ix_groups_leased", "worker_id", postgresql_where=text("closed_at IS NULL AND worker_id IS NOT NULL")),
)

lines = Table(
    "lines",
    metadata,
    Column("batch_id", ForeignKey("batches.id"), primary_key=True),
    Column("line_no", Integer, primary_key=True),
    Column("group_id", ForeignKey("groups.id")),
    Column("custom_id", Text),
    Column("byte_offset", BigInteger, nullable=False),
    Column("byte_length", Integer, nullable=False),
    Column("model", Text),
    Column("prefix_key", LargeBinary, nullable=False),
    Column("expected_tokens", Integer, nullable=False),
    Column("attempts", SmallInteger, nullable=False, server_default=text("0")),
    Index("ix_lines_group", "group_id", "line_no"),
)

segments = Table(
    "segments",
    metadata,
    Column("key", Text, primary_key=True),
    Column("batch_id", ForeignKey("batches.id"), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("worker_id", Text),
    _at("created_at", nullable=False, now=True),
)

line_results = Table(
    "line_results",
    metadata,
    Column("batch_id", ForeignKey("batches.id"), primary_key=True),
    Column("line_no", Integer, primary_key=True),
    Column("outcome", Text, nullable=False),
    Column("status_code", SmallInteger),
    Column("error_code", Text),
    Column("segment_key", ForeignKey("segments.key"), nullable=False),
    Column("byte_offset", BigInteger, nullable=False),
    Column("byte_length", Integer, nullable=False),
    _count("input_tokens"),
    _count("cached_tokens"),
    _count("output_tokens"),
    _count("reasoning_tokens"),
    Column("commit_no", BigInteger, nullable=False),
    _at("created_at", nullable=False, now=True),
    Index("ix_line_results_commit", "batch_id", "commit_no", "line_no"),
)

token_ledger = Table(
    "token_ledger",
    metadata,
    Column("batch_id", Text, primary_key=True),
    Column("line_no", Integer, primary_key=True),
    Column("drafter", Text),
    *(
        _count(name)
        for name in (
            "prompt",
            "cached",
            "prefilled",
            "recomputed",
            "generated",
            "sampled",
            "drafted",
            "verified",
            "accepted",
            "steps",
            "prefill_ns",
            "draft_ns",
            "decode_ns",
            "plain_ns",
            "modelled_ns",
        )
    ),
)

# --- the control process ------------------------------------------------------------------------------------------------------

outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("kind", Text, nullable=False),
    Column("batch_id", ForeignKey("batches.id")),
    Column("payload", JSONB, nullable=False, server_default=text("'{}'")),
    _count("token"),
    Column("owner", Text),
    _at("lease_until"),
    _at("not_before", nullable=False, now=True),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("last_error", Text),
    _at("created_at", nullable=False, now=True),
    _at("done_at"),
    Index(
        "uq_outbox_open",
        "kind",
        text("coalesce(batch_id, '')"),
        "payload",
        unique=True,
        postgresql_where=text("done_at IS NULL"),
    ),
    Index("ix_outbox_due", "not_before", "id", postgresql_where=text("done_at IS NULL")),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("device", Text, nullable=False),
    Column("model", Text),
    _at("started_at", nullable=False, now=True),
    _at("seen_at", nullable=False, now=True),
    _at("stopped_at"),
    _count("busy_ns"),
    _count("idle_ns"),
    _count("load_ns"),
    _count("profile_ns"),
    Column("tokens_per_second", Float, nullable=False, server_default=text("0")),
    Column("acceptance_length", Float, nullable=False, server_default=text("0")),
)

# Every time a worker loaded a model, or could not: how a start was spent, and which models nobody can load.
model_loads = Table(
    "model_loads",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("worker_id", ForeignKey("workers.id"), nullable=False, index=True),
    Column("model", Text, nullable=False),
    Column("batch_id", ForeignKey("batches.id")),
    _at("claimed_at", nullable=False),
    _at("ended_at", nullable=False, now=True),
    _at("first_result_at"),
    Column("profile_reused", Boolean, nullable=False, server_default=text("false")),
    *(_count(name) for name in ("spawn_ns", "load_ns", "profile_ns", "prefill_ns", "decode_ns")),
    Column("error", Text),
    Column("lasting", Boolean, nullable=False, server_default=text("false")),
    Index("ix_model_loads_model", "model", "ended_at"),
)

# --- money --------------------------------------------------------------------------------------------------------------------

price_books = Table(
    "price_books",
    metadata,
    Column("version", Integer, primary_key=True),
    _at("created_at", nullable=False, now=True),
)

prices = Table(
    "prices",
    metadata,
    Column("version", ForeignKey("price_books.version"), primary_key=True),
    Column("model", Text, primary_key=True),  # '*' prices every model without a row of its own
    Column("input", BigInteger, nullable=False),
    Column("cached_input", BigInteger, nullable=False),
    Column("output", BigInteger, nullable=False),
    CheckConstraint("input >= 0 AND cached_input >= 0 AND output >= 0", name="not_negative"),
)

ledger_transactions = Table(
    "ledger_transactions",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False),
    Column("batch_id", ForeignKey("batches.id"), nullable=False),
    Column("line_no", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("price_version", ForeignKey("price_books.version"), nullable=False),
    _at("created_at", nullable=False, now=True),
    UniqueConstraint("batch_id", "line_no", "kind"),
    Index("ix_ledger_transactions_report", "created_at", "project_id"),
)

ledger_entries = Table(
    "ledger_entries",
    metadata,
    Column("transaction_id", ForeignKey("ledger_transactions.id"), primary_key=True),
    Column("leg", SmallInteger, primary_key=True),
    Column("account", Text, nullable=False, index=True),
    Column("amount", Numeric(38, 0), nullable=False),  # femto-dollars; debit positive
    Column("meter", Text),
    Column("quantity", BigInteger, nullable=False, server_default=text("0")),
    Column("rate", BigInteger, nullable=False, server_default=text("0")),
)

# Only batches with a cap (max_cost) have rows in these two.
spending = Table(
    "spending",
    metadata,
    Column("batch_id", ForeignKey("batches.id"), primary_key=True),
    Column("charged", Numeric(38, 0), nullable=False, server_default=text("0")),
)

reservations = Table(
    "reservations",
    metadata,
    Column("batch_id", ForeignKey("spending.batch_id"), primary_key=True),
    Column("line_no", Integer, primary_key=True),
    Column("group_id", BigInteger, nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("amount", Numeric(38, 0), nullable=False),
)
