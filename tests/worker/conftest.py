from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mailgrpc.core.delivery import MOVES, State
from mailgrpc.core.event import EventKind
from mailgrpc.db.engine import Database
from tests.worker.rig import Clock, LossyDatabase, Store

pytest.register_assert_rewrite("tests.worker.world")


@pytest.fixture
async def store(db: Database) -> AsyncIterator[Store]:
    """The rows; whatever a test does, what happened is a move that the domain knows."""
    yield Store(db)
    moves = await db.fetch(
        "SELECT DISTINCT old_state, state FROM events WHERE kind = $1 AND old_state > 0",
        EventKind.STATE_CHANGED,
    )
    assert all(State(state) in MOVES[State(old)] for old, state in moves)


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
