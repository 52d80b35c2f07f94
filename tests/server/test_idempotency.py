"""The same request_id never makes a second message, whatever happens in between."""

from __future__ import annotations

import asyncio
import gc
import random
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from mailgrpc.config import Settings
from mailgrpc.db import messages as db_messages
from mailgrpc.db.connecting import Connector
from mailgrpc.server import enqueue as enqueue_module
from mailgrpc.server import intake as intake_module
from mailgrpc.server import mail
from mailgrpc.v1 import delivery_pb2, errors_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.gateway import PATIENCE_S, Gateway, enqueue, until
from tests.server.answers import refusal_of
from tests.server.processes import serving
from tests.server.proxy import LossyProxy

LANE_LOCKS = 1835466752  # where the advisory locks of the lanes begin (0001_functions.sql)
QUEUED = delivery_pb2.DELIVERY_STATE_QUEUED


async def count(gateway: Gateway, table: str) -> int:
    [(rows,)] = await gateway.database.fetch(f"SELECT count(*) FROM {table}")
    return rows


def in_a_day() -> Any:
    moment = pb.EnqueueRequest().options.expire_at
    moment.FromDatetime(datetime.now(UTC) + timedelta(hours=12))
    return moment


@pytest.fixture
async def second(settings: Settings) -> AsyncIterator[Gateway]:
    """A second server over the same database."""
    async with Gateway(settings, worker=False) as running:
        yield running


@pytest.fixture
async def other(settings: Settings) -> AsyncIterator[Gateway]:
    """A second server over the same database, which has lost its channel and its categories."""
    changed = replace(settings, channels={"carrier": "capture:"}, categories={})
    async with Gateway(changed, worker=False) as running:
        yield running


@pytest.fixture
async def holder(database_url: str) -> AsyncIterator[Any]:
    """A connection of somebody else, to hold locks with."""
    connection = await Connector(database_url).connect(
        command_timeout=10, application_name="holder"
    )
    yield connection
    await connection.close()


# One request, many calls


async def test_200_calls_at_once_on_two_server_processes_make_one_message(
    settings: Settings, db: Any
) -> None:
    request = enqueue(request_id="order-1")
    async with serving(settings) as one, serving(settings) as two:
        answers = await asyncio.gather(*((one, two)[n % 2].Enqueue(request) for n in range(200)))
    assert len({answer.message_id for answer in answers}) == 1
    assert [answer.replayed for answer in answers].count(False) == 1
    [(messages, deliveries)] = await db.fetch(
        "SELECT (SELECT count(*) FROM messages), (SELECT count(*) FROM deliveries)"
    )
    assert (messages, deliveries) == (1, 1)


CHANGES: dict[str, Callable[[Any], None]] = {
    "another subject": lambda r: setattr(r.message, "subject", "Other"),
    "another text": lambda r: setattr(r.message, "text", "Other"),
    "another recipient": lambda r: setattr(r.message.to[0], "address", "bob@example.test"),
    "one recipient more": lambda r: r.message.cc.add(address="bob@example.test"),
    "a name": lambda r: setattr(r.message.to[0], "name", "Ada"),
    "an attachment": lambda r: r.message.attachments.add(filename="a.pdf"),
    "another argument": lambda r: r.message.custom_args.update({"a": "2"}),
    "a spelled-out default": lambda r: setattr(r.options, "mode", 1),
    "tags in another order": lambda r: r.message.tags.reverse(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_another_request_with_a_known_id_is_refused(
    server_only: Gateway, change: Callable[[Any], None]
) -> None:
    request = enqueue(request_id="r", custom_args={"a": "1"}, tags=["x", "y"])
    await server_only.stub.Enqueue(request)
    change(request)
    refusal = await refusal_of(server_only.stub.Enqueue(request))
    assert refusal.code is grpc.StatusCode.ALREADY_EXISTS
    assert refusal.reason == "REQUEST_ID_MISMATCH"
    assert await count(server_only, "messages") == 1


def fields_of(data: bytes) -> list[tuple[int, bytes]]:
    """The fields of a message in wire form: (number, bytes with the tag)."""
    fields = []
    at = 0
    while at < len(data):
        start = at
        tag, at = varint(data, at)
        if tag & 7 == 2:
            length, at = varint(data, at)
            at += length
        else:
            assert tag & 7 == 0, "the requests of these tests have nothing else"
            _, at = varint(data, at)
        fields.append((tag >> 3, data[start:at]))
    return fields


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def part(number: int, payload: bytes) -> bytes:
    assert number < 16
    assert len(payload) < 128 * 128
    length = len(payload)
    size = bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])
    return bytes([number << 3 | 2]) + size + payload


