"""Calls over a connection that breaks: what was asked for happens once, and its end is told."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from mailgrpc.client import (
    AsyncMailClient,
    CallPolicy,
    ExhaustedError,
    InvalidRequestError,
    MailClient,
    MessageNotFoundError,
    NotEndedError,
    RequestIdMismatchError,
    UnavailableError,
    compose,
    error_from_item,
)
from mailgrpc.testing.outbox import Outbox
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import DeliveryState, SuppressionReason
from mailgrpc.v1.message_pb2 import RetryPolicy
from tests.client.breaking import BreakingTransport, Lost, unavailable

MAIL: dict[str, Any] = {
    "sender": "shop@example.org",
    "to": "ada@example.org",
    "subject": "Receipt",
    "text": "Thank you.",
}


def test_a_lost_answer_makes_no_second_mail(
    client: MailClient, transport: BreakingTransport, mailgrpc_outbox: Outbox
) -> None:
    transport.faults.extend([Lost.REQUEST, Lost.ANSWER, Lost.ANSWER])
    receipt = client.send(**MAIL)
    assert receipt.response.replayed
    assert set(transport.request_ids("Enqueue")) == {receipt.request_id}
    assert len(transport.request_ids("Enqueue")) == 4
    mailgrpc_outbox.settle()
    [mail] = mailgrpc_outbox.mails
    assert mail.message_id == receipt.message_id


def test_two_sends_without_a_request_id_are_two_mails(
    client: MailClient, mailgrpc_outbox: Outbox
) -> None:
    assert client.send(**MAIL).request_id != client.send(**MAIL).request_id
    assert len(mailgrpc_outbox.wait_for(2)) == 2


def test_the_callers_request_is_left_as_it_is(client: MailClient) -> None:
    request = compose(**MAIL)
    request.request_id = ""
    client.enqueue(request)
    assert request.request_id == ""


def test_a_batch_is_repeated_whole_and_mailed_once(
    client: MailClient, transport: BreakingTransport, mailgrpc_outbox: Outbox
) -> None:
    requests = [compose(**MAIL), compose(**{**MAIL, "to": "nobody"}), compose(**MAIL)]
    requests[2].request_id = ""
    transport.faults.append(Lost.ANSWER)
    first, second, third = client.enqueue_batch(requests)
    assert first.response.replayed and third.response.replayed
    assert error_from_item(second.error).reason == "INVALID_ADDRESS"
    assert isinstance(error_from_item(second.error), InvalidRequestError)
    mailgrpc_outbox.settle()
    assert len(mailgrpc_outbox) == 2


def test_a_resend_over_a_lost_answer_forces_one_attempt(
    client: MailClient, transport: BreakingTransport
) -> None:
    receipt = client.send(**{**MAIL, "to": "permerror@example.test"}, wait_s=10)
    assert receipt.state == DeliveryState.DELIVERY_STATE_FAILED
    transport.faults.append(Lost.ANSWER)
    answer = client.resend(pb.ResendRequest(message_id=receipt.message_id))
    assert answer.replayed
    status = client.wait_until_ended(receipt.message_id, timeout_s=10)
    assert [delivery.attempt_count for delivery in status.deliveries] == [2]


def test_what_is_wrong_is_told_field_by_field_and_not_tried_again(
    client: MailClient, transport: BreakingTransport
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.send(sender="shop@example.org", to=["ada@example.org", "nobody"], subject="")
    assert len(transport.requests) == 1
    fields = {violation.field: violation.reason for violation in caught.value.violations}
    assert fields["message.to[1].address"] == "INVALID_ADDRESS"
    assert fields["message.subject"] == "REQUIRED"
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_used_request_id_is_an_error_of_its_own(client: MailClient) -> None:
    receipt = client.send(**MAIL)
    with pytest.raises(RequestIdMismatchError, match="REQUEST_ID_MISMATCH"):
        client.send(**{**MAIL, "subject": "Other"}, request_id=receipt.request_id)


def test_an_unknown_message_is_an_error_of_its_own(client: MailClient) -> None:
    with pytest.raises(MessageNotFoundError, match="MESSAGE_NOT_FOUND"):
        client.get_status(pb.GetStatusRequest(message_id="msg_0"))


def test_a_request_that_is_too_large_is_not_tried_again(
    client: MailClient, transport: BreakingTransport
) -> None:
    with pytest.raises(ExhaustedError):
        client.send(**MAIL, attachments=[("film.mp4", bytes(11 * 1024 * 1024))])
    assert len(transport.requests) == 1


def test_it_gives_up_within_its_time(client: MailClient, transport: BreakingTransport) -> None:
    transport.faults.extend([Lost.REQUEST] * 1000)
    with pytest.raises(UnavailableError, match="connection reset"):
        client.send(**MAIL, timeout_s=30)
    assert 20 < sum(transport.slept) <= 30


def test_it_comes_back_when_the_server_says(
    client: MailClient, transport: BreakingTransport
) -> None:
    transport.faults.append(unavailable(retry_after_s=7))
    client.send(**MAIL)
    [wait_s] = transport.slept
    assert 7 <= wait_s <= 7 * 1.2


def test_it_does_not_wait_for_what_lies_beyond_its_time(
    client: MailClient, transport: BreakingTransport
) -> None:
    transport.faults.append(unavailable(retry_after_s=70))
    with pytest.raises(UnavailableError):
        client.send(**MAIL, timeout_s=60)
    assert transport.slept == []


def test_each_wait_is_told_to_who_asked(mailgrpc_target: str) -> None:
    transport = BreakingTransport(mailgrpc_target)
    transport.faults.extend([Lost.REQUEST, Lost.ANSWER])
    told: list[float] = []
    with MailClient(transport=transport, on_retry=lambda _, wait_s: told.append(wait_s)) as client:
        client.send(**MAIL)
    assert told == transport.slept


def test_nobody_listens() -> None:
    policy = CallPolicy(timeout_s=0.3, first_wait_s=0.1)
    with (
        MailClient("127.0.0.1:1", policy=policy) as client,
        pytest.raises(UnavailableError, match="refused"),
    ):
        client.send(**MAIL)


def test_send_waits_for_the_end(client: MailClient) -> None:
    assert client.send(**MAIL, wait_s=10).state == DeliveryState.DELIVERY_STATE_SENT


def test_send_says_who_does_not_want_it(client: MailClient, mailgrpc_outbox: Outbox) -> None:
    change = pb.PrefsChange(block_categories=["newsletter"])
    client.update_prefs(pb.UpdatePrefsRequest(address="grace@example.org", change=change))
    receipt = client.send(
        **{**MAIL, "to": ["ada@example.org", "grace@example.org"]}, categories=["newsletter"]
    )
    [suppressed] = receipt.not_queued
    assert suppressed.recipient == "grace@example.org"
    assert suppressed.suppression_reason == SuppressionReason.SUPPRESSION_REASON_PREFERENCE
    [mail] = mailgrpc_outbox.wait_for(1)
    assert mail.to == ("ada@example.org",)


def test_a_message_that_does_not_end_in_time_is_told_with_its_status(
    mailgrpc_client: MailClient,
) -> None:
    later = {**MAIL, "to": "temperror+9@example.test"}
    with pytest.raises(NotEndedError) as caught:
        mailgrpc_client.send(**later, wait_s=0.3)
    assert not caught.value.status.ended
    assert isinstance(caught.value, TimeoutError)


def test_follow_tells_a_messages_way_from_its_first_event_to_its_end(client: MailClient) -> None:
    backoff = RetryPolicy()
    backoff.initial_backoff.FromSeconds(1)
    receipt = client.send(**{**MAIL, "to": "temperror+1@example.test"}, retry=backoff)
    events = client.follow(receipt.message_id, token=receipt.response.resume_token)
    states = [event.state_changed.delivery.state for event in events]
    assert [DeliveryState.Name(state).removeprefix("DELIVERY_STATE_") for state in states] == [
        "QUEUED",
        "SENDING",
        "DEFERRED",
        "SENDING",
        "SENT",
    ]


def test_follow_may_begin_anywhere(client: MailClient) -> None:
    """A replayed Enqueue gives a token from among the events, or from behind all of them."""
    receipt = client.send(**MAIL, wait_s=10)
    again = client.send(**MAIL, request_id=receipt.request_id)
    assert again.response.replayed
    behind = client.get_status(pb.GetStatusRequest(message_id=receipt.message_id)).resume_token
    for token in (receipt.response.resume_token, again.response.resume_token, behind):
        events = list(client.follow(receipt.message_id, token=token))
        versions = [event.state_changed.delivery.version for event in events]
        assert versions == [1, 2, 3][3 - len(versions) :]
    assert versions == []


def test_follow_of_what_has_ended_ends_at_once(client: MailClient) -> None:
    receipt = client.send(**MAIL, wait_s=10)
    assert list(client.follow(receipt.message_id)) == []


def test_a_message_that_is_cleared_while_somebody_waits_is_told_as_gone(
    client: MailClient,
) -> None:
    from datetime import UTC, datetime, timedelta

    from mailgrpc.client.compose import timestamp
    from mailgrpc.v1.delivery_pb2 import MessageFilter

    later = datetime.now(UTC) + timedelta(hours=1)
    receipt = client.send(**MAIL, send_at=later, tags=["to-be-cleared"])
    events = client.follow(receipt.message_id, token=receipt.response.resume_token)
    assert next(events).recipient == "ada@example.org"
    everything = MessageFilter(tags=["to-be-cleared"], created_before=timestamp(later))
    assert client.clear(pb.ClearRequest(filter=everything, force=True)).cleared_count == 1
    assert len(list(events)) == 1
    with pytest.raises(MessageNotFoundError):
        client.wait_until_ended(receipt.message_id)


def test_list_events_may_wait_longer_than_one_try(mailgrpc_target: str) -> None:
    policy = CallPolicy(timeout_s=0.2, try_timeout_s=0.2)
    with MailClient(mailgrpc_target, policy=policy) as client:
        request = pb.ListEventsRequest()
        request.wait.FromMilliseconds(500)
        assert client.list_events(request).resume_token


async def test_the_asyncio_client_is_the_same(
    mailgrpc_target: str, mailgrpc_outbox: Outbox
) -> None:
    async with AsyncMailClient(mailgrpc_target) as client:
        receipt = await client.send(**MAIL, wait_s=10)
        assert receipt.state == DeliveryState.DELIVERY_STATE_SENT
        with pytest.raises(RequestIdMismatchError):
            await client.send(**{**MAIL, "subject": "Other"}, request_id=receipt.request_id)
        token = receipt.response.resume_token
        events = [event async for event in client.follow(receipt.message_id, token=token)]
        assert [event.state_changed.delivery.version for event in events] == [1, 2, 3]
    assert len(mailgrpc_outbox) == 1


def test_every_method_of_the_asyncio_client_has_its_blocking_face() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(AsyncMailClient) - public(MailClient) == {"watcher", "following"}
    assert public(MailClient) - public(AsyncMailClient) == set()


def test_a_closed_client_says_so(mailgrpc_target: str) -> None:
    client = MailClient(mailgrpc_target)
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.send(**MAIL)


def test_the_settings_name_the_server(
    mailgrpc_target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAILGRPC_TARGET", mailgrpc_target)
    with MailClient.from_settings() as client:
        assert client.get_prefs(pb.GetPrefsRequest(address="x@example.org")).prefs.accepts_all
