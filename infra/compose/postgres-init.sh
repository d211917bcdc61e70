#!/bin/sh
# The service runs as a role that may not rewrite the ledger; migrations run as the owner.
set -eu
psql --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --set=password="$POSTGRES_APP_PASSWORD" <<'SQL'
CREATE ROLE longdraft_runtime NOLOGIN;
CREATE ROLE longdraft_app LOGIN PASSWORD :'password' IN ROLE longdraft_runtime;
SQL
