"""Clear removes what has ended, never what is being sent, and tells every watcher."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mailgrpc.core.delivery import UNENDED, State
from mailgrpc.core.place import ORIGIN, encode_token
from mailgrpc.server import clear as served
from mailgrpc.v1 import delivery_pb2, event_pb2, message_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.db.factory import put_delivery
from tests.gateway import Gateway, enqueue
from tests.server.answers import refusal_of

TABLES = ("messages", "deliveries", "due", "scheduled", "attachments", "attempts")


async def sent(gateway: Gateway, state: State = State.SENT, *to: str, **fields: Any) -> str:
    message_id = (await gateway.stub.Enqueue(enqueue(*to, **fields))).message_id
    await put_delivery(gateway.database, message_id, state)
    return message_id


def wanted(**fields: Any) -> delivery_pb2.MessageFilter:
    found = delivery_pb2.MessageFilter(**fields)
    if not found.HasField("created_before"):
        found.created_before.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    return found


async def clear(gateway: Gateway, what: Any = None, **fields: Any) -> Any:
    return await gateway.stub.Clear(pb.ClearRequest(filter=what or wanted(), **fields))


async def left(gateway: Gateway) -> dict[str, int]:
    counts = ", ".join(f"(SELECT count(*) FROM {t}) AS {t}" for t in TABLES)
    [row] = await gateway.database.fetch(f"SELECT {counts}")
    return {table: count for table, count in row.items() if count}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("force", [False, True])
async def test_what_is_removed_depends_on_its_state(
    server_only: Gateway, state: State, force: bool
) -> None:
    message_id = await sent(
        server_only, state, attachments=[message_pb2.Attachment(filename="a.bin", data=b"1")]
    )
    answer = await clear(server_only, force=force)
    stays = state is State.SENDING or (state in UNENDED and not force)
    assert (answer.cleared_count, answer.more) == (0 if stays else 1, False)
    assert answer.sending_count == (state is State.SENDING)
    if stays:
        assert (await server_only.status(message_id)).state == state
    else:
        assert list(answer.sample_message_ids) == [message_id]
        assert await left(server_only) == {}
        refusal = await refusal_of(server_only.status(message_id))
        assert refusal.reason == "MESSAGE_NOT_FOUND"


@pytest.mark.parametrize("force", [False, True])
async def test_one_recipient_that_is_being_sent_keeps_the_whole_message(
    server_only: Gateway, force: bool
) -> None:
    message_id = await sent(server_only, State.SENT, "ada@example.test", "bob@example.test")
    await put_delivery(server_only.database, message_id, State.SENDING, number=2)
    answer = await clear(server_only, force=force)
    assert (answer.cleared_count, answer.sending_count) == (0, 1)
    assert len((await server_only.status(message_id)).deliveries) == 2


async def test_what_starts_while_it_runs_is_left_alone(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    message_id = await sent(server_only, State.QUEUED)
    find = served.find_clearable

    async def then_it_starts(*args: Any, **kwargs: Any) -> Any:
        found = await find(*args, **kwargs)
        await put_delivery(server_only.database, message_id, State.SENDING)
        return found

    monkeypatch.setattr(served, "find_clearable", then_it_starts)
    answer = await clear(server_only, force=True)
    assert (answer.cleared_count, answer.sending_count) == (0, 1)
    assert (await server_only.status(message_id)).state == delivery_pb2.DELIVERY_STATE_SENDING


async def test_validate_only_counts_and_removes_nothing(server_only: Gateway) -> None:
    ids = [await sent(server_only) for _ in range(3)]
    await sent(server_only, State.SENDING)
    answer = await clear(server_only, validate_only=True)
    assert (answer.cleared_count, answer.sending_count) == (3, 1)
    assert list(answer.sample_message_ids) == ids
    assert (await left(server_only))["messages"] == 4
    assert (await cleared_events(server_only)) == []


async def many(gateway: Gateway, count: int) -> list[str]:
    """Messages that were sent, the oldest first."""
    requests = [enqueue(request_id=f"m{n}") for n in range(count)]
    answer = await gateway.stub.EnqueueBatch(pb.EnqueueBatchRequest(requests=requests))
    await gateway.database.write("UPDATE deliveries SET state = 4, due_at = NULL, wait_reason = 0")
    await gateway.database.write("DELETE FROM due")
    return sorted(r.response.message_id for r in answer.results)


async def test_a_call_goes_in_chunks_and_says_when_there_is_more(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "CHUNK_MESSAGES", 10)
    ids = await many(server_only, 50)
    # One that stays stands at the end of a chunk: the next is still found.
    await put_delivery(server_only.database, ids[25], State.SENDING)
    first = await clear(server_only, max_messages=25)
    assert (first.cleared_count, first.sending_count, first.more) == (25, 0, True)
    assert list(first.sample_message_ids) == ids[:10]
    assert [e.messages_cleared.count for e in await cleared_events(server_only)] == [10, 10, 5]
    second = await clear(server_only)
    assert (second.cleared_count, second.sending_count, second.more) == (24, 1, False)
    third = await clear(server_only)
    assert (third.cleared_count, third.sending_count, third.more) == (0, 1, False)


async def test_there_is_no_more_when_all_that_is_left_is_being_sent(server_only: Gateway) -> None:
    ids = await many(server_only, 4)
    await put_delivery(server_only.database, ids[3], State.SENDING)
    assert not (await clear(server_only, max_messages=3)).more


async def cleared_events(gateway: Gateway) -> list[Any]:
    rows = await gateway.database.fetch("SELECT count(*) FROM events WHERE kind = 18")
    if not rows[0][0]:
        return []
    request = pb.ListEventsRequest(
        resume_token=encode_token(1, {0: ORIGIN}),
        kinds=[event_pb2.EVENT_KIND_MESSAGES_CLEARED],
        page_size=1000,
    )
    request.wait.FromSeconds(5)
    return list((await gateway.stub.ListEvents(request)).events)


async def test_every_watcher_is_told_with_the_filter_and_the_count(server_only: Gateway) -> None:
    await sent(server_only, correlation_id="order-1", tags=["a"])
    await sent(server_only, correlation_id="order-2")
    what = wanted(
        correlation_ids=["order-1"], tags=["a"], states=[4], recipients=["Ada@example.test"]
    )
    assert (await clear(server_only, what)).cleared_count == 1
    [event] = await cleared_events(server_only)
    assert event.messages_cleared == event_pb2.MessagesCleared(filter=what, count=1)
    assert (event.message_id, event.delivery_id) == ("", "")


FILTERS = {
    "message_ids": lambda ids: {"message_ids": [ids[1]]},
    "correlation_ids": lambda ids: {"correlation_ids": ["c1", "nobody's"]},
    "recipients": lambda ids: {"recipients": ["R1@Example.test"]},
    "tags": lambda ids: {"tags": ["t1", "nobody's"]},
    "states": lambda ids: {"states": [delivery_pb2.DELIVERY_STATE_FAILED]},
    "two fields": lambda ids: {"tags": ["t1", "t2"], "correlation_ids": ["c0", "c1"]},
}


@pytest.mark.parametrize("narrowed", FILTERS.values(), ids=FILTERS.keys())
async def test_a_filter_means_what_it_says(server_only: Gateway, narrowed: Any) -> None:
    states = (State.SENT, State.FAILED, State.SENT)
    ids = [
        await sent(
            server_only, state, f"r{n}@example.test", correlation_id=f"c{n}", tags=["all", f"t{n}"]
        )
        for n, state in enumerate(states)
    ]
    answer = await clear(server_only, wanted(**narrowed(ids)))
    assert list(answer.sample_message_ids) == [ids[1]]
    assert (await left(server_only))["messages"] == 2


async def test_only_what_was_created_within_the_times_is_removed(server_only: Gateway) -> None:
    await sent(server_only)
    [(created_at,)] = await server_only.database.fetch("SELECT created_at FROM messages")
    tick = timedelta(microseconds=1)
    for after, before, count in (
        (created_at + tick, created_at + 2 * tick, 0),
        (created_at - tick, created_at, 0),  # before is exclusive
        (created_at, created_at + tick, 1),  # after is inclusive
    ):
        what = delivery_pb2.MessageFilter()
        what.created_after.FromDatetime(after)
        what.created_before.FromDatetime(before)
        assert (await clear(server_only, what)).cleared_count == count


async def test_the_request_ids_stay(server_only: Gateway) -> None:
    await sent(server_only, request_id="r")
    assert (await clear(server_only)).cleared_count == 1
    [(known,)] = await server_only.database.fetch("SELECT count(*) FROM request_ids")
    assert known == 1
    gone = await refusal_of(server_only.stub.GetStatus(pb.GetStatusRequest(request_id="r")))
    assert gone.reason == "MESSAGE_NOT_FOUND"
