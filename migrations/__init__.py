"""Alembic migrations of the registry: `backcast db upgrade`."""
