"""What a subscriber is shown, and when."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from datetime import datetime
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mailgrpc.config import Settings
from mailgrpc.core.event import Filter
from mailgrpc.core.ids import MESSAGE, to_text
from mailgrpc.core.place import Position, decode_token
from mailgrpc.db.engine import Database
from mailgrpc.db.events import read_events, read_place
from mailgrpc.db.messages import read_labels
from mailgrpc.doorbell import Doorbell
from mailgrpc.server import feed as feed_module
from mailgrpc.server.feed import Feed
from mailgrpc.server.watch import RESPONSE_BYTES
from mailgrpc.v1 import delivery_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.feed.reading import Stream, all_after, event_id, feed_of, nudge, table, watching
from tests.feed.writing import Sender, enqueue, message
from tests.gateway import Gateway, until
from tests.gateway import enqueue as enqueue_request
from tests.server.answers import refusal_of

A_SECOND = Duration(seconds=1)
MANY = [f"reader{n}@example.test" for n in range(50)]


def moment(value: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(value)
    return stamp


async def test_from_now_means_later_events_only(server: Gateway, db: Database) -> None:
    await enqueue(db, message("early@example.test"))
    stream = Stream(server.stub)
    first = await stream.read()
    assert first.caught_up and first.resume_token and not first.events
    assert first.server_time.seconds > 0
    await enqueue(db, message("late@example.test"))
    nudge(server)
    await stream.until_events(1)
    assert stream.events[0].recipient == "late@example.test"
    stream.call.cancel()


async def test_an_event_tells_what_happened_and_to_which_message(
    server: Gateway, db: Database
) -> None:
    new = message("ada@example.test", tags=("t",), custom_args={"a": "b"}, correlation_id="order-1")
    async with watching(server.stub) as stream:
        await enqueue(db, new)
        sender = await Sender.open(db)
        await sender.record(await sender.start())
        nudge(server)
        await stream.until_events(3)
    queued, sending, sent = stream.events
    for event in stream.events:
        assert event.message_id == to_text(MESSAGE, new.message_id)
        assert (event.correlation_id, event.tags, event.custom_args) == (
            "order-1",
            ["t"],
            {"a": "b"},
        )
        assert event.recipient == event.state_changed.delivery.recipient == "ada@example.test"
        assert event.delivery_id == event.state_changed.delivery.delivery_id
    assert queued.state_changed.old_state == delivery_pb2.DELIVERY_STATE_UNSPECIFIED
    assert not queued.state_changed.HasField("attempt")
    assert not sending.state_changed.attempt.HasField("result")
    assert sent.state_changed.attempt.result.status_code == 250
    assert [e.state_changed.delivery.version for e in stream.events] == [1, 2, 3]


async def test_each_filter_shows_what_fits_it_live_and_from_a_token(
    server: Gateway, db: Database
) -> None:
    async with watching(server.stub) as stream:
        begin = stream.token
    one = message("Ada@EXAMPLE.test", tags=("a", "b"), correlation_id="c1")
    two = message("bob@example.test", tags=("b",), correlation_id="c2")
    await enqueue(db, one)
    await enqueue(db, two, lane=1)
    [cut] = await db.fetch("SELECT created_at FROM messages WHERE id = $1", two.message_id)
    cases = {
        "ab": {},
        "a": {"message_ids": [to_text(MESSAGE, one.message_id)]},
        "b": {"correlation_ids": ["c2", "c3"]},
        " a": {"recipients": ["ADA@example.TEST"]},
        "a ": {"tags": ["a"]},
        "ba": {"tags": ["b"]},
        "": {"states": [delivery_pb2.DELIVERY_STATE_SENT]},
        "a  ": {"created_before": moment(cut["created_at"])},
        "b ": {"created_after": moment(cut["created_at"])},
        " ": {"tags": ["a"], "correlation_ids": ["c2"]},
    }
    for shown, fields in cases.items():
        wanted = delivery_pb2.MessageFilter(**fields)
        events = await all_after(server.stub, begin, filter=wanted)
        assert sorted(e.recipient[0] for e in events) == sorted(shown.replace(" ", "")), fields
    await _the_same_live(server, db, begin)


async def _the_same_live(server: Gateway, db: Database, begin: str) -> None:
    """A watcher with many values, one with few, and one with none agree with the table."""
    for values in (["ada@example.test"], [*MANY, "ada@example.test"]):
        wanted = delivery_pb2.MessageFilter(recipients=values)
        async with watching(server.stub, filter=wanted) as live, watching(server.stub) as whole:
            new = [message(to, "ada@example.test") for to in ("eve@example.test", *MANY[:5])]
            await enqueue(db, *new)
            nudge(server)
            await whole.until_events(12)
            fitting = [e.event_id for e in whole.events if e.recipient in values]
            await live.until_events(len(fitting))
            assert live.ids == fitting


async def test_only_state_changes_to_the_states_asked_for_are_shown(
    server: Gateway, db: Database
) -> None:
    wanted = delivery_pb2.MessageFilter(states=[delivery_pb2.DELIVERY_STATE_SENT])
    async with watching(server.stub, filter=wanted) as stream:
        await enqueue(db, message())
        sender = await Sender.open(db)
        await sender.record(await sender.start())
        nudge(server)
        await stream.until_events(1)
    assert stream.events[0].state_changed.delivery.state == delivery_pb2.DELIVERY_STATE_SENT


async def test_another_projects_events_are_never_shown_and_are_passed(
    server: Gateway, db: Database
) -> None:
    async with watching(server.stub, heartbeat=A_SECOND) as stream:
        begin = stream.token
        await enqueue(db, message(project_id=2), message(project_id=2), lane=2)
        nudge(server)
        end = await read_place(db)
        await stream.until(lambda s: decode_token(1, s.token) == end)
        await enqueue(db, message())
        nudge(server)
        await stream.until_events(1)
    listed = await server.stub.ListEvents(pb.ListEventsRequest(resume_token=begin))
    assert [e.event_id for e in listed.events] == stream.ids
    assert decode_token(1, listed.resume_token)[2] == end[2]


async def test_events_ride_together_in_responses_of_a_bounded_size(
    server: Gateway, db: Database
) -> None:
    async with watching(server.stub) as stream:
        begin = stream.token
    await enqueue(db, *(message(*MANY, custom_args={"x": "y" * 200}) for _ in range(20)))
    stream = Stream(server.stub, resume_token=begin)
    sizes = []
    while not stream.caught_up:
        response = await stream.read()
        sizes.append(sum(e.ByteSize() for e in response.events))
        assert sizes[-1] <= RESPONSE_BYTES
    assert stream.ids == [event_id(row) for row in await table(db)]
    assert max(sizes) > RESPONSE_BYTES // 2
    stream.call.cancel()


async def test_an_event_larger_than_a_response_comes_alone(
    server: Gateway, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailgrpc.server.watch.RESPONSE_BYTES", 100)
    async with watching(server.stub) as stream:
        await enqueue(db, message(*MANY[:3]))
        nudge(server)
        for _ in range(3):
            assert len((await stream.read()).events) == 1


async def test_caught_up_is_said_once_and_after_the_backlog(server: Gateway, db: Database) -> None:
    async with watching(server.stub) as stream:
        begin = stream.token
    await enqueue(db, *(message(*MANY) for _ in range(30)))
    stream = Stream(server.stub, resume_token=begin, heartbeat=A_SECOND)
    await stream.until_caught_up()
    assert len(stream.events) == 1500
    await enqueue(db, message())
    nudge(server)
    await stream.until_events(1501)
    await stream.read()  # a heartbeat
    assert stream.caught_up == 1
    stream.call.cancel()


async def test_caught_up_does_not_wait_for_the_heartbeat_behind_what_is_for_others(
    server: Gateway, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "PAGE_EVENTS", 2)
    monkeypatch.setattr(feed_module, "_POLL_HINTED_S", 60.0)
    feed = feed_of(server)
    async with watching(server.stub) as first:
        begin = first.token
        await enqueue(db, message())
        nudge(server)
        await first.until_events(1)  # from here on the ring stands until it is told
        await enqueue(db, message(), message(), message())
        wanted = delivery_pb2.MessageFilter(tags=["never"])
        late = Stream(
            server.stub, resume_token=begin, filter=wanted, heartbeat=Duration(seconds=60)
        )
        reading = asyncio.create_task(late.until_caught_up())
        await until(lambda: reading.done() or bool(feed.ring._light_sleepers))
        nudge(server)
        await reading
        late.call.cancel()


async def test_a_stream_that_is_cancelled_from_inside_is_told(
    server: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancelled(*_: Any) -> Any:
        raise asyncio.CancelledError

    monkeypatch.setattr(feed_of(server), "now", cancelled)
    assert (await Stream(server.stub).refusal()).reason == "INTERNAL"


async def test_a_silent_stream_beats(server: Gateway) -> None:
    async with watching(server.stub, heartbeat=A_SECOND) as stream:
        for _ in range(2):
            beat = await stream.read(within_s=2.0)
            assert beat.resume_token and beat.server_time.seconds
            assert not beat.events and not beat.snapshot and not beat.caught_up


async def test_a_stream_beats_while_things_happen_that_it_does_not_want(
    server: Gateway, db: Database
) -> None:
    wanted = delivery_pb2.MessageFilter(tags=["never"])
    async with watching(server.stub, heartbeat=A_SECOND, filter=wanted) as stream:
        traffic = asyncio.create_task(_traffic(server, db))
        for _ in range(2):
            beat = await stream.read(within_s=2.0)
            assert beat.resume_token and not beat.events
        traffic.cancel()


async def _traffic(server: Gateway, db: Database) -> None:
    while True:
        await enqueue(db, message())
        nudge(server)


async def test_more_streams_than_the_server_serves_are_refused(settings: Settings) -> None:
    async with Gateway(replace(settings, max_streams=1), worker=False) as server:
        async with watching(server.stub):
            refusal = await Stream(server.stub).refusal()
            assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refusal.reason == "TOO_MANY_STREAMS"
            assert refusal.retry_s and refusal.quota == "streams"
        await until(lambda: feed_of(server).ring.reader_count == 0)
        async with watching(server.stub):
            pass


async def test_enqueue_says_from_where_its_events_can_be_followed(server: Gateway) -> None:
    answer = await server.stub.Enqueue(enqueue_request())
    [event] = await all_after(server.stub, answer.resume_token)
    assert event.message_id == answer.message_id


async def test_who_comes_while_the_idle_feed_steps_to_the_end_is_not_overtaken(
    server: Gateway, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The feed asks for the end, somebody writes and somebody comes: the answer is not taken."""
    feed = feed_of(server)
    asked, answered = asyncio.Event(), asyncio.Event()

    async def slow(database: Database) -> dict[int, Position]:
        asked.set()
        await answered.wait()
        return await read_place(database)

    monkeypatch.setattr(feed_module, "read_place", slow)
    await asyncio.wait_for(asked.wait(), 5)
    before = feed.place
    with feed.reader(1, before) as reader:
        assert await feed.read(reader) == ([], False)
        assert feed.ring.has(reader)
        await enqueue(db, message())
        answered.set()
        seen: list[Any] = []
        async with asyncio.timeout(5):
            while not seen:
                entries, more = await feed.read(reader)
                seen += entries
                if not more and not seen:
                    await feed.wait_for_news(reader, 1.0)
        assert [e.shown.event_id for e in seen] == [event_id(row) for row in await table(db)]


