from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mailgrpc.db.engine import Database
from tests.worker.rig import Clock, LossyDatabase, Store


@pytest.fixture
def store(db: Database) -> Store:
    return Store(db)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def lossy(database_url: str) -> AsyncIterator[LossyDatabase]:
    """The same database, over a line that a test can cut."""
    database = LossyDatabase(database_url)
    await database.open()
    yield database
    database.away = False
    await database.close()