def backwards(data: bytes) -> bytes:
    """The same fields, the highest number first; elements of a list stay in their order."""
    return b"".join(raw for _, raw in sorted(fields_of(data), key=lambda f: -f[0]))


def shuffled_map(message: Any) -> bytes:
    """The same message with the entries of its map in another order."""
    fields = fields_of(message.SerializeToString())
    entries = [raw for number, raw in fields if number == 14]
    random.Random(1).shuffle(entries)
    return b"".join([raw for number, raw in fields if number != 14] + entries)


def enveloped(request: Any, message: bytes, more: bytes = b"") -> bytes:
    return part(1, request.request_id.encode()) + part(2, message) + more


SAME: dict[str, Callable[[Any], bytes]] = {
    "fields backwards": lambda r: backwards(r.SerializeToString()),
    "fields of the message backwards": lambda r: enveloped(
        r, backwards(r.message.SerializeToString())
    ),
    "a map in another order": lambda r: enveloped(r, shuffled_map(r.message)),
    "explicit zeros": lambda r: enveloped(
        r, r.message.SerializeToString() + b"\x68\x00" + part(8, b"") + part(15, b""), b"\x20\x00"
    ),
    "a message in two parts": lambda r: enveloped(
        r, r.message.SerializeToString(), part(2, part(6, r.message.subject.encode()))
    ),
    "a value overwritten": lambda r: part(1, b"other") + r.SerializeToString(),
    "empty options": lambda r: r.SerializeToString() + part(3, b""),
    "an address in capitals": lambda r: r.SerializeToString().replace(
        b"@example.test", b"@EXAMPLE.test"
    ),
}


@pytest.mark.parametrize("written", SAME.values(), ids=SAME.keys())
async def test_the_same_request_in_another_languages_bytes_is_the_same(
    server_only: Gateway, written: Callable[[Any], bytes]
) -> None:
    request = enqueue(request_id="r", custom_args={f"k{n}": str(n) for n in range(20)})
    first = await server_only.stub.Enqueue(request)
    data = written(request)
    assert data != request.SerializeToString()
    call = server_only.channel.unary_unary(
        "/mailgrpc.v1.MailService/Enqueue", response_deserializer=pb.EnqueueResponse.FromString
    )
    again = await call(data)
    assert again.replayed
    assert again.message_id == first.message_id


# A replay is a replay, whatever has changed since


