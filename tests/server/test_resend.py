"""Resend forces one more attempt, where that is safe or the risk is accepted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from mailgrpc.config import Settings
from mailgrpc.core.delivery import State, SuppressionReason
from mailgrpc.server import resend as served
from mailgrpc.v1 import delivery_pb2, errors_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.db.factory import put_delivery, suppress
from tests.gateway import Gateway, enqueue
from tests.server.answers import refusal_of
from tests.server.proxy import LossyProxy

PAST = datetime.now(UTC) - timedelta(days=1)
OK = ""


async def sent(gateway: Gateway, *to: str, **fields: Any) -> str:
    return (await gateway.stub.Enqueue(enqueue(*to, **fields))).message_id


async def resend(gateway: Gateway, message_id: str, *recipients: str, **fields: Any) -> Any:
    request = pb.ResendRequest(message_id=message_id, recipients=recipients, **fields)
    return await gateway.stub.Resend(request)


def reason(result: Any) -> str:
    if not result.HasField("error"):
        return OK
    return errors_pb2.ErrorReason.Name(result.error.reason).removeprefix("ERROR_REASON_")


ROWS = {
    # state, columns, without the risk accepted, with the risk accepted
    "QUEUED": (State.QUEUED, {}, "NOT_RESENDABLE", "NOT_RESENDABLE"),
    "SENDING": (State.SENDING, {}, "MESSAGE_SENDING", "MESSAGE_SENDING"),
    "DEFERRED": (State.DEFERRED, {}, OK, OK),
    "SENT": (State.SENT, {}, "DUPLICATE_RISK", OK),
    "DELIVERED": (State.DELIVERED, {}, "DUPLICATE_RISK", OK),
    "BOUNCED": (State.BOUNCED, {}, OK, OK),
    "COMPLAINED": (State.COMPLAINED, {}, "NOT_RESENDABLE", "NOT_RESENDABLE"),
    "FAILED": (State.FAILED, {}, OK, OK),
    "OUTCOME_UNKNOWN": (State.OUTCOME_UNKNOWN, {"possibly_sent": True}, "DUPLICATE_RISK", OK),
    "SUPPRESSED": (State.SUPPRESSED, {"suppression_reason": 1}, OK, OK),
    "SUPPRESSED as a duplicate": (
        State.SUPPRESSED,
        {"suppression_reason": 7},
        "DUPLICATE_RISK",
        OK,
    ),
    "CANCELLED": (State.CANCELLED, {}, OK, OK),
    "EXPIRED": (State.EXPIRED, {"expire_at": PAST}, OK, OK),
    "DEFERRED, possibly sent": (State.DEFERRED, {"possibly_sent": True}, "DUPLICATE_RISK", OK),
    "FAILED, possibly sent": (State.FAILED, {"possibly_sent": True}, "DUPLICATE_RISK", OK),
    "EXPIRED, possibly sent": (State.EXPIRED, {"possibly_sent": True}, "DUPLICATE_RISK", OK),
}


@pytest.mark.parametrize("accepted", [False, True], ids=["no risk", "risk accepted"])
@pytest.mark.parametrize(
    ("state", "columns", "without", "with_risk"), ROWS.values(), ids=ROWS.keys()
)
async def test_each_state_allows_what_the_contract_says(
    server_only: Gateway,
    state: State,
    columns: dict[str, Any],
    without: str,
    with_risk: str,
    accepted: bool,
) -> None:
    message_id = await sent(server_only)
    await put_delivery(server_only.database, message_id, state, **columns)
    before = (await server_only.status(message_id)).deliveries[0]
    [until] = await server_only.database.fetch("SELECT expire_at FROM deliveries")
    answer = await resend(server_only, message_id, accept_duplicate_risk=accepted)
    [result] = answer.results
    assert reason(result) == (with_risk if accepted else without)
    assert result.delivery == (await server_only.status(message_id)).deliveries[0]
    if reason(result) != OK:
        assert result.error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
        assert result.delivery == before
        return
    assert result.delivery.state == delivery_pb2.DELIVERY_STATE_QUEUED
    assert result.delivery.wait_reason == delivery_pb2.WAIT_REASON_DUE
    assert result.delivery.version == before.version + 1
    may_have = before.possibly_sent or state in (State.SENT, State.DELIVERED, State.OUTCOME_UNKNOWN)
    assert result.delivery.possibly_sent == may_have
    assert result.delivery.suppression_reason == 0
    [row] = await server_only.database.fetch(
        """SELECT d.forced, d.expire_at, (SELECT count(*) FROM due) AS due,
               (SELECT count(*) FROM scheduled) AS scheduled FROM deliveries d"""
    )
    assert (row["due"], row["scheduled"]) == (1, 0)
    # A deferred one goes on as before; one that had ended gets a single attempt and all the time.
    ended = state is not State.DEFERRED
    assert row["forced"] == ended
    assert (row["expire_at"] == until["expire_at"]) != ended
    assert row["expire_at"] > datetime.now(UTC)


async def test_an_expired_message_is_sent_after_all(server_only: Gateway) -> None:
    message_id = await sent(server_only)
    await put_delivery(server_only.database, message_id, State.EXPIRED, expire_at=PAST)
    await resend(server_only, message_id)
    async with Gateway(server_only.settings) as with_worker:
        status = await with_worker.ended(message_id)
        assert len(with_worker.capture.outbox) == 1
    assert status.state == delivery_pb2.DELIVERY_STATE_SENT


FORCED_ENDS = {
    "temperror@example.test": delivery_pb2.DELIVERY_STATE_FAILED,
    "permerror@example.test": delivery_pb2.DELIVERY_STATE_FAILED,
    "timeout@example.test": delivery_pb2.DELIVERY_STATE_OUTCOME_UNKNOWN,
    "drop@example.test": delivery_pb2.DELIVERY_STATE_OUTCOME_UNKNOWN,
}


@pytest.mark.parametrize("recipient", FORCED_ENDS)
async def test_a_forced_attempt_is_the_only_one(server_only: Gateway, recipient: str) -> None:
    """Also where the mode is RETRYING: without proof it ends OUTCOME_UNKNOWN."""
    message_id = await sent(server_only, recipient)
    await put_delivery(server_only.database, message_id, State.FAILED)
    await resend(server_only, message_id)
    async with Gateway(server_only.settings) as with_worker:
        status = await with_worker.ended(message_id)
    assert status.state == FORCED_ENDS[recipient]
    assert status.deliveries[0].attempt_count == 1


async def test_a_deferred_delivery_is_due_now_and_its_policy_goes_on(
    server_only: Gateway,
) -> None:
    message_id = await sent(server_only, "temperror@example.test")
    await put_delivery(server_only.database, message_id, State.DEFERRED, attempt_count=3)
    await resend(server_only, message_id)
    async with Gateway(server_only.settings) as with_worker:
        status = await with_worker.status(message_id)
        async with asyncio.timeout(10):
            while status.state != delivery_pb2.DELIVERY_STATE_DEFERRED:
                await asyncio.sleep(0.01)
                status = await with_worker.status(message_id)
    assert status.deliveries[0].attempt_count == 4
    assert status.deliveries[0].wait_reason == delivery_pb2.WAIT_REASON_BACKOFF


@pytest.mark.parametrize("cause", ["preference", "suppression"])
@pytest.mark.parametrize("state", [State.SUPPRESSED, State.DEFERRED, State.FAILED])
async def test_what_is_still_refused_is_not_resent(
    server_only: Gateway, cause: str, state: State
) -> None:
    message_id = await sent(server_only, flags=2)
    await put_delivery(server_only.database, message_id, state)
    stands: Any = pb.UpdatePrefsRequest(address="ada@example.test", blocked_flags=2)
    if cause == "preference":
        await server_only.stub.UpdatePrefs(stands)
    else:
        await suppress(server_only.database, "ada@example.test", SuppressionReason.BOUNCE)
    answer = await resend(server_only, message_id, accept_duplicate_risk=True)
    assert reason(answer.results[0]) == "STILL_SUPPRESSED"
    if cause == "preference":
        stands.blocked_flags = 4
        await server_only.stub.UpdatePrefs(stands)
    else:
        await server_only.database.write("DELETE FROM suppressions")
    answer = await resend(server_only, message_id, accept_duplicate_risk=True)
    assert reason(answer.results[0]) == OK


async def test_each_recipient_is_answered_for_itself_in_the_order_asked(
    server_only: Gateway,
) -> None:
    message_id = await sent(server_only, *(f"{name}@example.test" for name in "abcd"))
    for number, state in enumerate((State.FAILED, State.SENT, State.COMPLAINED), 1):
        await put_delivery(server_only.database, message_id, state, number=number)
    answer = await resend(server_only, message_id, "C@example.test", "a@EXAMPLE.test")
    assert [(r.delivery.recipient, reason(r)) for r in answer.results] == [
        ("c@example.test", "NOT_RESENDABLE"),
        ("a@example.test", OK),
    ]
    answer = await resend(server_only, message_id)
    assert [reason(r) for r in answer.results] == [
        "NOT_RESENDABLE",  # queued by now
        "DUPLICATE_RISK",
        "NOT_RESENDABLE",
        "NOT_RESENDABLE",
    ]


async def test_somebody_whom_the_message_does_not_go_to_stops_the_whole_call(
    server_only: Gateway,
) -> None:
    message_id = await sent(server_only)
    await put_delivery(server_only.database, message_id, State.FAILED)
    to = ("ada@example.test", "Ada@example.test", "eve@example.test")
    refusal = await refusal_of(resend(server_only, message_id, *to, request_id="r"))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.violations == (("recipients[2]", "INVALID_ADDRESS"),)
    assert (await server_only.status(message_id)).state == delivery_pb2.DELIVERY_STATE_FAILED
    assert not (await resend(server_only, message_id, request_id="r")).replayed


async def test_erased_content_cannot_be_sent(server_only: Gateway) -> None:
    message_id = await sent(server_only)
    await put_delivery(server_only.database, message_id, State.FAILED)
    await server_only.database.write("UPDATE messages SET content = NULL")
    refusal = await refusal_of(resend(server_only, message_id))
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason == "CONTENT_ERASED"


async def test_a_repeated_resend_forces_nothing_anew(server_only: Gateway) -> None:
    message_id = await sent(server_only, "ada@example.test", "bob@example.test")
    await put_delivery(server_only.database, message_id, State.FAILED, number=1)
    await put_delivery(server_only.database, message_id, State.SENT, number=2)
    first = await resend(server_only, message_id, request_id="r")
    assert [reason(r) for r in first.results] == [OK, "DUPLICATE_RISK"]
    assert not first.replayed
    await put_delivery(server_only.database, message_id, State.FAILED, number=1)
    again = await resend(server_only, message_id, request_id="r")
    assert again.replayed
    assert [reason(r) for r in again.results] == [OK, "DUPLICATE_RISK"]  # as answered then
    assert again.results[0].delivery.state == delivery_pb2.DELIVERY_STATE_FAILED  # as it is now
    assert again.results[0].delivery.version == first.results[0].delivery.version + 1


async def test_20_resends_at_once_with_one_id_force_one_attempt(server_only: Gateway) -> None:
    message_id = await sent(server_only)
    await put_delivery(server_only.database, message_id, State.FAILED)
    answers = await asyncio.gather(
        *(resend(server_only, message_id, request_id="r") for _ in range(20))
    )
    assert [a.replayed for a in answers].count(False) == 1
    assert {reason(a.results[0]) for a in answers} == {OK}
    assert {a.results[0].delivery.version for a in answers} == {3}


async def test_another_resend_with_a_known_id_is_refused(server_only: Gateway) -> None:
    message_id = await sent(server_only)
    await put_delivery(server_only.database, message_id, State.FAILED)
    await resend(server_only, message_id, request_id="r")
    other = await sent(server_only)
    for call in (
        resend(server_only, message_id, request_id="r", accept_duplicate_risk=True),
        resend(server_only, message_id, "ada@example.test", request_id="r"),
        resend(server_only, other, request_id="r"),
    ):
        refusal = await refusal_of(call)
        assert refusal.code is grpc.StatusCode.ALREADY_EXISTS
        assert refusal.reason == "REQUEST_ID_MISMATCH"


async def test_a_repeated_resend_is_known_after_the_message_was_cleared(
    server_only: Gateway,
) -> None:
    message_id = await sent(server_only)
    await put_delivery(server_only.database, message_id, State.SENT)
    await resend(server_only, message_id, "ada@example.test", request_id="r")
    wanted = delivery_pb2.MessageFilter(message_ids=[message_id])
    wanted.created_before.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    await server_only.stub.Clear(pb.ClearRequest(filter=wanted))
    again = await resend(server_only, message_id, "ada@example.test", request_id="r")
    assert again.replayed
    assert reason(again.results[0]) == "DUPLICATE_RISK"
    assert (await refusal_of(resend(server_only, message_id))).reason == "MESSAGE_NOT_FOUND"


async def test_a_change_in_between_is_decided_upon_again(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    message_id = await sent(server_only)
    await put_delivery(server_only.database, message_id, State.FAILED)
    read = served.read_refusals

    async def then_it_was_sent(*args: Any) -> Any:
        monkeypatch.setattr(served, "read_refusals", read)
        await put_delivery(server_only.database, message_id, State.SENT)
        return await read(*args)

    monkeypatch.setattr(served, "read_refusals", then_it_was_sent)
    answer = await resend(server_only, message_id, request_id="r")
    assert reason(answer.results[0]) == "DUPLICATE_RISK"
    again = await resend(server_only, message_id, request_id="r")
    assert reason(again.results[0]) == "DUPLICATE_RISK"


@pytest.fixture
async def proxied(
    database_url: str, settings: Settings
) -> AsyncIterator[tuple[LossyProxy, Gateway]]:
    async with (
        LossyProxy(database_url) as proxy,
        Gateway(replace(settings, database_url=proxy.url), worker=False) as gateway,
    ):
        yield proxy, gateway


async def test_when_the_answer_of_its_commit_is_lost_it_was_done_once(
    proxied: tuple[LossyProxy, Gateway],
) -> None:
    proxy, gateway = proxied
    message_id = await sent(gateway)
    await put_delivery(gateway.database, message_id, State.FAILED)
    proxy.lose_answer_to("resend_deliveries")
    answer = await resend(gateway, message_id, request_id="r")
    assert proxy.lost == 1
    assert not answer.replayed
    assert reason(answer.results[0]) == OK
    assert answer.results[0].delivery.version == 3


async def test_without_an_id_a_lost_answer_is_told_as_in_doubt(
    proxied: tuple[LossyProxy, Gateway],
) -> None:
    proxy, gateway = proxied
    message_id = await sent(gateway)
    await put_delivery(gateway.database, message_id, State.FAILED)
    proxy.lose_answer_to("resend_deliveries")
    refusal = await refusal_of(resend(gateway, message_id))
    assert refusal.reason == "STORE_UNAVAILABLE"
    assert proxy.lost == 1
    [row] = await gateway.database.fetch("SELECT state, version FROM deliveries")
    assert (row["state"], row["version"]) == (State.QUEUED, 3)
