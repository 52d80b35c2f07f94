"""Alembic's entry: run the migrations over asyncpg, one process at a time."""

from __future__ import annotations

import asyncio

import sqlalchemy as sa
from alembic import context
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from mailgrpc.db.connecting import SCHEMA, Connection, Connector, told_at_start
from mailgrpc.errors import StoreUnavailable

_LOCK = 0x6D67_0000_0000  # any number that no other program takes


def run(connection: sa.Connection) -> None:
    # Before all else: two that make the schema at once collide, IF NOT EXISTS or not.
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    context.configure(connection=connection, version_table_schema=SCHEMA)
    with context.begin_transaction():
        context.run_migrations()


async def main() -> None:
    connector = Connector(context.config.attributes["database_url"])

    async def open_connection() -> Connection:
        try:
            return await connector.connect(
                command_timeout=None, application_name="mailgrpc migrate"
            )
        except StoreUnavailable as error:
            raise told_at_start(error) from error

    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=open_connection, poolclass=NullPool
    )
    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()


asyncio.run(main())
