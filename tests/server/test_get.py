"""GetStatus and GetMessage: a message as it was handed over, and what became of it."""

from __future__ import annotations

from typing import Any

import pytest

from mailgrpc.core.delivery import State
from mailgrpc.v1 import delivery_pb2, message_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.db.factory import put_delivery
from tests.gateway import Gateway, enqueue
from tests.server.answers import refusal_of

FILE = message_pb2.Attachment(
    filename="a.pdf", content_type="application/pdf", content_id="a", data=b"%PDF\0\xff"
)


def full() -> pb.EnqueueRequest:
    """A request that says everything that can be said."""
    request = enqueue(
        *("Ada@EXAMPLE.test", "bob@example.test"),
        request_id="r",
        cc=[message_pb2.Recipient(address="cyd@example.test", name="Cyd")],
        bcc=[message_pb2.Recipient(address="dan@example.test")],
        reply_to=[message_pb2.Mailbox(address="desk@example.test", name="Desk")],
        html="<p>A word.",
        headers=[message_pb2.Header(name="In-Reply-To", value="<1@example.test>")],
        attachments=[FILE],
        tags=["a", "b"],
        categories=["receipts"],
        flags=8,
        custom_args={"order": "4711"},
        correlation_id="order-4711",
    )
    options = request.options
    options.mode = message_pb2.DELIVERY_MODE_SEND_ONCE
    options.priority = message_pb2.PRIORITY_HIGH
    options.channel = "bulk"
    options.retry.max_attempts = 3
    options.retry.multiplier = 1.5
    options.retry.initial_backoff.FromMilliseconds(1500)
    options.dedupe_window.FromSeconds(60)
    return request


@pytest.mark.parametrize("view", [pb.MESSAGE_VIEW_UNSPECIFIED, pb.MESSAGE_VIEW_BASIC])
async def test_the_basic_view_names_files_without_their_data(
    server_only: Gateway, view: Any
) -> None:
    request = full()
    answer = await server_only.stub.Enqueue(request)
    got = await server_only.stub.GetMessage(
        pb.GetMessageRequest(message_id=answer.message_id, view=view)
    )
    request.message.attachments[0].ClearField("data")
    request.message.to[0].address = "Ada@example.test"  # the domain is normalised, Ada is not
    assert (got.message, got.options) == (request.message, request.options)


async def test_the_full_view_is_the_message_as_handed_over(server_only: Gateway) -> None:
    request = full()
    await server_only.stub.Enqueue(request)
    got = await server_only.stub.GetMessage(
        pb.GetMessageRequest(request_id="r", view=pb.MESSAGE_VIEW_FULL)
    )
    request.message.to[0].address = "Ada@example.test"
    assert (got.message, got.options) == (request.message, request.options)


async def test_a_message_is_found_by_either_id(server_only: Gateway) -> None:
    answer = await server_only.stub.Enqueue(full())
    by_id = await server_only.stub.GetStatus(pb.GetStatusRequest(message_id=answer.message_id))
    by_request = await server_only.stub.GetStatus(pb.GetStatusRequest(request_id="r"))
    assert by_id.status == by_request.status
    status = by_id.status
    assert (status.message_id, status.request_id) == (answer.message_id, "r")
    assert (status.correlation_id, list(status.tags)) == ("order-4711", ["a", "b"])
    assert status.subject == "Hello"
    assert [(d.recipient, d.role) for d in status.deliveries] == [
        ("ada@example.test", delivery_pb2.RECIPIENT_ROLE_TO),
        ("bob@example.test", delivery_pb2.RECIPIENT_ROLE_TO),
        ("cyd@example.test", delivery_pb2.RECIPIENT_ROLE_CC),
        ("dan@example.test", delivery_pb2.RECIPIENT_ROLE_BCC),
    ]
    assert {d.message_id for d in status.deliveries} == {answer.message_id}
    assert [(c.state, c.count) for c in status.counts] == [(delivery_pb2.DELIVERY_STATE_QUEUED, 4)]
    assert not status.ended


async def test_the_counts_say_more_than_the_aggregate(server_only: Gateway) -> None:
    answer = await server_only.stub.Enqueue(full())
    states = (State.SENT, State.FAILED, State.SENT, State.SUPPRESSED)
    for number, state in enumerate(states, 1):
        await put_delivery(server_only.database, answer.message_id, state, number=number)
    status = await server_only.status(answer.message_id)
    assert status.ended
    assert status.state == delivery_pb2.DELIVERY_STATE_FAILED
    assert {c.state: c.count for c in status.counts} == {4: 2, 8: 1, 10: 1}
    assert status.updated_at.ToDatetime() > status.created_at.ToDatetime()