async def test_a_replay_is_answered_after_its_expiry_has_passed(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = enqueue(request_id="r", edit=lambda r: r.options.expire_at.CopyFrom(in_a_day()))
    first = await server_only.stub.Enqueue(request)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr(enqueue_module, "datetime", Tomorrow)
    again = await server_only.stub.Enqueue(request)
    assert (again.message_id, again.replayed, again.state) == (first.message_id, True, QUEUED)
    request.request_id = "another"
    assert (await refusal_of(server_only.stub.Enqueue(request))).reason == "INVALID_SCHEDULE"


async def test_a_replay_is_answered_when_its_channel_and_category_are_gone(
    server_only: Gateway, other: Gateway
) -> None:
    request = enqueue(
        request_id="r",
        categories=["receipts"],
        edit=lambda r: setattr(r.options, "channel", "bulk"),
    )
    first = await server_only.stub.Enqueue(request)
    again = await other.stub.Enqueue(request)
    assert again.replayed
    assert again.message_id == first.message_id
    request.message.subject = "Other"
    assert (await refusal_of(other.stub.Enqueue(request))).reason == "REQUEST_ID_MISMATCH"
    request.request_id = "another"
    assert (await refusal_of(other.stub.Enqueue(request))).reason == "UNKNOWN_CATEGORY"


async def test_a_replay_after_clear_has_the_id_and_no_state(server_only: Gateway) -> None:
    request = enqueue(request_id="r")
    first = await server_only.stub.Enqueue(request)
    wanted = delivery_pb2.MessageFilter(created_before=in_a_day())
    cleared = await server_only.stub.Clear(pb.ClearRequest(filter=wanted, force=True))
    assert cleared.cleared_count == 1
    again = await server_only.stub.Enqueue(request)
    assert (again.message_id, again.replayed, again.state) == (first.message_id, True, 0)
    assert await count(server_only, "messages") == 0


async def test_a_replay_tells_the_state_as_it_is_now(gateway: Gateway) -> None:
    request = enqueue("permerror@example.test", request_id="r")
    first = await gateway.stub.Enqueue(request)
    await gateway.ended(first.message_id)
    again = await gateway.stub.Enqueue(request)
    assert again.state == delivery_pb2.DELIVERY_STATE_FAILED


async def test_validate_only_stores_nothing_and_does_not_use_up_the_id(
    server_only: Gateway,
) -> None:
    request = enqueue(request_id="r")
    request.validate_only = True
    answer = await server_only.stub.Enqueue(request)
    assert answer == pb.EnqueueResponse()
    assert await count(server_only, "messages") == await count(server_only, "request_ids") == 0
    request.validate_only = False
    first = await server_only.stub.Enqueue(request)
    assert not first.replayed
    request.validate_only = True
    assert await server_only.stub.Enqueue(request) == pb.EnqueueResponse()


async def test_enqueue_and_resend_share_their_ids(server_only: Gateway) -> None:
    sent = await server_only.stub.Enqueue(enqueue(request_id="e"))
    resend = pb.ResendRequest(message_id=sent.message_id, request_id="e")
    assert (await refusal_of(server_only.stub.Resend(resend))).reason == "REQUEST_ID_MISMATCH"
    resend.request_id = "r"
    await server_only.stub.Resend(resend)
    refusal = await refusal_of(server_only.stub.Enqueue(enqueue(request_id="r")))
    assert refusal.reason == "REQUEST_ID_MISMATCH"
    by_resend = pb.GetStatusRequest(request_id="r")
    assert (await refusal_of(server_only.stub.GetStatus(by_resend))).reason == "MESSAGE_NOT_FOUND"


# Batches


def batch(*requests: pb.EnqueueRequest) -> pb.EnqueueBatchRequest:
    return pb.EnqueueBatchRequest(requests=requests)


async def test_batches_with_the_same_ids_in_opposite_order_do_not_deadlock(
    server_only: Gateway, second: Gateway
) -> None:
    for turn in range(15):
        requests = [enqueue(f"a{n}@example.test", request_id=f"{turn}-{n}") for n in range(60)]
        forth, back = await asyncio.gather(
            server_only.stub.EnqueueBatch(batch(*requests)),
            second.stub.EnqueueBatch(batch(*reversed(requests))),
        )
        pairs = list(zip(forth.results, reversed(back.results), strict=True))
        assert all(one.response.message_id for one, _ in pairs)
        assert all(one.response.message_id == two.response.message_id for one, two in pairs)
        assert all(one.response.replayed != two.response.replayed for one, two in pairs)
    assert await count(server_only, "messages") == 15 * 60


async def test_an_id_that_stands_twice_in_a_batch_makes_one_message(server_only: Gateway) -> None:
    same = enqueue(request_id="r")
    another = enqueue(request_id="r", subject="Other")
    answer = await server_only.stub.EnqueueBatch(
        batch(same, enqueue(request_id="s"), same, another)
    )
    first, alone, second, refused = answer.results
    assert first.response.message_id == second.response.message_id
    assert (first.response.replayed, second.response.replayed) == (False, True)
    assert alone.response.message_id not in ("", first.response.message_id)
    assert refused.error.reason == errors_pb2.ERROR_REASON_REQUEST_ID_MISMATCH
    assert refused.error.code == grpc.StatusCode.ALREADY_EXISTS.value[0]
    assert await count(server_only, "messages") == 2


async def test_a_bad_item_does_not_fail_the_others(server_only: Gateway) -> None:
    good = [enqueue(f"a{n}@example.test") for n in range(3)]
    answer = await server_only.stub.EnqueueBatch(batch(good[0], enqueue("nobody"), *good[1:]))
    assert [r.WhichOneof("result") for r in answer.results] == [
        "response",
        "error",
        "response",
        "response",
    ]
    assert answer.results[1].error.violations[0].field == "message.to[0].address"
    assert await count(server_only, "messages") == 3


async def test_a_full_batch_is_taken(server_only: Gateway) -> None:
    requests = [
        enqueue(*(f"a{m}@example.test" for m in range(4)), request_id=str(n)) for n in range(500)
    ]
    answer = await server_only.stub.EnqueueBatch(batch(*requests))
    assert len({r.response.message_id for r in answer.results}) == 500
    assert await count(server_only, "deliveries") == await count(server_only, "due") == 2000


# Faults


async def test_a_value_that_the_database_refuses_fails_alone(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = db_messages.pack_json
    poison = r'["\u0000"]'  # jsonb holds no U+0000; no request gets so far with one
    monkeypatch.setattr(db_messages, "pack_json", lambda v: poison if v == ("poison",) else pack(v))
    requests = [enqueue(request_id=str(n), tags=[str(n)]) for n in range(20)]
    requests[7].message.tags[0] = "poison"
    answer = await server_only.stub.EnqueueBatch(batch(*requests))
    errors = [n for n, r in enumerate(answer.results) if r.HasField("error")]
    assert errors == [7]
    assert answer.results[7].error.reason == errors_pb2.ERROR_REASON_INTERNAL
    assert "u0000" not in answer.results[7].error.description
    assert await count(server_only, "messages") == await count(server_only, "request_ids") == 19
    monkeypatch.undo()
    again = await server_only.stub.EnqueueBatch(batch(*requests))
    assert [n for n, r in enumerate(again.results) if not r.response.replayed] == [7]


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[LossyProxy]:
    async with LossyProxy(database_url) as running:
        yield running


@pytest.fixture
async def proxied(proxy: LossyProxy, settings: Settings) -> AsyncIterator[Gateway]:
    """A server that reaches its database through the proxy."""
    async with Gateway(replace(settings, database_url=proxy.url), worker=False) as running:
        yield running


@pytest.mark.parametrize("request_id", ["r", ""])
async def test_when_the_answer_of_a_commit_is_lost_there_is_one_message(
    proxy: LossyProxy, proxied: Gateway, request_id: str
) -> None:
    await proxied.stub.UpdatePrefs(
        pb.UpdatePrefsRequest(address="bob@example.test", blocked_flags=2)
    )
    proxy.lose_answer_to("enqueue_messages")
    request = enqueue("ada@example.test", "bob@example.test", request_id=request_id, flags=2)
    answer = await proxied.stub.Enqueue(request, timeout=PATIENCE_S)
    assert proxy.lost == 1
    assert answer.message_id
    assert not answer.replayed
    # What the lost answer told of it is told all the same.
    assert [d.recipient for d in answer.not_queued] == ["bob@example.test"]
    assert await count(proxied, "messages") == 1
    assert await count(proxied, "deliveries") == await count(proxied, "events") == 2


@pytest.mark.parametrize("request_id", ["r", ""])
async def test_a_second_try_waits_for_the_first_while_that_one_still_runs(
    proxy: LossyProxy, proxied: Gateway, holder: Any, request_id: str
) -> None:
    for lane in range(16):
        await holder.execute("SELECT pg_advisory_lock($1)", LANE_LOCKS + lane)
    call = asyncio.ensure_future(proxied.stub.Enqueue(enqueue(request_id=request_id)))
    await blocked(holder, 1)  # the first run has done all but its commit
    proxy.hang_up()
    await blocked(holder, 2)  # the second waits for the first one's key
    await holder.execute("SELECT pg_advisory_unlock_all()")
    async with asyncio.timeout(PATIENCE_S):
        answer = await call
    assert answer.message_id
    assert not answer.replayed
    assert await count(proxied, "messages") == await count(proxied, "events") == 1


@pytest.mark.parametrize(("sibling", "at_once"), [(None, 2), (1, 1)])
async def test_so_many_flushes_are_under_way_alone_and_beside_siblings(
    settings: Settings, holder: Any, sibling: int | None, at_once: int
) -> None:
    for lane in range(16):
        await holder.execute("SELECT pg_advisory_lock($1)", LANE_LOCKS + lane)
    async with Gateway(replace(settings, sibling=sibling), worker=False) as running:
        intake = running.server._intake
        calls = []
        for number in range(1, at_once + 1):
            calls.append(asyncio.ensure_future(running.stub.Enqueue(enqueue())))
            await blocked(holder, number)
        assert not intake.is_busy
        calls.append(asyncio.ensure_future(running.stub.Enqueue(enqueue())))
        await until(lambda: intake.is_busy)
        await holder.execute("SELECT pg_advisory_unlock_all()")
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*calls)
        assert not intake.is_busy
        assert await count(running, "messages") == at_once + 1


@pytest.mark.parametrize(
    ("sibling", "calls", "waits"), [(1, 1, True), (1, 32, False), (None, 1, False)]
)
async def test_a_sibling_lets_more_come_to_a_flush_that_would_be_small(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    sibling: int | None,
    calls: int,
    waits: bool,
) -> None:
    async with Gateway(replace(settings, sibling=sibling), worker=False) as running:
        intake = running.server._intake
        clock = asyncio.get_running_loop().time
        began_at: list[float] = []
        insert = intake._insert

        async def timed(*args: Any) -> Any:
            began_at.append(clock())
            return await insert(*args)

        monkeypatch.setattr(intake, "_insert", timed)
        slots = [await intake._small.acquire() for _ in range(1 if sibling else 2)]
        answers = [asyncio.ensure_future(running.stub.Enqueue(enqueue())) for _ in range(calls)]
        await until(lambda: len(intake._waiting) == calls)
        # As after a flush that has just ended; an hour where nobody is to wait for it.
        intake._rest_until = rest_until = clock() + (0.05 if waits else 3600)
        for _ in slots:
            intake._small.release()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*answers)
        assert (began_at[0] > rest_until - 0.002) == waits  # the loop counts milliseconds


