"""What may come in: every limit, every reason, every field path."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mailgrpc.core.attachment import content_type_of
from mailgrpc.core.delivery import Role
from mailgrpc.core.header import is_reserved
from mailgrpc.core.message import (
    Attachment,
    DeliveryOptions,
    Header,
    Mailbox,
    MailMessage,
    Recipient,
    RetryWishes,
    Submission,
)
from mailgrpc.core.mime import WRITTEN_HEADERS
from mailgrpc.core.shape import check_admissible, check_text, checked_submission
from mailgrpc.errors import InvalidRequest, Reason, Violation

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)
TINY = timedelta(microseconds=1)
MIB = 1024 * 1024

MESSAGE = MailMessage(
    sender=Mailbox("ops@example.org", "Ops"),
    recipients=(Recipient("ann@example.com"),),
    subject="Your order",
    text="Thank you.\n",
)
SUBMISSION = Submission(MESSAGE)


def found_in(submission: Submission) -> list[tuple[str, Reason]]:
    """The violations of a submission, without their words; none if it is accepted."""
    try:
        checked_submission(submission)
    except InvalidRequest as error:
        violations = error.violations
    else:
        return []
    assert all(v.description and v.description.isprintable() for v in violations)
    return [(v.field, v.reason) for v in violations]


def with_message(**changes: Any) -> Submission:
    return Submission(replace(MESSAGE, **changes))


def with_options(**changes: Any) -> Submission:
    return Submission(MESSAGE, DeliveryOptions(**changes))


def with_retry(**changes: Any) -> Submission:
    return with_options(retry=RetryWishes(**changes))


def to(*addresses: str, role: Role = Role.TO) -> tuple[Recipient, ...]:
    return tuple(Recipient(address, role=role) for address in addresses)


def many(count: int) -> tuple[Recipient, ...]:
    return to(*(f"r{n}@example.com" for n in range(count)))


def args(*sizes: int, per_pair: int = 250) -> dict[str, str]:
    """32 pairs or fewer; keys are `per_pair` octets long, values as given."""
    return {f"{n:0{per_pair}}": "v" * size for n, size in enumerate(sizes)}


def pdf(**changes: Any) -> Attachment:
    return replace(Attachment("a.pdf", b"%PDF"), **changes)


ACCEPTED: dict[str, Submission] = {
    "the least": SUBMISSION,
    "html alone": with_message(text="", html="<p>Hi</p>"),
    "100 recipients": with_message(recipients=many(100)),
    "a subject of 998": with_message(subject="ü" * 998),
    "a subject with a no-break space": with_message(subject="10\u00a0km"),
    "a subject of the right to left": with_message(subject="\u202bשלום\u202c"),
    "2 MiB of text": with_message(text="x" * (2 * MIB)),
    "2 MiB of text in fewer characters": with_message(text="é" * MIB),
    "text with all but U+0000": with_message(text="\t\r\n\x01\x1b\x7f\u2028"),
    "names of 256": with_message(sender=Mailbox("ops@example.org", "n" * 256)),
    "10 reply_to": with_message(reply_to=(Mailbox("a@example.org"),) * 10),
    "50 headers": with_message(headers=(Header("X-A", "1"),) * 50),
    "a header at its limits": with_message(headers=(Header("X" * 76, "v" * 998),)),
    "an empty header": with_message(headers=(Header("X-A", ""),)),
    "threading": with_message(
        headers=(
            Header("In-Reply-To", "<1@x.org>"),
            Header("References", "<1@x.org>"),
            Header("List-Unsubscribe", "<https://example.org/u>"),
            Header("Auto-Submitted", "auto-generated"),
            Header("Precedence", "bulk"),
            Header("Archived-At", "<https://example.org/a>"),
        )
    ),
    "50 attachments": with_message(attachments=(pdf(),) * 50),
    "a filename of 255": with_message(attachments=(pdf(filename="ü" * 255),)),
    "a content type": with_message(attachments=(pdf(content_type="image/svg+xml"),)),
    "an inline file": with_message(attachments=(pdf(content_id="logo@example.org"),)),
    "10 tags of 64": with_message(tags=("t" * 64,) * 10),
    "10 categories": with_message(categories=("receipts",) * 10),
    "all flags": with_message(flags=2**31 - 2),
    "32 arguments": with_message(custom_args=args(*[0] * 32, per_pair=256)),
    "8 KiB of arguments": with_message(custom_args=args(*[6] * 32)),
    "an argument without a value": with_message(custom_args={"k": ""}),
    "a correlation_id of 256": with_message(correlation_id="c" * 256),
    "a request_id of 255": replace(SUBMISSION, request_id="r" * 255),
    "every mode": with_options(mode=2),
    "every priority": with_options(priority=40),
    "a channel of 63": with_options(channel="c" * 63),
    "a schedule": with_options(send_at=NOW, expire_at=NOW + TINY),
    "100 attempts": with_retry(max_attempts=100),
    "the shortest waits": with_retry(initial_backoff=SECOND, max_backoff=SECOND, multiplier=1.0),
    "the longest waits": with_retry(initial_backoff=DAY, max_backoff=DAY, multiplier=10.0),
    "a longest wait below the default first": with_retry(max_backoff=SECOND),
    "the shortest window": with_options(dedupe_window=SECOND),
    "the longest window": with_options(dedupe_window=DAY),
}


@pytest.mark.parametrize("submission", ACCEPTED.values(), ids=ACCEPTED)
def test_what_keeps_to_the_limits_is_accepted(submission: Submission) -> None:
    assert found_in(submission) == []


R = Reason
REFUSED: dict[str, tuple[Submission, str, Reason]] = {
    # request and recipients
    "request_id of 256": (replace(SUBMISSION, request_id="r" * 256), "request_id", R.TOO_LONG),
    "no sender": (with_message(sender=None), "message.sender", R.REQUIRED),
    "sender without an address": (
        with_message(sender=Mailbox("")),
        "message.sender.address",
        R.REQUIRED,
    ),
    "sender below test": (
        with_message(sender=Mailbox("a@unit.test")),
        "message.sender.address",
        R.TEST_ADDRESS,
    ),
    "sender's name of 257": (
        with_message(sender=Mailbox("ops@example.org", "n" * 257)),
        "message.sender.name",
        R.TOO_LONG,
    ),
    "no recipient": (with_message(recipients=()), "message.to", R.REQUIRED),
    "101 recipients": (with_message(recipients=many(101)), "message.to", R.TOO_MANY),
    "recipient's address": (
        with_message(recipients=to("a@example.com", "b@example.com", "c")),
        "message.to[2].address",
        R.INVALID_ADDRESS,
    ),
    "recipient's name": (
        with_message(
            recipients=(
                *to("a@example.com"),
                Recipient("b@example.com", "n" * 257, Role.CC),
            )
        ),
        "message.cc[0].name",
        R.TOO_LONG,
    ),
    "recipient's address of 321 bytes": (
        with_message(recipients=to("a@" + "b" * 319)),
        "message.to[0].address",
        R.TOO_LONG,
    ),
    "the same recipient twice": (
        with_message(recipients=to("ann@example.com", "b@example.com", "Ann@EXAMPLE.com")),
        "message.to[2].address",
        R.DUPLICATE_RECIPIENT,
    ),
    "the same recipient in two lists": (
        with_message(
            recipients=(
                *to("x@bücher.example"),
                *to("b@example.com", "x@xn--bcher-kva.example", role=Role.BCC),
            )
        ),
        "message.bcc[1].address",
        R.DUPLICATE_RECIPIENT,
    ),
    "reply_to": (
        with_message(reply_to=(Mailbox("a@example.org"), Mailbox("a@test"))),
        "message.reply_to[1].address",
        R.TEST_ADDRESS,
    ),
    "11 reply_to": (
        with_message(reply_to=(Mailbox("a@example.org"),) * 11),
        "message.reply_to",
        R.TOO_MANY,
    ),
    # subject and bodies
    "no subject": (with_message(subject=""), "message.subject", R.REQUIRED),
    "subject of 999": (with_message(subject="s" * 999), "message.subject", R.TOO_LONG),
    "neither text nor html": (with_message(text=""), "message.text", R.REQUIRED),
    "text past 2 MiB": (with_message(text="x" * (2 * MIB + 1)), "message.text", R.TOO_LONG),
    "html past 2 MiB in octets": (
        with_message(html="é" * (MIB + 1)),
        "message.html",
        R.TOO_LONG,
    ),
    "U+0000 in text": (with_message(text="a\0"), "message.text", R.CONTROL_CHARACTER),
    "U+0000 in html": (with_message(html="\0"), "message.html", R.CONTROL_CHARACTER),
    # headers
    "51 headers": (with_message(headers=(Header("X-A", "1"),) * 51), "message.headers", R.TOO_MANY),
    "header without a name": (
        with_message(headers=(Header("", "1"),)),
        "message.headers[0].name",
        R.REQUIRED,
    ),
    "header name of 77": (
        with_message(headers=(Header("X" * 77, "1"),)),
        "message.headers[0].name",
        R.TOO_LONG,
    ),
    "header name with a colon": (
        with_message(headers=(Header("X-A:", "1"),)),
        "message.headers[0].name",
        R.OUT_OF_RANGE,
    ),
    "header name with a blank": (
        with_message(headers=(Header("Bcc ", "eve@example.com"),)),
        "message.headers[0].name",
        R.OUT_OF_RANGE,
    ),
    "header name beyond ASCII": (
        with_message(headers=(Header("X-Ä", "1"),)),
        "message.headers[0].name",
        R.OUT_OF_RANGE,
    ),
    "header value of 999": (
        with_message(headers=(*[Header("X-A", "1")] * 3, Header("X-A", "v" * 999))),
        "message.headers[3].value",
        R.TOO_LONG,
    ),
    # attachments
    "51 attachments": (
        with_message(attachments=(pdf(),) * 51),
        "message.attachments",
        R.TOO_MANY,
    ),
    "file without a name": (
        with_message(attachments=(pdf(filename=""),)),
        "message.attachments[0].filename",
        R.REQUIRED,
    ),
    "filename of 256": (
        with_message(attachments=(pdf(), pdf(filename="f" * 256))),
        "message.attachments[1].filename",
        R.TOO_LONG,
    ),
    "filename with a directory": (
        with_message(attachments=(pdf(filename="../a.pdf"),)),
        "message.attachments[0].filename",
        R.OUT_OF_RANGE,
    ),
    "content_id with brackets": (
        with_message(attachments=(pdf(content_id="<a>"),)),
        "message.attachments[0].content_id",
        R.OUT_OF_RANGE,
    ),
    "content_id with a blank": (
        with_message(attachments=(pdf(content_id="a b"),)),
        "message.attachments[0].content_id",
        R.OUT_OF_RANGE,
    ),
    "content_id of 256": (
        with_message(attachments=(pdf(content_id="c" * 256),)),
        "message.attachments[0].content_id",
        R.TOO_LONG,
    ),
    "the same content_id twice": (
        with_message(attachments=(pdf(content_id="a"), pdf(content_id="b"), pdf(content_id="a"))),
        "message.attachments[2].content_id",
        R.OUT_OF_RANGE,
    ),
    # labels
    "11 tags": (with_message(tags=("t",) * 11), "message.tags", R.TOO_MANY),
    "empty tag": (with_message(tags=("",)), "message.tags[0]", R.REQUIRED),
    "tag of 65": (with_message(tags=("a", "t" * 65)), "message.tags[1]", R.TOO_LONG),
    "11 categories": (with_message(categories=("c",) * 11), "message.categories", R.TOO_MANY),
    "empty category": (with_message(categories=("",)), "message.categories[0]", R.REQUIRED),
    "negative flags": (with_message(flags=-2), "message.flags", R.OUT_OF_RANGE),
    "bit 0": (with_message(flags=3), "message.flags", R.RESERVED_FLAG),
    "33 arguments": (
        with_message(custom_args=args(*[0] * 33, per_pair=2)),
        "message.custom_args",
        R.TOO_MANY,
    ),
    "empty argument key": (
        with_message(custom_args={"": "v"}),
        'message.custom_args[""]',
        R.REQUIRED,
    ),
    "argument key of 257": (
        with_message(custom_args={"k" * 257: "v"}),
        f'message.custom_args["{"k" * 64}…"]',
        R.TOO_LONG,
    ),
    "argument value of 257": (
        with_message(custom_args={'a"b': "v" * 257}),
        'message.custom_args["a\\"b"]',
        R.TOO_LONG,
    ),
    "arguments past 8 KiB": (
        with_message(custom_args=args(*[6] * 31, 7)),
        "message.custom_args",
        R.TOO_LONG,
    ),
    "arguments past 8 KiB in octets": (
        with_message(custom_args={f"{n:010}": "é" * 200 for n in range(20)}),
        "message.custom_args",
        R.TOO_LONG,
    ),
    "correlation_id of 257": (
        with_message(correlation_id="c" * 257),
        "message.correlation_id",
        R.TOO_LONG,
    ),
    # options
    "mode 3": (with_options(mode=3), "options.mode", R.OUT_OF_RANGE),
    "priority 15": (with_options(priority=15), "options.priority", R.OUT_OF_RANGE),
    "channel of 64": (with_options(channel="c" * 64), "options.channel", R.TOO_LONG),
    "expiry at send_at": (
        with_options(send_at=NOW, expire_at=NOW),
        "options.expire_at",
        R.INVALID_SCHEDULE,
    ),
    "101 attempts": (with_retry(max_attempts=101), "options.retry.max_attempts", R.OUT_OF_RANGE),
    "-1 attempts": (with_retry(max_attempts=-1), "options.retry.max_attempts", R.OUT_OF_RANGE),
    "first wait too short": (
        with_retry(initial_backoff=SECOND - TINY),
        "options.retry.initial_backoff",
        R.OUT_OF_RANGE,
    ),
    "first wait too long": (
        with_retry(initial_backoff=DAY + TINY),
        "options.retry.initial_backoff",
        R.OUT_OF_RANGE,
    ),
    "longest wait too short": (
        with_retry(max_backoff=timedelta(0)),
        "options.retry.max_backoff",
        R.OUT_OF_RANGE,
    ),
    "longest wait too long": (
        with_retry(max_backoff=DAY + TINY),
        "options.retry.max_backoff",
        R.OUT_OF_RANGE,
    ),
    "longest wait below the first": (
        with_retry(initial_backoff=2 * SECOND, max_backoff=SECOND),
        "options.retry.max_backoff",
        R.OUT_OF_RANGE,
    ),
    **{
        f"multiplier {number}": (
            with_retry(multiplier=number),
            "options.retry.multiplier",
            R.OUT_OF_RANGE,
        )
        for number in (-1.0, 0.99, 10.01, float("nan"), float("inf"), float("-inf"))
    },
    "window too short": (
        with_options(dedupe_window=SECOND - TINY),
        "options.dedupe_window",
        R.OUT_OF_RANGE,
    ),
    "window too long": (
        with_options(dedupe_window=DAY + TINY),
        "options.dedupe_window",
        R.OUT_OF_RANGE,
    ),
}


@pytest.mark.parametrize(("submission", "field", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_is_refused_by_field_and_reason(
    submission: Submission, field: str, reason: Reason
) -> None:
    assert found_in(submission) == [(field, reason)]


def texts_of_one_line(text: str) -> Iterable[tuple[str, Submission]]:
    """A submission for every text that ends up in a header, a log or an event."""
    yield "request_id", replace(SUBMISSION, request_id=text)
    yield "message.sender.address", with_message(sender=Mailbox(f"{text}@example.org"))
    yield "message.sender.name", with_message(sender=Mailbox("a@example.org", text))
    yield "message.to[0].address", with_message(recipients=to(f"a@{text}.com"))
    yield "message.to[0].name", with_message(recipients=(Recipient("a@example.org", text),))
    yield "message.reply_to[0].name", with_message(reply_to=(Mailbox("a@example.org", text),))
    yield "message.subject", with_message(subject=text)
    yield "message.headers[0].name", with_message(headers=(Header(text, "v"),))
    yield "message.headers[0].value", with_message(headers=(Header("X-A", text),))
    yield "message.attachments[0].filename", with_message(attachments=(pdf(filename=text),))
    yield (
        "message.attachments[0].content_type",
        with_message(attachments=(pdf(content_type=text),)),
    )
    yield "message.attachments[0].content_id", with_message(attachments=(pdf(content_id=text),))
    yield "message.tags[0]", with_message(tags=(text,))
    yield "message.categories[0]", with_message(categories=(text,))
    yield 'message.custom_args["k"]', with_message(custom_args={"k": text})
    yield "message.correlation_id", with_message(correlation_id=text)
    yield "options.channel", with_options(channel=text)


@pytest.mark.parametrize(
    "character",
    ["\0", "\t", "\n", "\r", "\x1f", "\x7f", "\x80", "\x85", "\x9f", "\u2028", "\u2029"],
)
def test_control_characters_are_refused_wherever_a_text_has_one_line(character: str) -> None:
    for field, submission in texts_of_one_line(f"a{character}Bcc: eve@example.com"):
        assert found_in(submission) == [(field, Reason.CONTROL_CHARACTER)]
    (key, reason), *more = found_in(with_message(custom_args={f"a{character}": "v"}))
    assert (reason, more) == (Reason.CONTROL_CHARACTER, [])
    assert key.startswith('message.custom_args["a\\')
    assert key.isprintable()


@pytest.mark.parametrize("character", ["\u202a", "\u202e", "\u2066", "\u2069"])
def test_a_name_or_filename_cannot_turn_the_direction_of_writing(character: str) -> None:
    refused = {
        field
        for field, submission in texts_of_one_line(f"annexe{character}fdp.exe")
        if (field, Reason.CONTROL_CHARACTER) in found_in(submission)
    }
    assert refused == {
        "message.sender.address",
        "message.sender.name",
        "message.to[0].address",
        "message.to[0].name",
        "message.reply_to[0].name",
        "message.attachments[0].filename",
    }


@pytest.mark.parametrize(
    "name",
    [
        "From",
        "Sender",
        "To",
        "Cc",
        "Bcc",
        "Reply-To",
        "Subject",
        "Date",
        "Message-ID",
        "MIME-Version",
        "Content-Type",
        "content-transfer-encoding",
        "CONTENT-ID",
        "Return-Path",
        "Received",
        "Resent-From",
        "Delivered-To",
        "DKIM-Signature",
        "ARC-Seal",
        "Authentication-Results",
        "X-Mailgrpc-Id",
    ],
)
def test_headers_that_are_not_the_callers_are_reserved_in_any_case(name: str) -> None:
    for written in (name, name.lower(), name.upper()):
        submission = with_message(headers=(Header(written, "1"),))
        assert found_in(submission) == [("message.headers[0].name", Reason.RESERVED_HEADER)]


def test_every_header_that_the_gateway_writes_is_reserved() -> None:
    assert all(is_reserved(name) for name in WRITTEN_HEADERS)


@pytest.mark.parametrize(
    "content_type",
    ["pdf", "application/", "/pdf", "a/b/c", "text/plain; charset=utf-8", "a b/c", "ä/b"],
)
def test_a_content_type_is_type_and_subtype_alone(content_type: str) -> None:
    submission = with_message(attachments=(pdf(content_type=content_type),))
    assert found_in(submission) == [("message.attachments[0].content_type", Reason.OUT_OF_RANGE)]


@pytest.mark.parametrize("content_type", ["multipart/mixed", "Message/Partial"])
def test_a_part_of_a_mail_is_not_a_file(content_type: str) -> None:
    submission = with_message(attachments=(pdf(content_type=content_type),))
    assert found_in(submission) == [("message.attachments[0].content_type", Reason.OUT_OF_RANGE)]


@pytest.mark.parametrize(
    ("filename", "content_type"),
    [
        ("a.pdf", "application/pdf"),
        ("A.PDF", "application/pdf"),
        ("report.csv.gz", "application/gzip"),
        ("a.docx", "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
        ("pdf", "application/octet-stream"),
        ("a.", "application/octet-stream"),
        ("a.unheard", "application/octet-stream"),
    ],
)
def test_a_content_type_is_guessed_from_the_filename(filename: str, content_type: str) -> None:
    assert content_type_of(filename) == content_type


def test_what_is_accepted_is_normalised_and_nothing_else_changes() -> None:
    raw = Submission(
        replace(
            MESSAGE,
            sender=Mailbox("Ops@EXAMPLE.org", "Ops"),
            recipients=(
                Recipient("Ann@Bücher.example", "Ann"),
                *to("bob@example.com", role=Role.CC),
            ),
            reply_to=(Mailbox("Desk@EXAMPLE.org"),),
            headers=(Header("X-A", "1"),),
            attachments=(pdf(), pdf(content_type="image/png")),
            tags=("t",),
            categories=("receipts",),
            flags=6,
            custom_args={"k": "v"},
            correlation_id="c",
        ),
        DeliveryOptions(mode=2),
        "id-1",
        validate_only=True,
    )
    expected = replace(
        raw,
        message=replace(
            raw.message,
            sender=Mailbox("Ops@example.org", "Ops"),
            recipients=(
                Recipient("Ann@xn--bcher-kva.example", "Ann", Role.TO, "ann@xn--bcher-kva.example"),
                Recipient("bob@example.com", "", Role.CC, "bob@example.com"),
            ),
            reply_to=(Mailbox("Desk@example.org"),),
            attachments=(
                pdf(content_type="application/pdf"),
                pdf(content_type="image/png"),
            ),
        ),
    )
    checked = checked_submission(raw)
    assert checked == expected
    assert checked_submission(checked) == checked


def test_all_that_is_wrong_is_told_at_once_in_the_order_of_the_fields() -> None:
    message = MailMessage(
        None, to("a@test", "b"), "", headers=(Header("From", "x\n"),), tags=("",), flags=1
    )
    submission = Submission(message, DeliveryOptions(mode=9), request_id="\n")
    assert found_in(submission) == [
        ("request_id", Reason.CONTROL_CHARACTER),
        ("message.sender", Reason.REQUIRED),
        ("message.to[0].address", Reason.TEST_ADDRESS),
        ("message.to[1].address", Reason.INVALID_ADDRESS),
        ("message.subject", Reason.REQUIRED),
        ("message.text", Reason.REQUIRED),
        ("message.headers[0].name", Reason.RESERVED_HEADER),
        ("message.headers[0].value", Reason.CONTROL_CHARACTER),
        ("message.tags[0]", Reason.REQUIRED),
        ("message.flags", Reason.RESERVED_FLAG),
        ("options.mode", Reason.OUT_OF_RANGE),
    ]


def test_however_much_is_wrong_the_answer_stays_small() -> None:
    count, bad = 100_000, "\n" * 2000
    message = MailMessage(
        Mailbox(bad, bad),
        (Recipient(bad, bad),) * count,
        bad,
        reply_to=(Mailbox(bad, bad),) * count,
        headers=(Header(bad, bad),) * count,
        attachments=(Attachment(bad, b"", bad, bad),) * count,
        tags=(bad,) * count,
        categories=(bad,) * count,
        custom_args={f"{bad}{n}": bad for n in range(count)},
    )
    found = found_in(Submission(message))
    assert len(found) < 1200
    assert max(len(field) for field, _ in found) < 500


def test_a_text_of_another_request_is_checked_by_the_same_rules() -> None:
    assert check_text("tag", "fine", 4) == []
    assert check_text("tag", "", 4) == []
    assert [v.reason for v in check_text("tag", "", 4, required=True)] == [Reason.REQUIRED]
    assert check_text("tag", "a\nbcd", 4) == [
        Violation("tag", Reason.TOO_LONG, "at most 4 characters"),
        Violation("tag", Reason.CONTROL_CHARACTER, "control character U+000A at position 1"),
    ]


# What time and settings have to say


def admissible(submission: Submission, channels: Iterable[str] = ("default",)) -> list[Any]:
    found = check_admissible(
        submission, now=NOW, bit_of={"receipts": 1}, channels=frozenset(channels)
    )
    return [(v.field, v.reason) for v in found]


@pytest.mark.parametrize(
    "submission",
    [
        SUBMISSION,
        with_message(categories=("receipts",)),
        with_options(send_at=NOW - 900 * DAY),
        with_options(send_at=NOW + 30 * DAY, expire_at=NOW + 60 * DAY),
        with_options(expire_at=NOW + TINY),
        with_options(channel="default"),
    ],
)
def test_what_time_and_settings_allow(submission: Submission) -> None:
    assert admissible(submission) == []


@pytest.mark.parametrize(
    ("submission", "field", "reason"),
    [
        (
            with_message(categories=("receipts", "promos")),
            "message.categories[1]",
            R.UNKNOWN_CATEGORY,
        ),
        (with_options(channel="bulk"), "options.channel", R.UNKNOWN_CHANNEL),
        (
            with_options(send_at=NOW + 30 * DAY + TINY),
            "options.send_at",
            R.INVALID_SCHEDULE,
        ),
        (with_options(expire_at=NOW), "options.expire_at", R.INVALID_SCHEDULE),
        (
            with_options(expire_at=NOW + 60 * DAY + TINY),
            "options.expire_at",
            R.INVALID_SCHEDULE,
        ),
    ],
)
def test_what_time_and_settings_refuse(submission: Submission, field: str, reason: Reason) -> None:
    assert found_in(submission) == []
    assert admissible(submission) == [(field, reason)]


def test_a_missing_default_channel_is_named() -> None:
    (violation,) = check_admissible(SUBMISSION, now=NOW, bit_of={}, channels=["bulk"])
    assert violation.reason is Reason.UNKNOWN_CHANNEL
    assert "'default'" in violation.description
