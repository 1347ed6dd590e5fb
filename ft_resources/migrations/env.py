"""Alembic's entry: runs on the connection that `ledger_schema.upgrade` hands over."""

from alembic import context

from ft_resources.ledger_schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
connection.commit()