async def test_only_what_several_calls_shared_is_rested_after(settings: Settings) -> None:
    """Whoever calls a sibling call after call waits for nothing."""
    async with Gateway(replace(settings, sibling=1), worker=False) as running:
        intake = running.server._intake
        await running.stub.Enqueue(enqueue())
        await intake.drain()
        assert intake._rest_until == 0.0
        await intake._small.acquire()
        answers = [asyncio.ensure_future(running.stub.Enqueue(enqueue())) for _ in range(2)]
        await until(lambda: len(intake._waiting) == 2)
        intake._small.release()
        await asyncio.gather(*answers)
        await intake.drain()
        assert 0.0 < intake._rest_until <= asyncio.get_running_loop().time() + 0.02


async def blocked(connection: Any, number: int) -> None:
    """Return when this many statements of the test's server wait for a lock."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            # A transaction would go on seeing what it has once seen.
            await connection.execute("SELECT pg_stat_clear_snapshot()")
            waiting = await connection.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND wait_event_type = 'Lock'"
            )
            if waiting >= number:
                return
            await asyncio.sleep(0.01)


async def test_without_postgres_the_answer_is_unavailable_and_soon(
    proxy: LossyProxy, proxied: Gateway
) -> None:
    await proxied.stub.Enqueue(enqueue(request_id="before"))
    await proxy.close()
    clock = asyncio.get_running_loop().time
    asked_at = clock()
    for request_id in ("r", "s"):
        call = proxied.stub.Enqueue(enqueue(request_id=request_id), timeout=10)
        refusal = await refusal_of(call)
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        assert refusal.reason == "STORE_UNAVAILABLE"
        assert refusal.retry_s
        assert refusal.retry_s > 0
    read = await refusal_of(proxied.stub.GetStatus(pb.GetStatusRequest(request_id="before")))
    assert read.reason == "STORE_UNAVAILABLE"
    assert clock() - asked_at < 3
    await proxy.open()
    answer = await proxied.stub.Enqueue(enqueue(request_id="r"), timeout=10)
    assert not answer.replayed


async def test_a_silent_postgres_is_told_before_the_callers_deadline(
    proxy: LossyProxy, proxied: Gateway
) -> None:
    await proxied.stub.Enqueue(enqueue(request_id="before"))
    proxy.is_silent = True
    calls = (
        proxied.stub.Enqueue(enqueue(request_id="r"), timeout=1.0),
        proxied.stub.GetStatus(pb.GetStatusRequest(request_id="before"), timeout=1.0),
        proxied.stub.ListEvents(pb.ListEventsRequest(), timeout=1.0),
    )
    for refusal in await asyncio.gather(*map(refusal_of, calls)):
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        assert refusal.reason == "STORE_UNAVAILABLE"
        assert refusal.retry_s
    proxy.is_silent = False
    proxy.hang_up()


async def test_a_flush_into_silence_is_given_up_and_asked_again(
    proxy: LossyProxy, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "FLUSH_TIMEOUT_S", 0.3)
    async with Gateway(replace(settings, database_url=proxy.url), worker=False) as proxied:
        await proxied.stub.Enqueue(enqueue(request_id="before"))
        proxy.is_silent = True
        call = asyncio.ensure_future(
            proxied.stub.Enqueue(enqueue(request_id="r"), timeout=PATIENCE_S)
        )
        await until(lambda: proxy.swallowed > 0)
        proxy.is_silent = False  # for other connections
        answer = await call
        assert answer.message_id
        assert not answer.replayed
        assert await count(proxied, "messages") == 2


async def test_a_caller_who_waits_for_events_is_not_told_that_the_store_is_away(
    server_only: Gateway,
) -> None:
    request = pb.ListEventsRequest()
    request.wait.FromSeconds(60)
    refusal = await refusal_of(server_only.stub.ListEvents(request, timeout=0.6))
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def flushes_under_way(gateway: Gateway, holder: Any) -> list[asyncio.Future[Any]]:
    """As many calls as there can be flushes, each in one that waits for `holder`'s lock."""
    calls = []
    for n in range(1, intake_module.FLUSHES_AT_ONCE + 1):
        call = gateway.stub.Enqueue(enqueue(request_id=f"under way {n}"))
        calls.append(asyncio.ensure_future(call))
        await blocked(holder, n)
    return calls


