"""Alembic's folder. `longdraft db upgrade` runs it; nothing here is imported by the service but its location."""
