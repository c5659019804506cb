"""Run by Alembic; the connection, already in a transaction, comes from `migrations.upgrade`."""

from alembic import context

from results import schema

connection = context.config.attributes.get("connection")
if connection is None:
    raise RuntimeError(
        "the results database is migrated by Store.open, not by the alembic command: "
        'run python -c "from results.store import Store; Store.open(URL)"'
    )
context.configure(
    connection=connection,
    target_metadata=schema.metadata,
    version_table=schema.VERSION_TABLE,
    transactional_ddl=True,  # also SQLite: our connections begin transactions themselves
)
with context.begin_transaction():
    context.run_migrations()