async def test_labels_that_are_pushed_out_while_others_are_asked_for_are_not_lost(
    server: Gateway, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter by correlation_id would drop the event without a word."""
    monkeypatch.setattr(feed_module, "LABELS_KEPT", 1)
    async with watching(server.stub) as stream:
        begin = stream.token
    await enqueue(db, *(message(correlation_id=f"c{n}") for n in range(30)))
    feed = feed_of(server)
    pages: list[Any] = await asyncio.gather(*(_read_all(feed, begin) for _ in range(8)))
    for labels in pages:
        assert labels == [f"c{n}" for n in range(30)]


async def test_what_this_server_took_in_needs_no_look_for_its_labels(
    server: Gateway, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And they are what a look would find, the time of its acceptance too."""
    asked: list[Any] = []
    monkeypatch.setattr(feed_module, "read_labels", lambda _, ids: asked.append(ids))
    request = enqueue_request("a@example.test", "b@example.test")
    request.message.correlation_id = "order-1"
    request.message.tags.append("t")
    request.message.custom_args["a"] = "b"
    async with watching(server.stub) as stream:
        feed = feed_of(server)
        begin = stream.token
        await server.stub.Enqueue(request)
        nudge(server)
        await stream.until_events(2)
    for event in stream.events:
        assert (event.correlation_id, event.tags, event.custom_args) == (
            "order-1",
            ["t"],
            {"a": "b"},
        )
    assert asked == []
    monkeypatch.undo()
    known = dict(feed._labels)
    assert known == await read_labels(db, list(known))
    feed._labels.clear()
    assert await _read_all(feed, begin) == ["order-1"] * 2


async def _read_all(feed: Any, token: str) -> list[str]:
    with feed.reader(1, decode_token(1, token)) as reader:
        entries, _ = await feed.read(reader)
        return [e.event.labels.correlation_id for e in entries]


async def test_who_comes_while_others_are_read_for_looks_once_and_waits(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page under way lacks what it wants; to ask the table again and again would not help."""
    looks: list[Any] = []

    async def counted(*arguments: Any) -> Any:
        looks.append(arguments)
        return await read_events(*arguments)

    monkeypatch.setattr(feed_module, "read_events", counted)
    feed = Feed(db, Doorbell(None))
    feed.ring.begin(await feed.now())
    named = Filter(message_ids=frozenset([message().message_id]))
    with contextlib.ExitStack() as page:
        page.enter_context(feed.ring.asking())
        with feed.reader(1, feed.place, named) as reader:
            reading = asyncio.create_task(feed.read(reader))
            await until(lambda: bool(looks))
            for _ in range(100):
                await db.fetch("SELECT 1")  # as long as a hundred looks
            assert not reading.done()
            page.close()
            assert await reading == ([], False)
    assert len(looks) == 1


async def test_a_thousand_waiters_for_others_mail_are_not_woken(
    server: Gateway, db: Database
) -> None:
    feed = feed_of(server)
    async with watching(server.stub) as stream:
        others = [
            feed.ring.add(1, feed.place, _wanted_recipient(f"{n}@example.test"))
            for n in range(1000)
        ]
        for reader in others:
            feed.ring.try_join(reader)
        sleeping = [asyncio.create_task(feed.wait_for_news(r, 30.0)) for r in others]
        await until(lambda: all(r.is_asleep for r in others))
        await enqueue(db, message("7@example.test"), message("eve@example.test"))
        nudge(server)
        await stream.until_events(2)
        await until(lambda: not others[7].is_asleep)  # the stream may have them from the table
        assert [r for r in others if not r.is_asleep] == [others[7]]
        for task in sleeping:
            task.cancel()
        for reader in others:
            feed.ring.remove(reader)


def _wanted_recipient(address: str) -> Any:
    return Filter(recipients=frozenset([address]))


class TestListEvents:
    async def test_without_a_token_it_answers_where_now_is(
        self, server: Gateway, db: Database
    ) -> None:
        await enqueue(db, message())
        page = await server.stub.ListEvents(pb.ListEventsRequest())
        assert not page.events and not page.more
        assert decode_token(1, page.resume_token) == await read_place(db)

    async def test_it_waits_for_the_first_event_and_no_longer(
        self, server: Gateway, db: Database
    ) -> None:
        waiting = asyncio.ensure_future(
            server.stub.ListEvents(pb.ListEventsRequest(wait=Duration(seconds=30)))
        )
        await until(lambda: any(r.is_asleep for r in feed_of(server).ring._of_project.get(1, ())))
        await enqueue(db, message())
        nudge(server)
        page = await asyncio.wait_for(waiting, 5)
        assert [e.event_id for e in page.events] == [event_id(row) for row in await table(db)]

    async def test_it_gives_up_waiting_in_time(self, server: Gateway) -> None:
        started = asyncio.get_running_loop().time()
        request = pb.ListEventsRequest(wait=Duration(nanos=200_000_000))
        page = await server.stub.ListEvents(request)
        assert 0.2 <= asyncio.get_running_loop().time() - started < 3
        assert not page.events and not page.more and page.resume_token

    async def test_pages_are_cut_to_size(self, server: Gateway, db: Database) -> None:
        begin = (await server.stub.ListEvents(pb.ListEventsRequest())).resume_token
        await enqueue(db, *(message(*MANY) for _ in range(24)))

        async def page(size: int) -> Any:
            request = pb.ListEventsRequest(resume_token=begin, page_size=size)
            return await server.stub.ListEvents(request)

        assert len((await page(0)).events) == 50
        assert len((await page(7)).events) == 7
        large = await page(5000)
        assert 500 < len(large.events) <= 1000 and large.more
        assert sum(e.ByteSize() for e in large.events) <= RESPONSE_BYTES
        refusal = await refusal_of(page(-1))
        assert refusal.violations == (("page_size", "OUT_OF_RANGE"),)

    async def test_more_tells_that_there_is_more(self, server: Gateway, db: Database) -> None:
        begin = (await server.stub.ListEvents(pb.ListEventsRequest())).resume_token
        await enqueue(db, *(message() for _ in range(4)))
        request = pb.ListEventsRequest(resume_token=begin, page_size=3)
        first = await server.stub.ListEvents(request)
        assert first.more and len(first.events) == 3
        second = await server.stub.ListEvents(
            pb.ListEventsRequest(resume_token=first.resume_token, page_size=3)
        )
        assert not second.more and len(second.events) == 1

    async def test_it_leaves_no_reader_behind(self, server: Gateway) -> None:
        waiting = server.stub.ListEvents(pb.ListEventsRequest(wait=Duration(seconds=30)))
        await until(lambda: feed_of(server).ring.reader_count == 1)
        waiting.cancel()
        await until(lambda: feed_of(server).ring.reader_count == 0)

    async def test_a_server_that_goes_away_does_not_let_it_wait(self, server: Gateway) -> None:
        waiting = refusal_of(
            server.stub.ListEvents(pb.ListEventsRequest(wait=Duration(seconds=30)))
        )
        task = asyncio.ensure_future(waiting)
        await until(lambda: any(r.is_asleep for r in feed_of(server).ring._of_project.get(1, ())))
        feed_of(server).end_streams()
        assert (await asyncio.wait_for(task, 5)).reason == "SHUTTING_DOWN"
