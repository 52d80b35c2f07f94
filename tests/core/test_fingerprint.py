"""Which requests are the same."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mailgrpc.core import fingerprint as module
from mailgrpc.core.delivery import Role
from mailgrpc.core.fingerprint import RULE, _encode, content_key, fingerprint
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
from mailgrpc.core.shape import checked_submission

MESSAGE = MailMessage(
    sender=Mailbox("ops@example.org", "Ops"),
    recipients=(
        Recipient("Ann@example.com", "Ann \U0001f98a"),
        Recipient("bob@example.com", role=Role.CC),
        Recipient("eve@example.com", role=Role.BCC),
    ),
    subject='Grüße "\\"',
    text="tab\t, DEL \x7f, bell \x07, break\r\n",
    html="<p>Hi</p>",
    reply_to=(Mailbox("desk@example.org"),),
    headers=(Header("In-Reply-To", "<1@example.org>"), Header("X-Empty", "")),
    attachments=(
        Attachment("a.PDF", b"%PDF"),
        Attachment("logo", b"", "image/png", "logo"),
    ),
    tags=("b", "a"),
    categories=("receipts",),
    flags=6,
    custom_args={"\U0001f98a": "1", "\uffff": "2", "a": ""},
    correlation_id="order-7",
)
OPTIONS = DeliveryOptions(
    mode=1,
    priority=40,
    retry=RetryWishes(5, timedelta(seconds=1.5), timedelta(hours=24), 2.5),
    send_at=datetime(2031, 5, 6, 7, 8, 9, 10, UTC),
    expire_at=datetime(2031, 5, 7, tzinfo=UTC),
    channel="bulk",
    dedupe_window=timedelta(minutes=1),
)
SUBMISSION = checked_submission(Submission(MESSAGE, OPTIONS, "id-1"))

# By hand, from the rule; a fingerprint that is stored must still be found by every later version.
CANONICAL = (
    '{"message":{"attachments":[{"content_type":"application/pdf",'
    '"data_sha256":"315d429b7714cedb6ad04ac31240145257692630457f3c88253c5beceac76027",'
    '"filename":"a.PDF"},{"content_id":"logo","content_type":"image/png",'
    '"data_sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",'
    '"filename":"logo"}],"bcc":[{"address":"eve@example.com"}],"categories":["receipts"],'
    '"cc":[{"address":"bob@example.com"}],"correlation_id":"order-7",'
    '"custom_args":{"a":"","\uffff":"2","\U0001f98a":"1"},"flags":6,'
    '"headers":[{"name":"In-Reply-To","value":"<1@example.org>"},{"name":"X-Empty"}],'
    '"html":"<p>Hi</p>","reply_to":[{"address":"desk@example.org"}],'
    '"sender":{"address":"ops@example.org","name":"Ops"},"subject":"Grüße \\"\\\\\\"",'
    '"tags":["b","a"],"text":"tab\\t, DEL \x7f, bell \\u0007, break\\r\\n",'
    '"to":[{"address":"Ann@example.com","name":"Ann \U0001f98a"}]},'
    '"options":{"channel":"bulk","dedupe_window":60000000,"expire_at":1935878400000000,'
    '"mode":1,"priority":40,"retry":{"initial_backoff":1500000,"max_attempts":5,'
    '"max_backoff":86400000000,"multiplier":"4004000000000000"},"send_at":1935817689000010}}'
)


def test_the_canonical_form_is_the_documented_one() -> None:
    assert fingerprint(SUBMISSION) == hashlib.sha256(CANONICAL.encode()).digest()


def test_a_stored_fingerprint_of_rule_1_is_found_for_ever() -> None:
    golden = "7b4575483235a8b8e8040615bc7d4b974b208422a24c0af051057024ba5325ad"
    assert fingerprint(SUBMISSION, 1).hex() == golden


def test_the_example_in_the_documentation_is_true() -> None:
    submission = Submission(
        MailMessage(
            Mailbox("ops@example.org", "Ops"),
            (Recipient("ann@EXAMPLE.com"),),
            "Grüße",
            "Hi\n",
        ),
        DeliveryOptions(mode=2),
        request_id="not part of it",
        validate_only=True,
    )
    documented = inspect.getdoc(module) or ""
    text = "".join(line.strip() for line in documented.splitlines())
    example = text[text.index('{"message"') : text.index("on one line")]
    assert fingerprint(checked_submission(submission)) == hashlib.sha256(example.encode()).digest()
    assert hashlib.sha256(example.encode()).hexdigest() in documented


def test_the_same_request_has_the_same_fingerprint() -> None:
    again = replace(
        SUBMISSION,
        message=replace(
            SUBMISSION.message, custom_args=dict(reversed(list(MESSAGE.custom_args.items())))
        ),
        request_id="id-2",
        validate_only=True,
    )
    assert fingerprint(again) == fingerprint(SUBMISSION)


OTHER_MESSAGES: dict[str, Any] = {
    "sender": Mailbox("ops@example.org"),
    "recipients": MESSAGE.recipients[::-1],
    "subject": "Grüsse",
    "text": "",
    "html": "",
    "reply_to": (),
    "headers": MESSAGE.headers[:1],
    "attachments": (*MESSAGE.attachments[:1], Attachment("logo", b"1", "image/png", "logo")),
    "tags": ("a", "b"),
    "categories": (),
    "flags": 2,
    "custom_args": {},
    "correlation_id": "",
}


@pytest.mark.parametrize("name", [f.name for f in fields(MailMessage)])
def test_every_field_of_the_message_counts(name: str) -> None:
    message = replace(MESSAGE, **{name: OTHER_MESSAGES[name]})
    if name == "recipients":
        message = replace(message, recipients=(replace(MESSAGE.recipients[0], role=Role.BCC),))
    other = checked_submission(replace(SUBMISSION, message=message))
    assert fingerprint(other) != fingerprint(SUBMISSION)


OTHER_OPTIONS: dict[str, Any] = {
    "mode": 0,
    "priority": 0,
    "retry": None,
    "send_at": None,
    "expire_at": datetime(2031, 5, 7, 0, 0, 0, 1, UTC),
    "channel": "",
    "dedupe_window": None,
}


@pytest.mark.parametrize("name", [f.name for f in fields(DeliveryOptions)])
def test_every_option_counts(name: str) -> None:
    other = replace(SUBMISSION, options=replace(OPTIONS, **{name: OTHER_OPTIONS[name]}))
    assert fingerprint(other) != fingerprint(SUBMISSION)


@pytest.mark.parametrize(
    "spelled_out",
    [
        DeliveryOptions(mode=1),
        DeliveryOptions(priority=20),
        DeliveryOptions(channel="default"),
        DeliveryOptions(retry=RetryWishes()),
        DeliveryOptions(retry=RetryWishes(max_attempts=12)),
    ],
)
def test_absent_is_not_the_default(spelled_out: DeliveryOptions) -> None:
    absent = replace(SUBMISSION, options=DeliveryOptions())
    assert fingerprint(absent) != fingerprint(replace(SUBMISSION, options=spelled_out))


def test_the_canonical_form_is_json() -> None:
    assert json.loads(CANONICAL)["message"]["custom_args"] == dict(MESSAGE.custom_args)


def test_every_character_is_written_as_the_rule_says() -> None:
    by_the_rule = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode
    plane = 0x1000
    for first in range(0, 0x110000, plane):
        characters = [chr(c) for c in range(first, first + plane) if not 0xD800 <= c < 0xE000]
        form = {"all": "".join(characters), **{c + "k": c for c in characters[::97]}}
        assert _encode(form) == by_the_rule(form).encode()


def test_an_unknown_rule_is_an_error_and_never_a_mismatch() -> None:
    with pytest.raises(ValueError, match="rule 99"):
        fingerprint(SUBMISSION, rule=99)
    assert RULE == 1


@pytest.mark.parametrize("name", [f.name for f in fields(MailMessage)])
def test_the_content_key_is_of_what_a_recipient_sees(name: str) -> None:
    other = replace(SUBMISSION.message, **{name: OTHER_MESSAGES[name]})
    not_content = {"recipients", "tags", "categories", "flags", "custom_args", "correlation_id"}
    same = content_key(other) == content_key(SUBMISSION.message)
    assert same is (name in not_content)
    assert len(content_key(other)) == 32
