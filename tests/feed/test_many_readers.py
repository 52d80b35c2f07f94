"""Many streams that are opened at once: what they ask the database, and what waits for it beside them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mailgrpc.doorbell import Doorbell
from mailgrpc.server import feed
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.gateway import PATIENCE_S, Gateway, enqueue

STREAMS = 40  # several times the connections of a process


@pytest.fixture
def at_rest(server_only: Gateway) -> feed.Feed:
    """A feed of the same database that follows nothing, so that only the test asks."""
    return feed.Feed(server_only.database, Doorbell(None))


async def test_where_the_feed_ends_is_asked_once_for_all_who_ask_together(
    server_only: Gateway, at_rest: feed.Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read_place = 0, feed.read_place

    async def counted(database: Any) -> Any:
        nonlocal asked
        asked += database is server_only.database  # the server's own feed has another
        return await read_place(database)

    monkeypatch.setattr(feed, "read_place", counted)
    places = await asyncio.gather(*(at_rest.now() for _ in range(STREAMS)))
    assert places == [places[0]] * STREAMS
    assert asked == 1


async def test_who_asks_while_it_is_being_asked_is_told_of_a_later_moment(
    server_only: Gateway, at_rest: feed.Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_place, has_read, may_answer = feed.read_place, asyncio.Event(), asyncio.Event()

    async def late(database: Any) -> Any:
        place = await read_place(database)
        if database is not server_only.database:  # the server's own feed, which goes on
            return place
        has_read.set()
        await may_answer.wait()
        return place

    monkeypatch.setattr(feed, "read_place", late)
    first = asyncio.create_task(at_rest.now())
    await has_read.wait()
    await server_only.stub.Enqueue(enqueue())
    second = asyncio.create_task(at_rest.now())
    await asyncio.sleep(0)
    may_answer.set()
    assert await first != await second


async def test_one_who_gives_up_takes_the_answer_from_nobody(at_rest: feed.Feed) -> None:
    one, other = (asyncio.create_task(at_rest.now()) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    assert await other == await at_rest.now()


async def test_mail_is_stored_while_many_readers_look_at_the_table(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking, most, may_end = 0, 0, asyncio.Event()

    async def held(database: Any, place: Any, limit: int) -> list[Any]:
        nonlocal looking, most
        looking += 1
        most = max(most, looking)
        async with database._connection():
            await may_end.wait()
        looking -= 1
        return []

    monkeypatch.setattr(feed, "read_events", held)
    streams = [server_only.stub.WatchStatus(pb.WatchStatusRequest()) for _ in range(STREAMS)]
    async with asyncio.timeout(PATIENCE_S):
        for stream in streams:
            assert (await stream.read()).caught_up
        await server_only.stub.Enqueue(enqueue())
    may_end.set()
    for stream in streams:
        stream.cancel()
    assert 1 < most <= feed._LOOKS_AT_ONCE + 1  # and the one who reads for all
