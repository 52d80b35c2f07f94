"""What commands share that ask the database: operations that the contract does not carry."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mailgrpc.cli import running
from mailgrpc.cli.process import load, told
from mailgrpc.db.engine import Database

T = TypeVar("T")


def with_database(work: Callable[[Database], Awaitable[T]]) -> T:
    """Run `work` on the database of the settings, or of a running `up`; errors end in one line."""
    settings = running.found(load())

    async def run() -> T:
        database = Database(settings.database_url, pool_size=1)
        try:
            return await work(database)
        finally:
            await database.close()

    with told():
        return asyncio.run(run())