async def test_a_full_queue_says_when_to_come_back(settings: Settings, holder: Any) -> None:
    async with Gateway(replace(settings, queue_limit=1), worker=False) as gateway:
        async with holder.transaction():
            await holder.execute("LOCK TABLE request_ids IN ACCESS EXCLUSIVE MODE")
            flushing = await flushes_under_way(gateway, holder)
            queued = asyncio.ensure_future(gateway.stub.Enqueue(enqueue(request_id="b")))
            await until(lambda: len(gateway.server._intake._waiting) == 1)
            refusal = await refusal_of(gateway.stub.Enqueue(enqueue(request_id="c")))
        assert refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (refusal.reason, refusal.quota) == ("QUEUE_FULL", "queue")
        assert refusal.retry_s
        assert refusal.retry_s > 0
        answers = await asyncio.gather(*flushing, queued)
        assert all(answer.message_id for answer in answers)
        assert await count(gateway, "messages") == len(answers)


async def test_large_calls_count_from_the_moment_they_come(settings: Settings) -> None:
    large = "x" * intake_module.ALONE_BYTES
    async with Gateway(replace(settings, queue_limit=1), worker=False) as gateway:
        answer = await gateway.stub.EnqueueBatch(batch(*[enqueue(text=large)] * 3))
    reasons = [r.error.reason for r in answer.results]
    assert reasons == [0, *[errors_pb2.ERROR_REASON_QUEUE_FULL] * 2]


