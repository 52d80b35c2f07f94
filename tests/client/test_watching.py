"""The feed over connections that break: every event once and in order, however often."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mailgrpc.client import (
    AsyncMailClient,
    CallPolicy,
    InvalidRequestError,
    MailClient,
    ResumeTokenExpiredError,
    UnavailableError,
)
from mailgrpc.config import Settings, parse_host_port
from mailgrpc.core.place import Position, decode_token, encode_token
from mailgrpc.db.engine import Database
from mailgrpc.server.app import MailServer
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import MessageFilter
from mailgrpc.v1.event_pb2 import Event
from tests.client.breaking import SILENCE, BreakingTransport, unavailable

MAIL: dict[str, Any] = {
    "sender": "shop@example.org",
    "to": "ada@example.org",
    "subject": "Receipt",
    "text": "Thank you.",
}
EVENTS_A_MAIL = 3  # QUEUED, SENDING, SENT
NOBODYS = "msg_" + "0" * 26  # an id that no message has


def send_mails(client: MailClient, count: int) -> tuple[str, list[str]]:
    """Send so many and wait for their ends; a token from before, and their ids."""
    token = client.list_events(pb.ListEventsRequest()).resume_token
    ids = [client.send(**MAIL).message_id for _ in range(count)]
    for message_id in ids:
        client.wait_until_ended(message_id, timeout_s=10)
    return token, ids


def seen(event: Event) -> tuple[str, int]:
    return event.delivery_id, event.state_changed.delivery.version


def test_a_stream_that_keeps_breaking_has_no_gap_and_no_repeat(
    mailgrpc_client: MailClient, client: MailClient, transport: BreakingTransport
) -> None:
    token, first = send_mails(mailgrpc_client, 5)
    transport.breaks_after.extend([(0, unavailable()), (1, None), (1, SILENCE), (2, unavailable())])
    watch = client.watch(token=token, heartbeat_s=1)
    events = [next(watch) for _ in range(5 * EVENTS_A_MAIL)]
    _, second = send_mails(mailgrpc_client, 5)
    events += [next(watch) for _ in range(5 * EVENTS_A_MAIL)]
    watch.close()
    assert {event.message_id for event in events} == {*first, *second}
    assert len({event.event_id for event in events}) == len(events)
    for delivery in {event.delivery_id for event in events}:
        versions = [seen(event)[1] for event in events if event.delivery_id == delivery]
        assert versions == [1, 2, 3]


def test_the_token_moves_once_the_reader_has_dealt_with_a_response(
    mailgrpc_client: MailClient,
) -> None:
    token, ids = send_mails(mailgrpc_client, 1)
    wanted = MessageFilter(message_ids=ids)
    with mailgrpc_client.watch(filter=wanted, token=token) as watch:
        first = next(watch)
        assert watch.token == token  # the reader still has the first event in its hands
        middle = watch.token
    with mailgrpc_client.watch(filter=wanted, token=middle, stop_after_s=0.5) as watch:
        assert next(watch).event_id == first.event_id
        rest = list(watch)
        behind = watch.token
    assert len(rest) == EVENTS_A_MAIL - 1
    with mailgrpc_client.watch(filter=wanted, token=behind, stop_after_s=0.3) as watch:
        assert list(watch) == []


def test_a_snapshot_that_breaks_begins_anew_and_says_so(
    client: MailClient, transport: BreakingTransport
) -> None:
    ids = [client.send(**MAIL, correlation_id="snapshot", wait_s=10).message_id for _ in range(3)]
    transport.requests.clear()
    transport.breaks_after.append((0, unavailable()))
    watch = client.watch(
        filter=MessageFilter(correlation_ids=["snapshot"]), snapshot=pb.SNAPSHOT_ALL
    )
    collected: dict[str, Any] = {}
    began = 0
    for update in watch.updates():
        if update.snapshot_begins:
            began += 1
            collected.clear()
        collected.update({status.message_id: status for status in update.snapshot})
        assert bool(update.token) == update.caught_up
        if update.caught_up:
            break
    watch.close()
    assert set(collected) == set(ids)
    assert began == 1
    snapshots = [request.snapshot for _, request in transport.requests]  # type: ignore[attr-defined]
    assert snapshots == [pb.SNAPSHOT_ALL, pb.SNAPSHOT_ALL]


def test_after_the_snapshot_it_goes_on_by_token(
    client: MailClient, transport: BreakingTransport, mailgrpc_client: MailClient
) -> None:
    transport.breaks_after.append((2, unavailable()))
    watch = client.watch(snapshot=pb.SNAPSHOT_UNENDED)
    updates = watch.updates()
    while not next(updates).caught_up:
        pass
    _, [message_id] = send_mails(mailgrpc_client, 1)
    told = [event for event in read_until_ended(updates, message_id) if event]
    assert [seen(event)[1] for event in told] == [1, 2, 3]
    watch.close()
    requests = [request for name, request in transport.requests if name == "WatchStatus"]
    assert [bool(request.resume_token) for request in requests] == [False, True]  # type: ignore[attr-defined]
    assert requests[-1].snapshot == pb.SNAPSHOT_UNSPECIFIED  # type: ignore[attr-defined]


def read_until_ended(updates: Iterator[Any], message_id: str) -> list[Event]:
    events: list[Event] = []
    for update in updates:
        events += [event for event in update.events if event.message_id == message_id]
        if len(events) == EVENTS_A_MAIL:
            return events
    raise AssertionError("the stream ended")


def test_a_token_of_lost_history_is_an_error_of_its_own(
    client: MailClient, transport: BreakingTransport
) -> None:
    token, _ = send_mails(client, 1)
    after = client.list_events(pb.ListEventsRequest()).resume_token
    assert after != token
    project = next(number for number in range(10) if _decodes(number, after))
    place = decode_token(project, after)
    lane, position = max(place.items(), key=lambda item: item[1].seq)
    forged = {**place, lane: Position(position.seq, position.fingerprint ^ 1)}
    with pytest.raises(ResumeTokenExpiredError, match="RESUME_TOKEN_EXPIRED"):
        next(client.watch(token=encode_token(project, forged)))
    assert transport.slept == []


def _decodes(project: int, token: str) -> bool:
    try:
        decode_token(project, token)
    except Exception:
        return False
    return True


def test_a_damaged_token_is_an_error_and_not_tried_again(
    client: MailClient, transport: BreakingTransport
) -> None:
    with pytest.raises(InvalidRequestError, match="INVALID_TOKEN"):
        next(client.watch(token="nonsense"))
    assert transport.slept == []


def test_at_the_beginning_it_gives_up_like_any_call(mailgrpc_target: str) -> None:
    transport = BreakingTransport(mailgrpc_target)
    transport.breaks_after.extend([(0, unavailable())] * 1000)
    policy = CallPolicy(timeout_s=30)
    with MailClient(transport=transport, policy=policy) as client, pytest.raises(UnavailableError):
        next(client.watch())
    assert 20 < sum(transport.slept) <= 30


def test_once_it_has_heard_the_server_it_goes_on_for_ever(
    client: MailClient, transport: BreakingTransport
) -> None:
    transport.breaks_after.append((1, unavailable()))
    transport.breaks_after.extend([(0, unavailable())] * 200)
    updates = client.watch().updates()
    assert next(updates).caught_up
    assert next(updates).caught_up
    assert sum(transport.slept) > 300


def test_the_reader_may_say_how_long_to_go_on(
    client: MailClient, transport: BreakingTransport
) -> None:
    transport.breaks_after.append((1, unavailable()))
    transport.breaks_after.extend([(0, unavailable())] * 200)
    updates = client.watch(give_up_after_s=20).updates()
    next(updates)
    with pytest.raises(UnavailableError):
        next(updates)
    assert 10 < sum(transport.slept) <= 20


def test_a_server_that_is_silent_from_the_start_is_given_up(mailgrpc_target: str) -> None:
    with socket_that_never_answers() as target:
        policy = CallPolicy(timeout_s=0.2, try_timeout_s=0.1)
        with (
            MailClient(target, policy=policy) as client,
            pytest.raises(UnavailableError, match="silent"),
        ):
            next(client.watch())


def socket_that_never_answers() -> Any:
    import contextlib
    import socket

    @contextlib.contextmanager
    def listening() -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield f"127.0.0.1:{server.getsockname()[1]}"

    return listening()


def test_another_thread_ends_a_watch_that_waits(mailgrpc_client: MailClient) -> None:
    watch = mailgrpc_client.watch(filter=MessageFilter(message_ids=[NOBODYS]), heartbeat_s=300)
    updates = watch.updates()
    assert next(updates).caught_up  # what follows waits for minutes
    ended: list[object] = []
    reader = threading.Thread(target=lambda: ended.append(list(watch)))
    reader.start()
    watch.close()
    reader.join(10)
    assert ended == [[]]


async def test_asyncio_ends_a_watch_that_waits(mailgrpc_target: str) -> None:
    async with AsyncMailClient(mailgrpc_target) as client:
        watch = client.watch(filter=MessageFilter(message_ids=[NOBODYS]), heartbeat_s=300)
        async for update in watch.updates():
            assert update.caught_up
            break

        async def read_all() -> list[Event]:
            return [event async for event in watch]

        reading = asyncio.create_task(read_all())
        await asyncio.sleep(0)
        watch.close()
        assert await asyncio.wait_for(reading, 10) == []


async def test_a_cancelled_reader_is_cancelled(mailgrpc_target: str) -> None:
    async with AsyncMailClient(mailgrpc_target) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                async for _ in client.watch(filter=MessageFilter(message_ids=[NOBODYS])):
                    pass


async def test_it_goes_on_at_the_next_server(settings: Settings, db: Database) -> None:
    """The server is stopped and started again; the watch tells what happened, once."""
    server = MailServer(settings, db)
    where = await server.start()
    settings = replace(settings, listen=parse_host_port(str(where)))
    async with AsyncMailClient(str(where)) as client, client.watch() as watch:
        updates = watch.updates()
        assert (await anext(updates)).caught_up
        before = (await client.send(**MAIL)).message_id
        events = [event async for event in first_events(updates, 1)]
        await server.stop(1.0)
        server = MailServer(settings, db)
        await server.start()
        after = (await client.send(**MAIL)).message_id
        events += [event async for event in first_events(updates, 1)]
        assert [event.message_id for event in events] == [before, after]
    await server.stop(1.0)


async def first_events(updates: Any, count: int) -> Any:
    while count:
        for event in (await anext(updates)).events:
            count -= 1
            yield event
