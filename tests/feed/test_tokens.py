"""A token goes on where it was given, for as long as that history exists; else it says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import grpc
import pytest

from mailgrpc.config import Settings
from mailgrpc.core.place import Position, decode_token, encode_token
from mailgrpc.db.engine import Database
from mailgrpc.db.events import drop_events, read_place
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.feed.reading import Stream, all_after, event_id, faults, nudge, table, watching
from tests.feed.writing import enqueue, message
from tests.gateway import Gateway
from tests.server.answers import Refusal, refusal_of


async def token_now(server: Gateway) -> str:
    async with watching(server.stub) as stream:
        return stream.token


async def refused(server: Gateway, token: str) -> Refusal:
    """How a stream and a list refuse a token: alike."""
    listed = await refusal_of(server.stub.ListEvents(pb.ListEventsRequest(resume_token=token)))
    streamed = await Stream(server.stub, resume_token=token).refusal()
    assert (streamed.code, streamed.reason) == (listed.code, listed.reason)
    return streamed


def is_expired(refusal: Refusal) -> bool:
    return (refusal.code, refusal.reason) == (
        grpc.StatusCode.OUT_OF_RANGE,
        "RESUME_TOKEN_EXPIRED",
    )


async def test_a_token_outlives_the_server_that_gave_it(settings: Settings, db: Database) -> None:
    async with Gateway(settings, worker=False) as first:
        token = await token_now(first)
        await enqueue(db, message())
    await enqueue(db, message())
    async with Gateway(settings, worker=False) as second:
        assert faults(await all_after(second.stub, token), await table(db)) == []


async def test_a_server_that_goes_away_says_so_and_the_token_goes_on_elsewhere(
    server: Gateway, other_server: Gateway, db: Database
) -> None:
    async with watching(server.stub) as stream:
        await enqueue(db, message())
        nudge(server)
        await stream.until_events(1)
        await server.server.stop(5.0)
        refusal = await stream.refusal()
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert refusal.retry_s == 0
    await enqueue(db, message())
    rest = await all_after(other_server.stub, stream.token)
    assert faults(stream.events + rest, await table(db)) == []


async def test_a_token_before_what_was_dropped_has_expired(server: Gateway, db: Database) -> None:
    old = await token_now(server)
    await enqueue(db, message("ada@example.test", "bob@example.test"))
    between = await server.stub.ListEvents(pb.ListEventsRequest(resume_token=old, page_size=1))
    behind = await token_now(server)
    assert await drop_events(db, older_than_s=0.0) == 2

    assert is_expired(await refused(server, old))
    assert is_expired(await refused(server, between.resume_token))
    assert await all_after(server.stub, behind) == []
    await enqueue(db, message())
    assert len(await all_after(server.stub, behind)) == 1


async def test_a_stream_can_begin_now_when_all_history_was_dropped(
    settings: Settings, db: Database
) -> None:
    """Else a lane that nobody writes any more would end every new stream."""
    await enqueue(db, message(), lane=3)
    await drop_events(db, older_than_s=0.0)
    # A server that was idle meanwhile may have learnt a second ago where the feed ended: before what is dropped
    # here, which no history of days is.
    async with Gateway(settings, worker=False) as server, watching(server.stub) as stream:
        await enqueue(db, message(), lane=3)
        nudge(server)
        await stream.until_events(1)
        assert await all_after(server.stub, stream.token) == []


async def test_a_drop_that_was_cut_short_is_finished_by_the_next(db: Database) -> None:
    """The horizon had moved, and then nothing was deleted."""
    await enqueue(db, message(), message())
    await db.write("UPDATE feed_horizon SET seq = (SELECT max(seq) FROM events) WHERE lane = 0")
    await enqueue(db, message())
    for _ in range(3):
        assert await drop_events(db, older_than_s=0.0, limit=1) == 1
    assert await drop_events(db, older_than_s=0.0) == 0
    assert not await table(db)


async def test_only_what_is_old_enough_is_dropped(db: Database) -> None:
    await enqueue(db, message("ada@example.test", "bob@example.test"))
    await db.write("UPDATE events SET occurred_at = occurred_at - interval '73 hours'")
    await enqueue(db, message("eve@example.test"))
    assert await drop_events(db, older_than_s=72 * 3600.0) == 2
    assert [row["recipient"] for row in await table(db)] == ["eve@example.test"]


async def test_a_reader_under_whom_history_is_dropped_is_told(
    server: Gateway, db: Database
) -> None:
    """It holds a page and asks for the next, which is not whole any more."""
    token = await token_now(server)
    await enqueue(db, *(message(custom_args={"n": "x" * 250}) for _ in range(4000)))
    stream = Stream(server.stub, resume_token=token)
    await stream.until(lambda s: len(s.events) > 0)
    await drop_events(db, older_than_s=0.0)
    assert is_expired(await stream.refusal())
    assert len(stream.events) < 4000


async def test_a_token_of_a_lost_history_has_expired(server: Gateway, db: Database) -> None:
    """As after a fail-over to a standby that had not got the last commits."""
    await enqueue(db, message(), message())
    token = await token_now(server)
    assert await all_after(server.stub, token) == []
    await db.write("UPDATE events SET fingerprint = fingerprint # 1")
    assert is_expired(await refused(server, token))
    await db.write("DELETE FROM events")
    assert is_expired(await refused(server, token))


async def test_streams_end_when_the_database_turns_out_to_have_another_history(
    server: Gateway, db: Database
) -> None:
    async with watching(server.stub) as live:
        await enqueue(db, message())
        nudge(server)
        await live.until_events(1)
        await db.write("UPDATE events SET fingerprint = fingerprint # 1")
        nudge(server)
        assert is_expired(await live.refusal())
    async with watching(server.stub) as anew:
        await enqueue(db, message())
        nudge(server)
        await anew.until_events(1)


async def test_a_token_that_nobody_gave_is_refused(server: Gateway, db: Database) -> None:
    await enqueue(db, message())
    good = await token_now(server)
    place: dict[int, Any] = await read_place(db)
    beyond = {lane: replace(p, seq=2**63) for lane, p in place.items()}
    for bad in (
        good[:-1],
        good + "A",
        good[1:],
        good.swapcase(),
        good + "=",
        "0" * 40,
        "%%%",
        "täuschung",
        "x" * 10_000,
        encode_token(2, place),
        encode_token(1, beyond),
    ):
        refusal = await refused(server, bad)
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.violations == (("resume_token", "INVALID_TOKEN"),)


async def test_a_lane_that_does_not_exist_has_expired(server: Gateway) -> None:
    assert is_expired(await refused(server, encode_token(1, {99: Position(1)})))


@pytest.mark.parametrize("size", [1, 7, 100])
async def test_every_token_of_a_long_backlog_gives_exactly_the_rest(
    server: Gateway, db: Database, size: int
) -> None:
    """Lanes and other projects' events lie between; pages are cut anywhere."""
    begin = await token_now(server)
    for number in range(20):
        new = [message(f"{n}@example.test", project_id=1 + n % 3 % 2) for n in range(12)]
        await enqueue(db, *new, lane=number % 5)
    expected = [event_id(row) for row in await table(db)]
    token, seen = begin, 0
    while seen < len(expected):
        request = pb.ListEventsRequest(resume_token=token, page_size=size)
        page = await server.stub.ListEvents(request)
        assert [e.event_id for e in page.events] == expected[seen : seen + len(page.events)]
        seen += len(page.events)
        token = page.resume_token
        assert page.more or seen == len(expected)
        if seen % 20 < size:
            rest = await all_after(server.stub, token)
            assert [e.event_id for e in rest] == expected[seen:]
    assert decode_token(1, token).keys() == decode_token(1, await token_now(server)).keys()


async def test_every_token_of_a_stream_gives_exactly_the_rest(
    server: Gateway, db: Database
) -> None:
    begin = await token_now(server)
    for number in range(6):
        new = [message(custom_args={f"{n}": "x" * 256 for n in range(8)}) for _ in range(100)]
        await enqueue(db, *new, lane=number % 3)
    stream = Stream(server.stub, resume_token=begin)
    points = []
    while not stream.caught_up:
        response = await stream.read()
        assert len(response.events) == 1 or response.ByteSize() <= 256 * 1024 + 1024
        points.append((response.resume_token, len(stream.events)))
    stream.call.cancel()
    assert len(points) > 5
    assert stream.ids == [event_id(row) for row in await table(db)]
    for token, seen in points:
        rest = await all_after(server.stub, token)
        assert [e.event_id for e in rest] == stream.ids[seen:]