@pytest.mark.parametrize("size", [1000, intake_module.ALONE_BYTES])
async def test_what_waits_is_bounded_in_bytes_too(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(intake_module, "QUEUE_BYTES", 2 * size)
    requests = [enqueue(text="x" * size)] * 2
    answer = await server_only.stub.EnqueueBatch(batch(*requests))
    reasons = [r.error.reason for r in answer.results]
    assert reasons == [0, errors_pb2.ERROR_REASON_QUEUE_FULL]
    # What was stored does not wait any more.
    assert (await server_only.stub.Enqueue(requests[0])).message_id
    await until(lambda: not server_only.server._intake._tasks)
    assert server_only.server._intake._bytes == 0


async def test_a_request_id_of_a_newer_server_fails_alone_and_may_be_asked_again(
    server_only: Gateway,
) -> None:
    await server_only.stub.Enqueue(enqueue(request_id="newer"))
    await server_only.database.write("UPDATE request_ids SET rule = 99")
    requests = [enqueue(request_id="newer"), enqueue(request_id="other")]
    answer = await server_only.stub.EnqueueBatch(batch(*requests), timeout=PATIENCE_S)
    newer, other = answer.results
    assert newer.error.reason == errors_pb2.ERROR_REASON_STORE_UNAVAILABLE
    assert "newer version" in newer.error.description
    assert other.response.message_id
    refusal = await refusal_of(server_only.stub.Enqueue(requests[0], timeout=PATIENCE_S))
    assert refusal.code is grpc.StatusCode.UNAVAILABLE
    assert refusal.retry_s


async def test_an_answer_that_cannot_be_made_fails_alone(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server_only.stub.Enqueue(enqueue(request_id="known"))

    def broken(*_: Any) -> bool:
        raise RuntimeError

    monkeypatch.setattr(intake_module, "is_same_request", broken)
    requests = [enqueue(request_id="known"), enqueue(request_id="other")]
    answer = await server_only.stub.EnqueueBatch(batch(*requests), timeout=PATIENCE_S)
    assert answer.results[0].error.reason == errors_pb2.ERROR_REASON_INTERNAL
    assert answer.results[1].response.message_id


async def test_who_gives_up_before_the_flush_is_not_stored(
    server_only: Gateway, holder: Any
) -> None:
    async with holder.transaction():
        await holder.execute("LOCK TABLE request_ids IN ACCESS EXCLUSIVE MODE")
        flushing = await flushes_under_way(server_only, holder)
        impatient = server_only.stub.Enqueue(enqueue(request_id="b"))
        waiting = server_only.server._intake._waiting
        await until(lambda: len(waiting) == 1)
        impatient.cancel()
        await until(waiting[0].answer.done)
    await asyncio.gather(*flushing)
    again = await server_only.stub.Enqueue(enqueue(request_id="b"))
    assert not again.replayed


async def test_who_gives_up_before_it_is_read_is_not_stored(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    unread: list[Any] = []
    reading = server_only.server._service._enqueue._reading
    monkeypatch.setattr(reading, "_work", unread.extend)
    impatient = server_only.stub.Enqueue(enqueue(request_id="a"))
    await until(lambda: len(unread) == 1)
    impatient.cancel()
    await until(unread[0].answer.done)
    monkeypatch.undo()
    reading._work(unread)
    again = await server_only.stub.Enqueue(enqueue(request_id="a"))
    assert not again.replayed


async def test_calls_that_are_read_together_have_their_errors_apart(
    server_only: Gateway,
) -> None:
    calls = [
        asyncio.ensure_future(
            refusal_of(server_only.stub.Enqueue(enqueue(subject="")))
            if n % 2
            else server_only.stub.Enqueue(enqueue())
        )
        for n in range(20)
    ]
    answers = await asyncio.gather(*calls)
    assert all(answer.message_id for answer in answers[::2])
    assert {answer.violations for answer in answers[1::2]} == {(("message.subject", "REQUIRED"),)}
    assert await count(server_only, "messages") == 10


async def test_who_gives_up_after_the_flush_began_is_stored(
    server_only: Gateway, holder: Any
) -> None:
    async with holder.transaction():
        await holder.execute("LOCK TABLE request_ids IN ACCESS EXCLUSIVE MODE")
        impatient = server_only.stub.Enqueue(enqueue(request_id="a"))
        sent = asyncio.ensure_future(refusal_of(impatient))
        await blocked(holder, 1)
        sent.cancel()
        impatient.cancel()
    again = await server_only.stub.Enqueue(enqueue(request_id="a"))
    assert again.replayed
    assert await count(server_only, "messages") == 1


async def test_what_nobody_foresaw_is_told_by_an_id_alone(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any) -> Any:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(mail, "read_statuses", broken)
    sent = await server_only.stub.Enqueue(enqueue())
    refusal = await refusal_of(server_only.status(sent.message_id))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    [error_id] = re.findall(r"\A\w+ \w+ ([0-9a-f]{12})\Z", refusal.text)
    assert error_id in caplog.text
    assert "hunter2" in caplog.text


async def test_a_call_that_is_cancelled_from_inside_is_still_answered(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cancelled(*_: Any) -> Any:
        raise asyncio.CancelledError

    monkeypatch.setattr(mail, "read_statuses", cancelled)
    sent = await server_only.stub.Enqueue(enqueue())
    refusal = await refusal_of(server_only.status(sent.message_id))
    assert refusal.reason == "INTERNAL"


async def test_a_call_without_a_deadline_gets_the_servers(settings: Settings, holder: Any) -> None:
    async with Gateway(replace(settings, default_deadline_s=0.2), worker=False) as gateway:
        async with holder.transaction():
            await holder.execute("LOCK TABLE preferences IN ACCESS EXCLUSIVE MODE")
            refusal = await refusal_of(
                gateway.stub.GetPrefs(pb.GetPrefsRequest(address="ada@example.test"))
            )
        assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_who_asks_to_wait_is_not_held_to_the_servers_deadline(settings: Settings) -> None:
    request = pb.ListEventsRequest()
    request.wait.FromMilliseconds(300)
    async with Gateway(replace(settings, default_deadline_s=0.2), worker=False) as gateway:
        assert (await gateway.stub.ListEvents(request)).resume_token


async def test_a_time_out_from_within_is_not_told_as_the_callers(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(*_: Any) -> Any:
        raise TimeoutError("some library")

    monkeypatch.setattr(mail, "read_statuses", slow)
    sent = await server_only.stub.Enqueue(enqueue())
    refusal = await refusal_of(server_only.status(sent.message_id))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")


@pytest.mark.parametrize("is_batch", [False, True])
async def test_a_refused_call_holds_nothing_once_it_is_answered(
    server_only: Gateway, is_batch: bool
) -> None:
    """What was raised lies in a cycle with who raised it: that must not hold a request of megabytes."""
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        bad = enqueue("not an address")
        if is_batch:
            await server_only.stub.EnqueueBatch(batch(bad, enqueue()))
        else:
            await refusal_of(server_only.stub.Enqueue(bad))
        del bad
        gc.collect()
        held = {type(left).__name__ for left in gc.garbage}
        assert not held & {"EnqueueRequest", "MailMessage", "Submission", "NewMessage"}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
