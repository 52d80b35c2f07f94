"""The shape of a request: every check that needs nothing but the request itself.

This is the door. Behind it everything relies on what is promised here: addresses are normalised,
nothing that ends up in a header holds a line break, and every length has a bound. The limits are
those of the contract. All that is wrong is told at once, each with its field. A list that is too
long is only looked at up to its limit, which bounds the violations to about a thousand.

What other nouns know is checked by them: `address`, `header`, `attachment`, `options`, `text`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import TypeVar

from mailgrpc.core.address import AddressError, checked_address, parse_address
from mailgrpc.core.admission import MAX_FLAGS, RESERVED_BIT
from mailgrpc.core.attachment import MAX_ATTACHMENTS, check_attachments, content_type_of
from mailgrpc.core.delivery import Role
from mailgrpc.core.header import MAX_HEADERS, check_header
from mailgrpc.core.message import (
    MAX_RECIPIENTS,
    Attachment,
    DeliveryOptions,
    Header,
    Mailbox,
    MailMessage,
    Recipient,
    Submission,
)
from mailgrpc.core.options import check_admissible, check_options
from mailgrpc.core.text import SPOOFING, check_body, check_text, fits, utf8_len
from mailgrpc.errors import InvalidRequest, Reason, Violation

__all__ = ["check_admissible", "check_text", "checked_address", "checked_submission"]

MAX_REQUEST_ID = 255
MAX_NAME = 256
MAX_REPLY_TO = 10
MAX_SUBJECT = 998
MAX_BODY_BYTES = 2 * 1024 * 1024
MAX_TAGS = 10
MAX_CATEGORIES = 10
MAX_LABEL = 64
MAX_ARGS = 32
MAX_ARG = 256
MAX_ARGS_BYTES = 8 * 1024
MAX_CORRELATION_ID = 256

_NO_OPTIONS = DeliveryOptions()
_LIST_OF = {Role.TO: "to", Role.CC: "cc", Role.BCC: "bcc"}
_SHOWN_KEY = 64
_T = TypeVar("_T")


def checked_submission(raw: Submission) -> Submission:
    """The same request with addresses normalised, recipients' keys and content types filled in.

    Raises InvalidRequest with all violations, in the order of the contract's fields.
    """
    found: list[Violation] = []
    if not fits(raw.request_id, MAX_REQUEST_ID):
        found += check_text("request_id", raw.request_id, MAX_REQUEST_ID)
    message = _checked_message(raw.message, found)
    if raw.options is not _NO_OPTIONS:
        found += check_options(raw.options)
    if found:
        raise InvalidRequest(*found)
    return Submission(message, raw.options, raw.request_id, raw.validate_only)


def _checked_message(raw: MailMessage, found: list[Violation]) -> MailMessage:
    """The message as it is accepted; what is wrong with it goes to `found`, field by field."""
    sender = raw.sender
    if sender is None:
        found.append(Violation("message.sender", Reason.REQUIRED, "a sender is needed"))
    else:
        sender = _checked_mailbox("message.sender", sender, found)
    recipients = _checked_recipients(raw.recipients, found)
    reply_to = _checked_reply_to(raw.reply_to, found) if raw.reply_to else ()
    if not raw.subject or not fits(raw.subject, MAX_SUBJECT):
        found += check_text("message.subject", raw.subject, MAX_SUBJECT, required=True)
    _check_bodies(raw, found)
    if raw.headers:
        _check_headers(raw.headers, found)
    attachments = _checked_attachments(raw.attachments, found) if raw.attachments else ()
    if raw.tags:
        _check_labels("message.tags", raw.tags, MAX_TAGS, found)
    if raw.categories:
        _check_labels("message.categories", raw.categories, MAX_CATEGORIES, found)
    if raw.flags:
        _check_flags(raw.flags, found)
    if raw.custom_args:
        _check_args(raw.custom_args, found)
    if not fits(raw.correlation_id, MAX_CORRELATION_ID):
        found += check_text("message.correlation_id", raw.correlation_id, MAX_CORRELATION_ID)
    # By its constructor: dataclasses.replace takes twice the time, on the path of every message.
    return MailMessage(
        sender,
        recipients,
        raw.subject,
        raw.text,
        raw.html,
        reply_to,
        raw.headers,
        attachments,
        raw.tags,
        raw.categories,
        raw.flags,
        raw.custom_args,
        raw.correlation_id,
    )


_known_address = lru_cache(maxsize=256)(parse_address)
"""For senders, of which there are few."""


def _checked_mailbox(field: str, raw: Mailbox, found: list[Violation]) -> Mailbox:
    try:
        address = _known_address(raw.address).address
    except AddressError as error:
        found.append(Violation(f"{field}.address", error.reason, error.description))
        address = raw.address
    if not fits(raw.name, MAX_NAME):
        found += check_text(f"{field}.name", raw.name, MAX_NAME, forbidden=SPOOFING)
    return raw if address == raw.address else Mailbox(address, raw.name)


def _checked_reply_to(raw: Sequence[Mailbox], found: list[Violation]) -> tuple[Mailbox, ...]:
    first = _within("message.reply_to", raw, MAX_REPLY_TO, found)
    return tuple(
        _checked_mailbox(f"message.reply_to[{n}]", mailbox, found)
        for n, mailbox in enumerate(first)
    )


def _checked_recipients(raw: Sequence[Recipient], found: list[Violation]) -> tuple[Recipient, ...]:
    if not raw:
        found.append(Violation("message.to", Reason.REQUIRED, "a recipient is needed"))
    checked = []
    number_of: dict[str, int] = {}
    for number, recipient in enumerate(_within("message.to", raw, MAX_RECIPIENTS, found)):
        if not fits(recipient.name, MAX_NAME):
            field = f"{_place(raw, number)}.name"
            found += check_text(field, recipient.name, MAX_NAME, forbidden=SPOOFING)
        try:
            address, key = parse_address(recipient.address)
        except AddressError as error:
            field = f"{_place(raw, number)}.address"
            found.append(Violation(field, error.reason, error.description))
            continue
        if number_of.setdefault(key, number) != number:
            field, text = f"{_place(raw, number)}.address", _place(raw, number_of[key])
            found.append(Violation(field, Reason.DUPLICATE_RECIPIENT, f"the same as {text}"))
        checked.append(Recipient(address, recipient.name, recipient.role, key))
    return tuple(checked)


def _place(recipients: Sequence[Recipient], number: int) -> str:
    """The path of a recipient, as the caller wrote it: counted within its own list."""
    role = recipients[number].role
    index = sum(r.role is role for r in recipients[:number])
    return f"message.{_LIST_OF[role]}[{index}]"


def _check_bodies(message: MailMessage, found: list[Violation]) -> None:
    if not message.text and not message.html:
        found.append(Violation("message.text", Reason.REQUIRED, "text or html is needed"))
    if message.text:
        found += check_body("message.text", message.text, MAX_BODY_BYTES)
    if message.html:
        found += check_body("message.html", message.html, MAX_BODY_BYTES)


def _check_headers(headers: Sequence[Header], found: list[Violation]) -> None:
    for number, header in enumerate(_within("message.headers", headers, MAX_HEADERS, found)):
        found += check_header(f"message.headers[{number}]", header)


def _checked_attachments(
    raw: Sequence[Attachment], found: list[Violation]
) -> tuple[Attachment, ...]:
    attachments = _within("message.attachments", raw, MAX_ATTACHMENTS, found)
    found += check_attachments(attachments)
    return tuple(
        a if a.content_type else replace(a, content_type=content_type_of(a.filename))
        for a in attachments
    )


def _check_labels(
    field: str, labels: Sequence[str], max_items: int, found: list[Violation]
) -> None:
    """Tags and categories."""
    for number, label in enumerate(_within(field, labels, max_items, found)):
        found += check_text(f"{field}[{number}]", label, MAX_LABEL, required=True)


def _check_flags(flags: int, found: list[Violation]) -> None:
    if not 0 <= flags <= MAX_FLAGS:
        text = "flags are bits 1 to 30"
        found.append(Violation("message.flags", Reason.OUT_OF_RANGE, text))
    elif flags & RESERVED_BIT:
        found.append(Violation("message.flags", Reason.RESERVED_FLAG, "bit 0 is reserved"))


def _check_args(args: Mapping[str, str], found: list[Violation]) -> None:
    if len(args) > MAX_ARGS:
        text = f"at most {MAX_ARGS} pairs"
        found.append(Violation("message.custom_args", Reason.TOO_MANY, text))
    size = 0
    for key, value in islice(args.items(), MAX_ARGS):
        if not key or not fits(key, MAX_ARG):
            found += check_text(_arg_field(key), key, MAX_ARG, required=True)
        if not fits(value, MAX_ARG):
            found += check_text(_arg_field(key), value, MAX_ARG)
        size += utf8_len(key) + utf8_len(value)
    if size > MAX_ARGS_BYTES:
        text = f"keys and values have at most {MAX_ARGS_BYTES:,} bytes in all"
        found.append(Violation("message.custom_args", Reason.TOO_LONG, text))


def _arg_field(key: str) -> str:
    """The path of an argument. A key may be anything here: it is cut, and escaped as in JSON."""
    shown = key if len(key) <= _SHOWN_KEY else f"{key[:_SHOWN_KEY]}…"
    return f"message.custom_args[{json.dumps(shown, ensure_ascii=not key.isprintable())}]"


def _within(field: str, items: Sequence[_T], limit: int, found: list[Violation]) -> Sequence[_T]:
    """The items up to the limit; more than these are told once and not looked at."""
    if len(items) <= limit:
        return items
    found.append(Violation(field, Reason.TOO_MANY, f"at most {limit}"))
    return items[:limit]
