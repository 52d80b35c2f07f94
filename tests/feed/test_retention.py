"""Whole old days are dropped once nothing in them lives, and everybody who watches is told."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import asyncpg
import grpc
import pytest

from mailgrpc.core.delivery import State
from mailgrpc.core.ids import MESSAGE, new_message_id, to_text
from mailgrpc.db.days import drop_days, make_days
from mailgrpc.db.engine import Database
from mailgrpc.db.messages import NewMessage
from mailgrpc.db.retention import forget_old_requests
from mailgrpc.v1 import event_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.feed.reading import all_after, nudge, watching
from tests.feed.writing import Sender, deliveries_of, enqueue, message
from tests.gateway import Gateway

CLEARED = event_pb2.EVENT_KIND_MESSAGES_CLEARED
DAY = timedelta(days=1)
KEPT_DAYS = 7
LATER = KEPT_DAYS + 2
"""So many days from now, today's range is older than the retention, and was looked at."""


@pytest.fixture
async def sender(db: Database) -> Sender:
    await make_days(db, KEPT_DAYS)
    return await Sender.open(db)


async def sent(db: Database, sender: Sender, *new: NewMessage) -> None:
    await enqueue(db, *new)
    await sender.record(await sender.start())


TODAY = "before"
"""The range that today lies in: of a database that was migrated today it is the first."""


async def drops_today(db: Database, days: float) -> bool:
    """Whether the chores drop today's range in so many days."""
    return TODAY in await drop_days(db, 0, KEPT_DAYS, now=datetime.now(UTC) + days * DAY)


async def dropped_in(db: Database, days: float) -> bool:
    """The same, after they looked a day before."""
    return await drops_today(db, days - 1) or await drops_today(db, days)


async def rows(db: Database) -> list[int]:
    tables = ("messages", "deliveries", "attempts", "attachments")
    return [(await db.fetch(f"SELECT count(*) FROM {t}"))[0][0] for t in tables]


async def status_code(server: Gateway, message_id: uuid.UUID) -> grpc.StatusCode:
    try:
        await server.stub.GetStatus(pb.GetStatusRequest(message_id=to_text(MESSAGE, message_id)))
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_a_day_whose_all_has_ended_is_dropped(
    server: Gateway, db: Database, sender: Sender
) -> None:
    await sent(db, sender, message("a@example.test", "b@example.test"), old := message())
    assert await status_code(server, old.message_id) == grpc.StatusCode.OK
    assert not await dropped_in(db, KEPT_DAYS)  # it is not all of it old enough
    assert await dropped_in(db, LATER)
    assert await rows(db) == [0, 0, 0, 0]
    assert await status_code(server, old.message_id) == grpc.StatusCode.NOT_FOUND
    # What comes after is taken in, sent and found.
    await sent(db, sender, new := message())
    assert await status_code(server, new.message_id) == grpc.StatusCode.OK


async def test_a_day_with_something_that_waits_is_kept_until_a_day_after_its_end(
    db: Database, sender: Sender
) -> None:
    await sent(db, sender, message(), message())
    await enqueue(db, waiting := message())
    assert not await dropped_in(db, LATER)
    assert (await rows(db))[:2] == [3, 3]
    started = await sender.start()
    assert [s.delivery.delivery_id for s in started] == deliveries_of([waiting])
    assert not await drops_today(db, LATER)  # it is being sent
    await sender.record(started)
    assert not await drops_today(db, LATER)
    assert not await drops_today(db, LATER + 0.9)
    assert (await rows(db))[:2] == [3, 3]
    assert await drops_today(db, LATER + 1.1)


async def test_what_is_scheduled_for_much_later_keeps_its_day(db: Database, sender: Sender) -> None:
    await sent(db, sender, message())
    await enqueue(db, waiting := message())
    await db.write("DELETE FROM due")
    await db.write(
        """INSERT INTO scheduled SELECT id, channel, project_id, priority, now() + interval '29 days'
           FROM deliveries WHERE id = $1""",
        deliveries_of([waiting])[0],
    )
    assert not await dropped_in(db, LATER)