async def test_attempts_are_told_in_the_order_in_which_they_started(gateway: Gateway) -> None:
    def quickly(request: Any) -> None:
        request.options.retry.initial_backoff.FromSeconds(1)
        request.options.retry.max_attempts = 2

    answer = await gateway.stub.Enqueue(
        enqueue(
            *("temperror+1@example.test", "ada@example.test", "permerror@example.test"),
            edit=quickly,
        )
    )
    await gateway.ended(answer.message_id)
    got = await gateway.stub.GetMessage(pb.GetMessageRequest(message_id=answer.message_id))
    recipient = {d.delivery_id: d.recipient.partition("@")[0] for d in got.status.deliveries}
    told = [(recipient[a.delivery_id], a.number, a.result.outcome) for a in got.attempts]
    assert sorted(told[:3]) == [
        ("ada", 1, delivery_pb2.ATTEMPT_OUTCOME_ACCEPTED),
        ("permerror", 1, delivery_pb2.ATTEMPT_OUTCOME_REJECTED),
        ("temperror+1", 1, delivery_pb2.ATTEMPT_OUTCOME_DEFERRED),
    ]
    assert told[3:] == [("temperror+1", 2, delivery_pb2.ATTEMPT_OUTCOME_ACCEPTED)]
    started = [a.started_at.ToNanoseconds() for a in got.attempts]
    assert started == sorted(started)
    assert {(a.channel, a.provider) for a in got.attempts} == {("default", "capture")}
    assert len({a.call_id for a in got.attempts[:3]}) == 1
    [captured, *_] = gateway.capture.outbox
    assert f"Message-ID: {got.rfc_message_id}".encode() in captured.raw


async def test_an_attempt_that_runs_has_no_result(server_only: Gateway) -> None:
    answer = await server_only.stub.Enqueue(enqueue())
    await put_delivery(server_only.database, answer.message_id, State.SENDING)
    got = await server_only.stub.GetMessage(pb.GetMessageRequest(message_id=answer.message_id))
    [attempt] = got.attempts
    assert attempt.number == 1
    assert attempt.HasField("started_at")
    assert not attempt.HasField("ended_at")
    assert not attempt.HasField("result")


async def test_erased_content_is_absent_and_the_status_is_told(server_only: Gateway) -> None:
    answer = await server_only.stub.Enqueue(enqueue())
    await server_only.database.write("UPDATE messages SET content = NULL, subject = ''")
    got = await server_only.stub.GetMessage(pb.GetMessageRequest(message_id=answer.message_id))
    assert not got.HasField("message")
    assert got.status.message_id == answer.message_id


async def test_nothing_is_missed_from_the_token_of_an_answer(server_only: Gateway) -> None:
    answer = await server_only.stub.Enqueue(enqueue(request_id="r"))
    status = await server_only.stub.GetStatus(pb.GetStatusRequest(message_id=answer.message_id))
    message = await server_only.stub.GetMessage(pb.GetMessageRequest(message_id=answer.message_id))
    await put_delivery(server_only.database, answer.message_id, State.FAILED)
    resent = await server_only.stub.Resend(pb.ResendRequest(message_id=answer.message_id))
    for token, versions in (
        (answer.resume_token, [1, 3]),
        (status.resume_token, [3]),
        (message.resume_token, [3]),
        (resent.resume_token, [3]),
    ):
        request = pb.ListEventsRequest(resume_token=token)
        request.wait.FromSeconds(5)
        events = (await server_only.stub.ListEvents(request)).events
        assert [e.state_changed.delivery.version for e in events] == versions


async def test_a_removed_message_is_not_found(server_only: Gateway) -> None:
    answer = await server_only.stub.Enqueue(enqueue())
    await server_only.database.write("DELETE FROM messages")
    for call in (
        server_only.stub.GetStatus(pb.GetStatusRequest(message_id=answer.message_id)),
        server_only.stub.GetMessage(pb.GetMessageRequest(message_id=answer.message_id)),
    ):
        assert (await refusal_of(call)).reason == "MESSAGE_NOT_FOUND"
