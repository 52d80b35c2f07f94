"""Clear and the readers that are behind it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from mailgrpc.core.ids import MESSAGE, to_text
from mailgrpc.db.engine import Database
from mailgrpc.v1 import delivery_pb2, event_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.feed.reading import all_after, event_id, faults, table, watching
from tests.feed.writing import Sender, enqueue, message
from tests.gateway import Gateway

CLEARED = event_pb2.EVENT_KIND_MESSAGES_CLEARED


def soon() -> Timestamp:
    moment = Timestamp()
    moment.FromDatetime(datetime.now(UTC) + timedelta(minutes=1))
    return moment


async def sent_and_cleared(server: Gateway, db: Database, tag: str) -> pb.ClearRequest:
    """Two messages were sent and cleared."""
    await enqueue(
        db, message(tags=(tag,), correlation_id="c1"), message(tags=(tag,), custom_args={"a": "b"})
    )
    sender = await Sender.open(db)
    await sender.record(await sender.start())
    wanted = delivery_pb2.MessageFilter(tags=[tag], created_before=soon())
    request = pb.ClearRequest(filter=wanted)
    assert (await server.stub.Clear(request)).cleared_count == 2
    return request


async def test_a_reader_that_was_behind_a_clear_is_told_of_it(
    server: Gateway, other_server: Gateway, db: Database
) -> None:
    async with watching(server.stub) as stream:
        begin = stream.token
    request = await sent_and_cleared(server, db, "old")
    events = await all_after(other_server.stub, begin)
    assert faults([e for e in events if e.kind != CLEARED], (await table(db))[:-1]) == []
    # What lies before it lost its labels, and is still told.
    assert not any(e.correlation_id or e.tags or e.custom_args for e in events)
    last = events[-1]
    assert last.kind == CLEARED
    assert last.message_id == ""
    assert last.messages_cleared.count == 2
    assert last.messages_cleared.filter.tags == ["old"]
    assert last.messages_cleared.filter.created_before == request.filter.created_before


async def test_a_clear_is_told_to_every_filter(server: Gateway, db: Database) -> None:
    async with watching(server.stub) as stream:
        begin = stream.token
    other = message()
    wanted = delivery_pb2.MessageFilter(
        message_ids=[to_text(MESSAGE, other.message_id)],
        recipients=["nobody@example.test"],
        correlation_ids=["none"],
        tags=["none"],
        states=[delivery_pb2.DELIVERY_STATE_EXPIRED],
        created_after=soon(),
    )
    async with watching(server.stub, filter=wanted) as live:
        await sent_and_cleared(server, db, "old")
        await live.until_events(1)
    behind = await all_after(server.stub, begin, filter=wanted)
    [row] = [row for row in await table(db) if row["kind"] == CLEARED]
    assert [e.event_id for e in live.events + behind] == [event_id(row)] * 2


async def test_who_asked_for_state_changes_only_gets_no_clear(
    server: Gateway, db: Database
) -> None:
    async with watching(server.stub) as stream:
        begin = stream.token
    await sent_and_cleared(server, db, "old")
    kinds = [event_pb2.EVENT_KIND_STATE_CHANGED]
    assert len(await all_after(server.stub, begin, kinds=kinds)) == 6
    assert len(await all_after(server.stub, begin, kinds=[CLEARED])) == 1
    assert len(await all_after(server.stub, begin)) == 7