async def test_a_kept_day_does_not_keep_those_after_it(db: Database, sender: Sender) -> None:
    await enqueue(db, message())
    now = datetime.now(UTC)
    await drop_days(db, 0, KEPT_DAYS, now=now + LATER * DAY)
    dropped = await drop_days(db, 0, KEPT_DAYS, now=now + (LATER + 1) * DAY)
    assert dropped
    assert TODAY not in dropped


async def test_what_is_sent_again_meanwhile_keeps_its_day(db: Database, sender: Sender) -> None:
    await sent(db, sender, old := message())
    assert not await drops_today(db, LATER - 1)
    assert await sender.resend(deliveries_of([old])) == 1
    assert not await drops_today(db, LATER)
    [started] = await sender.start()
    assert started.delivery.state is State.SENDING


async def test_a_result_that_comes_after_its_day_was_dropped_changes_nothing(
    db: Database, sender: Sender
) -> None:
    await enqueue(db, message())
    started = await sender.start()
    await sender.record(started)
    assert await dropped_in(db, LATER)
    await sender.record(started)
    assert await rows(db) == [0, 0, 0, 0]


async def test_every_project_that_watches_is_told(
    server: Gateway, other_server: Gateway, db: Database, sender: Sender
) -> None:
    await sent(db, sender, message())
    [(other,)] = await db.write("INSERT INTO projects (name) VALUES ('other') RETURNING id")
    async with watching(server.stub) as stream:
        behind = stream.token
        await dropped_in(db, LATER)
        nudge(server)
        await stream.until_events(1)
    # Who was away is told too, and the token from before still leads on.
    for stub in (server.stub, other_server.stub):
        [event] = await all_after(stub, behind)
        assert event.kind == CLEARED
        assert event.messages_cleared.count == 0  # not counted
        told = event.messages_cleared.filter
        assert not told.HasField("created_after")  # the first range has no beginning
        [(until,)] = await db.fetch("SELECT min(since) FROM days")
        assert told.created_before.ToDatetime(UTC) == until + timedelta(minutes=1)
    events = await db.fetch("SELECT project_id FROM events WHERE kind = $1", CLEARED)
    assert {row["project_id"] for row in events} == {1, other}


async def test_a_request_id_outlives_its_day_within_its_week(
    server: Gateway, db: Database, sender: Sender
) -> None:
    mail = pb.EnqueueRequest(request_id="r")
    mail.message.sender.address = "shop@example.com"
    mail.message.to.add(address="ada@example.com")
    mail.message.subject = "Hello"
    mail.message.text = "A word."
    first = await server.stub.Enqueue(mail)
    await sender.record(await sender.start())
    assert await dropped_in(db, LATER)
    assert await forget_old_requests(db) == 0  # by this clock it is young
    again = await server.stub.Enqueue(mail)
    assert again.replayed
    assert again.message_id == first.message_id


async def test_nobody_waits_behind_a_day_that_somebody_reads(
    db: Database, sender: Sender, database_url: str
) -> None:
    """A reader that takes its time holds up the drop, and the drop holds up nobody."""
    await sent(db, sender, message())
    reader = await asyncpg.connect(database_url, server_settings={"search_path": "mailgrpc"})
    reading = reader.transaction()
    await reading.start()
    await reader.fetch("SELECT * FROM messages")
    of_another_range = int((datetime.now(UTC) + 2 * DAY).timestamp() * 1000)
    dropping = asyncio.create_task(dropped_in(db, LATER))
    for _ in range(10):
        async with asyncio.timeout(1):
            await enqueue(db, replace(message(), message_id=new_message_id(of_another_range)))
        await asyncio.sleep(0.05)
    assert not dropping.done()
    await reading.commit()
    await reader.close()
    assert await dropping
    assert (await rows(db))[0] == 10


async def test_two_that_drop_the_same_day_tell_it_once(db: Database, sender: Sender) -> None:
    await sent(db, sender, message())
    found = await asyncio.gather(*(dropped_in(db, LATER) for _ in range(3)))
    assert sum(found) == 1
    assert len(await db.fetch("SELECT FROM events WHERE kind = $1", CLEARED)) == 1
