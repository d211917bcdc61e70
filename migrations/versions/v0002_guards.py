"""What the database itself refuses, the runtime role, and the first price book and project."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

IMMUTABLE = ("ledger_transactions", "ledger_entries", "prices", "price_books")
ROLE = "longdraft_runtime"


def upgrade() -> None:
    op.execute(
        """
        CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE EXCEPTION '% on % is refused: its rows are permanent, corrections are new rows', TG_OP, TG_TABLE_NAME
                USING ERRCODE = 'restrict_violation';
        END $$;

        CREATE FUNCTION refuse_unbalanced() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE
            unbalanced bigint;
        BEGIN
            SELECT transaction_id INTO unbalanced FROM added GROUP BY transaction_id HAVING sum(amount) <> 0 LIMIT 1;
            IF FOUND THEN
                RAISE EXCEPTION 'the legs of ledger transaction % do not sum to zero', unbalanced USING ERRCODE = 'check_violation';
            END IF;
            RETURN NULL;
        END $$;

        -- All legs of a transaction come in one statement, so the sums are checked once a statement.
        CREATE TRIGGER balanced AFTER INSERT ON ledger_entries
            REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION refuse_unbalanced();

        CREATE TRIGGER no_update BEFORE UPDATE ON line_results FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
        """
    )
    for table in IMMUTABLE:
        op.execute(
            f"CREATE TRIGGER permanent BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )
    _grant()
    op.execute("INSERT INTO price_books (version) VALUES (1)")
    # Nano-dollars per million tokens: $0.02 input, $0.01 cached input, $0.06 output, until the operator sets prices of their own.
    op.execute(
        """
        INSERT INTO prices (version, model, input, cached_input, output)
        SELECT 1, model, 20000000, 10000000, 60000000 FROM (VALUES ('*'), ('smollm2-135m')) AS models (model)
        """
    )
    op.execute("INSERT INTO projects (id, name) VALUES ('proj_default', 'default')")


def _grant() -> None:
    """The service's role may add to the ledger and never rewrite it. Where the owner may not create roles, the operator grants by hand."""
    refused = ", ".join(IMMUTABLE)
    op.execute(
        f"""
        DO $$
        BEGIN
            IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{ROLE}') THEN
                IF NOT (SELECT rolcreaterole OR rolsuper FROM pg_roles WHERE rolname = current_user) THEN
                    RAISE NOTICE 'role {ROLE} does not exist and % may not create it: no grants made', current_user;
                    RETURN;
                END IF;
                CREATE ROLE {ROLE} NOLOGIN;
            END IF;
            EXECUTE format('GRANT USAGE ON SCHEMA %I TO {ROLE}', current_schema());
            EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA %I TO {ROLE}', current_schema());
            EXECUTE format('GRANT USAGE ON ALL SEQUENCES IN SCHEMA %I TO {ROLE}', current_schema());
            EXECUTE format('ALTER DEFAULT PRIVILEGES IN SCHEMA %I GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {ROLE}', current_schema());
            EXECUTE format('ALTER DEFAULT PRIVILEGES IN SCHEMA %I GRANT USAGE ON SEQUENCES TO {ROLE}', current_schema());
            REVOKE UPDATE, DELETE, TRUNCATE ON {refused} FROM {ROLE};
            REVOKE UPDATE ON line_results FROM {ROLE};
            REVOKE INSERT, UPDATE, DELETE ON alembic_version FROM {ROLE};
        END $$;
        """  # noqa: S608 - names are constants of this file
    )


def downgrade() -> None:
    for table in IMMUTABLE:
        op.execute(f"DROP TRIGGER permanent ON {table}")
    op.execute("DROP TRIGGER balanced ON ledger_entries; DROP TRIGGER no_update ON line_results")
    op.execute("DROP FUNCTION refuse_change(); DROP FUNCTION refuse_unbalanced()")
    op.execute("TRUNCATE prices, price_books, projects CASCADE")
