"""SendGrid: what a request says, what each answer means, what is refused beforehand."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from mailgrpc.core import ids
from mailgrpc.core.delivery import Cause, Outcome, Result, Role
from mailgrpc.core.message import Attachment, Header, Mailbox, Recipient
from mailgrpc.errors import Reason
from mailgrpc.providers.provider import ProbeFailed
from mailgrpc.providers.sendgrid import SendGridProvider
from mailgrpc.providers.sendgrid_body import check_message, request_body

from .calls import call_of, call_to, message
from .sendgrid_lookalike import (
    RESET_READ,
    RESET_UNREAD,
    SILENT,
    Planned,
    Raw,
    SendGridLookalike,
    check_mail,
)

ANN, BOB, CAT = "ann@example.org", "bob@example.org", "cat@example.org"


@asynccontextmanager
async def provider_for(peer: SendGridLookalike, **settings: Any) -> AsyncIterator[SendGridProvider]:
    defaults = {
        "base_url": f"http://127.0.0.1:{peer.port}",
        "api_key": peer.api_key,
        "concurrency": 2,
        "attempt_timeout_s": 3.0,
        "timeout_s": 0.25,
    }
    provider = SendGridProvider(**{**defaults, **settings})
    try:
        yield provider
    finally:
        await provider.close()


async def send_planned(*plan: Planned | Raw | str, **settings: Any) -> Result:
    async with (
        SendGridLookalike(plan=list(plan)) as peer,
        provider_for(peer, **settings) as provider,
    ):
        results = await provider.send(call_to(ANN, BOB))
    assert len(set(map(str, results))) == 1
    return results[0]


# The request


def body_of(mail: Any) -> dict[str, Any]:
    call = call_of(mail)
    body: dict[str, Any] = json.loads(request_body(call, call.addressees))
    check_mail(body)
    return body


def test_every_field_of_a_message_is_in_the_request() -> None:
    mail = message(
        recipients=(
            Recipient(ANN, 'Ann "The" Lee, Jr.'),
            Recipient(BOB, role=Role.CC),
            Recipient(CAT, role=Role.BCC),
        ),
        html="<p>Thank you.</p>",
        reply_to=(Mailbox("help@example.org", "Help"), Mailbox("b@example.org")),
        headers=(Header("X-One", "1"), Header("X-Two", "zwei ü")),
        attachments=(
            Attachment("a.txt", b"first", "text/plain"),
            Attachment("b.png", b"second", "image/png", "logo"),
        ),
        tags=("receipt", "shop", "receipt"),
        custom_args={"order": "4711"},
    )
    call = call_of(mail)
    body = json.loads(request_body(call, call.addressees))
    check_mail(body)
    assert body["from"] == {"email": "shop@example.org", "name": "The Shop"}
    assert body["subject"] == "Your receipt"
    assert body["content"] == [
        {"type": "text/plain", "value": "Thank you.\n"},
        {"type": "text/html", "value": "<p>Thank you.</p>"},
    ]
    assert [r["email"] for r in body["reply_to_list"]] == ["help@example.org", "b@example.org"]
    assert body["headers"] == {
        "Message-ID": call.rfc_message_id,
        "X-One": "1",
        "X-Two": "zwei ü",
    }
    assert [(a["filename"], a["disposition"]) for a in body["attachments"]] == [
        ("a.txt", "attachment"),
        ("b.png", "inline"),
    ]
    assert base64.b64decode(body["attachments"][1]["content"]) == b"second"
    assert body["attachments"][1]["content_id"] == "logo"
    assert body["categories"] == ["receipt", "shop"]
    assert body["custom_args"] == {
        "order": "4711",
        "mailgrpc_message_id": ids.to_text(ids.MESSAGE, call.message_id),
        "mailgrpc_call_id": ids.to_text(ids.CALL, call.call_id),
    }


def test_each_recipient_sees_itself_alone_and_carries_its_delivery_id() -> None:
    call = call_of(message(recipients=(Recipient(ANN, "Ann"), Recipient(BOB, role=Role.BCC))))
    body = json.loads(request_body(call, call.addressees))
    assert body["personalizations"] == [
        {
            "to": [{"email": address, **name}],
            "custom_args": {
                "mailgrpc_delivery_id": ids.to_text(ids.DELIVERY, addressee.delivery_id)
            },
        }
        for addressee, address, name in zip(
            call.addressees, (ANN, BOB), ({"name": "Ann"}, {}), strict=True
        )
    ]


def test_an_address_is_not_parsed_again() -> None:
    odd = '"ann <x@y.org>"@example.org'
    assert body_of_unchecked(odd)["personalizations"][0]["to"] == [{"email": odd}]


def body_of_unchecked(address: str) -> dict[str, Any]:
    call = call_to(address)
    body: dict[str, Any] = json.loads(request_body(call, call.addressees))
    return body


def test_one_reply_to_and_no_text() -> None:
    body = body_of(message(ANN, reply_to=(Mailbox("h@example.org"),), text="", html="<p>x</p>"))
    assert body["reply_to"] == {"email": "h@example.org"}
    assert [c["type"] for c in body["content"]] == ["text/html"]
    assert [c["value"] for c in body_of(message(ANN, text=""))["content"]] == [" "]


async def test_text_that_looks_like_an_api_key_is_rejected_and_not_raised() -> None:
    async with SendGridLookalike() as peer, provider_for(peer) as provider:
        [result] = await provider.send(call_of(message(ANN, text="SG.abc.def is a key")))
    assert (result.outcome, result.cause) == (Outcome.REJECTED, Cause.CONTENT)
    assert peer.requests == 0


# The answers


@pytest.mark.parametrize(
    ("status", "outcome", "cause"),
    [
        (202, Outcome.ACCEPTED, Cause.UNSPECIFIED),
        (200, Outcome.UNKNOWN, Cause.PROVIDER),
        (302, Outcome.UNKNOWN, Cause.PROVIDER),
        (303, Outcome.UNKNOWN, Cause.PROVIDER),
        (307, Outcome.DEFERRED, Cause.PROVIDER),
        (308, Outcome.DEFERRED, Cause.PROVIDER),
        (400, Outcome.REJECTED, Cause.CONTENT),
        (401, Outcome.DEFERRED, Cause.CREDENTIALS),
        (403, Outcome.DEFERRED, Cause.CREDENTIALS),
        (404, Outcome.DEFERRED, Cause.PROVIDER),
        (413, Outcome.REJECTED, Cause.TOO_LARGE),
        (429, Outcome.DEFERRED, Cause.RATE_LIMITED),
        (500, Outcome.UNKNOWN, Cause.PROVIDER),
        (502, Outcome.UNKNOWN, Cause.PROVIDER),
        (503, Outcome.UNKNOWN, Cause.PROVIDER),
        (504, Outcome.UNKNOWN, Cause.PROVIDER),
    ],
)
async def test_what_a_status_means(status: int, outcome: Outcome, cause: Cause) -> None:
    result = await send_planned(Planned(status), Planned(status), Planned(status))
    assert (result.outcome, result.cause, result.status_code) == (outcome, cause, status)
    assert result.of_channel == (status in (401, 403, 429))


async def test_a_sender_that_is_not_verified_is_not_a_fault_of_the_channel() -> None:
    body = b'{"errors":[{"message":"not a verified Sender Identity","field":"from","help":null}]}'
    result = await send_planned(Planned(403, body=body))
    assert (result.outcome, result.cause) == (Outcome.REJECTED, Cause.SENDER)
    assert result.text == "from: not a verified Sender Identity"
    assert not result.of_channel


async def test_a_403_about_something_in_the_request_is_not_a_fault_of_the_channel() -> None:
    body = b'{"errors":[{"message":"not allowed","field":"categories","help":null}]}'
    result = await send_planned(Planned(403, body=body))
    assert (result.outcome, result.cause) == (Outcome.DEFERRED, Cause.CREDENTIALS)
    assert not result.of_channel


@pytest.mark.parametrize(
    ("name", "value", "low", "high"),
    [
        ("Retry-After", lambda now: "7", 7, 7),
        ("Retry-After", lambda now: "99999999999", 86400, 86400),
        ("Retry-After", lambda now: format_datetime(now + timedelta(seconds=90)), 60, 90),
        ("X-RateLimit-Reset", lambda now: str(int(now.timestamp()) + 60), 30, 60),
        ("X-RateLimit-Reset", lambda now: "1392815263", 0, 0),
    ],
)
async def test_how_long_to_wait(
    name: str, value: Callable[[datetime], str], low: int, high: int
) -> None:
    result = await send_planned(Planned(429, {name: value(datetime.now(UTC))}))
    assert result.retry_after is not None
    assert low <= result.retry_after.total_seconds() <= high


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "soon"}, {"X-RateLimit-Reset": "nan"}])
async def test_no_word_on_how_long_to_wait(headers: dict[str, str]) -> None:
    assert (await send_planned(Planned(429, headers))).retry_after in (None, timedelta(0))


@pytest.mark.parametrize(
    ("plan", "cause"),
    [(SILENT, Cause.TIMEOUT), (RESET_READ, Cause.CONNECTION), (RESET_UNREAD, Cause.CONNECTION)],
)
async def test_no_answer_to_a_request_is_unknown(plan: str, cause: Cause) -> None:
    result = await send_planned(plan)
    assert (result.outcome, result.cause) == (Outcome.UNKNOWN, cause)


async def test_an_answer_that_is_not_sendgrids_is_shown_cleaned() -> None:
    result = await send_planned(Planned(502, body=b"<h1>\x1b Bad\nGateway</h1>" + b"x" * 5000))
    assert result.text.startswith("<h1> Bad Gateway</h1>")
    assert len(result.text) <= 1024


async def test_an_accepted_mail_stays_accepted_when_the_answer_breaks_off() -> None:
    peer = SendGridLookalike(plan=[Planned(202, {"Content-Length": "900", "X-Message-Id": "m1"})])
    async with peer, provider_for(peer) as provider:
        [result] = await provider.send(call_to(ANN))
    assert (result.outcome, result.provider_message_id) == (Outcome.ACCEPTED, "m1")


# Groups


async def test_after_a_400_the_recipients_go_one_by_one_each_after_a_look() -> None:
    looks = []

    def look() -> bool:
        looks.append(1)
        return len(looks) < 4

    async with SendGridLookalike() as peer, provider_for(peer) as provider:
        results = await provider.send(call_to(ANN, "refused@example.org", BOB, last_look=look))
    assert [(r.outcome, r.cause) for r in results] == [
        (Outcome.ACCEPTED, Cause.UNSPECIFIED),
        (Outcome.REJECTED, Cause.BAD_ADDRESS),
        (Outcome.DEFERRED, Cause.WORKER_LOST),
    ]
    assert peer.requests == 3


async def test_a_400_about_the_content_is_not_tried_one_by_one() -> None:
    body = b'{"errors":[{"message":"bad","field":"content.0.value","help":null}]}'
    peer = SendGridLookalike(plan=[Planned(400, body=body)])
    async with peer, provider_for(peer) as provider:
        results = await provider.send(call_to(ANN, BOB))
    assert [(r.outcome, r.cause) for r in results] == [(Outcome.REJECTED, Cause.CONTENT)] * 2
    assert peer.requests == 1


async def test_what_fails_for_the_whole_channel_ends_the_recipients_one_by_one() -> None:
    plan: list[Planned | Raw | str] = [Planned(400), Planned(202), Planned(429)]
    async with SendGridLookalike(plan=plan) as peer, provider_for(peer) as provider:
        results = await provider.send(call_to(ANN, BOB, CAT))
    assert [(r.outcome, r.of_channel) for r in results] == [
        (Outcome.ACCEPTED, False),
        (Outcome.DEFERRED, True),
        (Outcome.DEFERRED, True),
    ]
    assert peer.requests == 3


# Connections


async def test_a_connection_is_reused() -> None:
    async with SendGridLookalike() as peer, provider_for(peer) as provider:
        for _ in range(5):
            await provider.send(call_to(ANN))
    assert (peer.requests, peer.connections) == (5, 1)


async def test_no_free_connection_in_time_is_deferred() -> None:
    peer = SendGridLookalike(plan=[SILENT])
    async with peer, provider_for(peer, concurrency=1, timeout_s=60.0) as provider:
        first = asyncio.create_task(provider.send(call_to(ANN)))
        while not peer.requests:
            await asyncio.sleep(0)
        provider._attempt_timeout_s = 0.2
        [second] = await provider.send(call_to(BOB))
        first.cancel()
    assert (second.outcome, second.cause) == (Outcome.DEFERRED, Cause.TIMEOUT)
    assert not second.of_channel  # the others are at work, and tell how it is


async def test_a_host_that_does_not_resolve_is_deferred() -> None:
    host = "https://no-such-host.invalid"
    async with SendGridLookalike() as peer, provider_for(peer, base_url=host) as provider:
        [result] = await provider.send(call_to(ANN))
    assert (result.outcome, result.cause) == (Outcome.DEFERRED, Cause.DNS)


async def test_tls_with_a_root_of_our_own(server_tls: ssl.SSLContext, certificate: Path) -> None:
    async with SendGridLookalike(tls=server_tls) as peer:
        base_url = f"https://127.0.0.1:{peer.port}"
        async with provider_for(peer, base_url=base_url, ca_file=str(certificate)) as provider:
            [result] = await provider.send(call_to(ANN))
        assert result.outcome is Outcome.ACCEPTED
        async with provider_for(peer, base_url=base_url) as provider:
            [result] = await provider.send(call_to(ANN))
    assert (result.outcome, result.cause) == (Outcome.DEFERRED, Cause.TLS)


# The probe


async def test_the_probe_asks_for_the_scope() -> None:
    async with SendGridLookalike(scopes=("alerts.read",)) as peer, provider_for(peer) as provider:
        with pytest.raises(ProbeFailed, match=r"mail\.send"):
            await provider.probe()


async def test_the_probe_shows_no_key() -> None:
    async with SendGridLookalike() as peer, provider_for(peer, api_key="SG.wrong") as provider:
        with pytest.raises(ProbeFailed, match="API key is refused") as raised:
            await provider.probe()
    assert "SG.wrong" not in str(raised.value)


# What is refused at the door


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"subject": ""}, "message.subject", Reason.REQUIRED),
        (
            {"headers": (Header("X-A", "1"), Header("Received", "x"))},
            "message.headers[1].name",
            Reason.RESERVED_HEADER,
        ),
        (
            {"headers": (Header("X-A", "1"), Header("x-a", "2"))},
            "message.headers[1].name",
            Reason.RESERVED_HEADER,
        ),
        ({"tags": tuple(map(str, range(11)))}, "message.tags", Reason.TOO_MANY),
        ({"tags": ("a", "b" * 256)}, "message.tags[1]", Reason.TOO_LONG),
        ({"custom_args": {"a": "x" * 9800}}, "message.custom_args", Reason.TOO_LONG),
        (
            {"custom_args": {"mailgrpc_call_id": "x"}},
            'message.custom_args["mailgrpc_call_id"]',
            Reason.OUT_OF_RANGE,
        ),
        (
            {"recipients": (Recipient(ANN), Recipient("ü@example.org", role=Role.CC))},
            "message.cc[0].address",
            Reason.INVALID_ADDRESS,
        ),
        ({"attachments": (Attachment("a", b"x" * 24_000_000),)}, "message", Reason.TOO_LONG),
    ],
)
def test_what_sendgrid_cannot_carry(fields: dict[str, Any], field: str, reason: Reason) -> None:
    [violation] = check_message(message(**fields))
    assert (violation.field, violation.reason) == (field, reason)


def test_the_largest_group_with_the_most_custom_args_passes() -> None:
    args = {f"key{n}": "v" * 250 for n in range(32)}
    mail = message(*(f"user{n}@example.org" for n in range(100)), custom_args=args)
    assert check_message(mail) == []
    body_of(mail)
