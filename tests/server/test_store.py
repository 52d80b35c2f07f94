"""What the pool makes of a PostgreSQL that answers, but not as it should."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from mailgrpc.db.engine import AmbiguousCommit, Database
from mailgrpc.errors import StoreUnavailable


@pytest.fixture
async def single(database_url: str) -> AsyncIterator[Database]:
    """A pool of one connection, so that a test meets the same one again."""
    database = Database(database_url, pool_size=1)
    yield database
    await database.close()


async def backend(database: Database) -> int:
    [(pid,)] = await database.fetch("SELECT pg_backend_pid()")
    return pid


async def test_a_connection_to_a_server_that_takes_no_writes_is_not_used_again(
    single: Database,
) -> None:
    await single.fetch("SELECT set_config('default_transaction_read_only', 'on', false)")
    before = await backend(single)
    with pytest.raises(StoreUnavailable) as caught:
        await single.write("UPDATE messages SET subject = ''")
    assert not isinstance(caught.value, AmbiguousCommit)
    assert await single.write("UPDATE messages SET subject = ''") == []
    assert await backend(single) != before


@pytest.mark.parametrize("sqlstate", ["53000", "53100", "53200", "57014", "55P03"])
async def test_no_space_and_no_time_are_the_stores_and_undone(
    single: Database, sqlstate: str
) -> None:
    before = await backend(single)
    with pytest.raises(StoreUnavailable) as caught:
        await single.write(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{sqlstate}'; END $$")
    assert not isinstance(caught.value, AmbiguousCommit)
    assert await backend(single) == before


async def test_patience_is_of_the_one_who_asked_for_it(single: Database) -> None:
    with pytest.raises(AmbiguousCommit):
        await single.with_patience(0.05).write("SELECT pg_sleep(0.3)")
    await single.write("SELECT pg_sleep(0.1)")
