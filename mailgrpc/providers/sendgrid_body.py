"""A message as SendGrid's v3 Mail Send wants it, and what of it SendGrid would refuse.

The body is built with the objects of the `sendgrid` package. Three of their ways are worked
around here: an `Email` without a name is parsed as `Name <address>`, so its fields are set one by
one; items are added at the front of their lists, so they are added from the last; text that looks
like one of SendGrid's API keys raises an exception, which becomes a ValueError.

Each recipient has a personalization of its own, in which it is the only `to`, whatever its role
in the message: nobody sees anybody else.

Limits, from the vendor's pages (Mail Send overview, its errors, and the body's schema):

    recipients a request                  1,000, each address once
    size of the mail with attachments     less than 30 MB
    custom_args of one recipient          less than 10,000 bytes, those of the request included
    categories                            10, each once, of at most 255 characters
    headers                               ASCII names; not those in RESERVED_HEADERS
    subject, content                      not empty; text/plain before text/html
    addresses                             no Unicode before the @

Its Message-ID. A custom Message-ID header is not among the reserved ones and is kept in the mail
that arrives. The vendor's own ids are others: X-Message-Id in the answer names the request, and
`sg_message_id` in its events begins with it. So events are matched by our custom_args.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from typing import Any

from sendgrid.helpers.mail import (
    Attachment,
    Category,
    Content,
    CustomArg,
    Email,
    From,
    Header,
    Mail,
    Personalization,
    ReplyTo,
    Subject,
    To,
)
from sendgrid.helpers.mail.exceptions import (
    ApiKeyIncludedException,
)

from mailgrpc.core import ids
from mailgrpc.core.delivery import Role
from mailgrpc.core.message import Mailbox, MailMessage, Recipient
from mailgrpc.errors import Reason, Violation
from mailgrpc.providers.provider import Addressee, SendCall

RESERVED_HEADERS = frozenset(
    {
        "x-sg-id",
        "x-sg-eid",
        "received",
        "dkim-signature",
        "content-type",
        "content-transfer-encoding",
        "to",
        "from",
        "subject",
        "reply-to",
        "cc",
        "bcc",
    }
)
MAX_CATEGORIES = 10
MAX_CATEGORY_LENGTH = 255
MAX_CUSTOM_ARGS = 10_000
MAX_MAIL = 30 * 1024 * 1024
OUR_ARGS = ("mailgrpc_message_id", "mailgrpc_call_id", "mailgrpc_delivery_id")
_OUR_ARGS_BYTES = 300
_BREAKS = re.compile(r"[\r\n\0]")


def check_message(message: MailMessage) -> list[Violation]:
    """What SendGrid would refuse, by the field as the caller wrote it."""
    return [
        *_check_subject(message),
        *_check_addresses(message),
        *_check_headers(message),
        *_check_tags(message),
        *_check_custom_args(message),
        *_check_size(message),
    ]


def _check_subject(message: MailMessage) -> list[Violation]:
    if message.subject:
        return []
    return [Violation("message.subject", Reason.REQUIRED, "SendGrid takes no mail without one")]


def _check_addresses(message: MailMessage) -> list[Violation]:
    fields: list[tuple[str, str]] = []
    if message.sender is not None:
        fields.append(("message.sender.address", message.sender.address))
    seen = dict.fromkeys(Role, 0)
    for recipient in message.recipients:
        role = recipient.role
        fields.append((f"message.{role.name.lower()}[{seen[role]}].address", recipient.address))
        seen[role] += 1
    for n, mailbox in enumerate(message.reply_to):
        fields.append((f"message.reply_to[{n}].address", mailbox.address))
    text = "SendGrid takes no Unicode before the @"
    return [Violation(f, Reason.INVALID_ADDRESS, text) for f, a in fields if not a.isascii()]


def _check_headers(message: MailMessage) -> list[Violation]:
    seen: set[str] = set()
    violations = []
    for n, header in enumerate(message.headers):
        field, name = f"message.headers[{n}].name", header.name.lower()
        if name in RESERVED_HEADERS:
            violations.append(Violation(field, Reason.RESERVED_HEADER, "reserved by SendGrid"))
        elif name in seen:
            text = "SendGrid takes each header once"
            violations.append(Violation(field, Reason.RESERVED_HEADER, text))
        seen.add(name)
    return violations


def _check_tags(message: MailMessage) -> list[Violation]:
    violations = []
    if len(set(message.tags)) > MAX_CATEGORIES:
        text = f"SendGrid takes {MAX_CATEGORIES} categories"
        violations.append(Violation("message.tags", Reason.TOO_MANY, text))
    for n, tag in enumerate(message.tags):
        if len(tag) > MAX_CATEGORY_LENGTH:
            text = f"SendGrid takes categories of {MAX_CATEGORY_LENGTH} characters"
            violations.append(Violation(f"message.tags[{n}]", Reason.TOO_LONG, text))
    return violations


def _check_custom_args(message: MailMessage) -> list[Violation]:
    field = "message.custom_args"
    if taken := [name for name in OUR_ARGS if name in message.custom_args]:
        text = f"{taken[0]} is set by the gateway itself"
        return [Violation(f'{field}["{taken[0]}"]', Reason.OUT_OF_RANGE, text)]
    size = len(json.dumps(dict(message.custom_args), ensure_ascii=False).encode())
    if size + _OUR_ARGS_BYTES >= MAX_CUSTOM_ARGS:
        text = f"{size} bytes; SendGrid takes {MAX_CUSTOM_ARGS - _OUR_ARGS_BYTES} beside our own"
        return [Violation(field, Reason.TOO_LONG, text)]
    return []


def _check_size(message: MailMessage) -> list[Violation]:
    files = sum((len(a.data) + 2) // 3 * 4 for a in message.attachments)
    size = files + len(message.text.encode()) + len(message.html.encode())
    if size >= MAX_MAIL:
        return [Violation("message", Reason.TOO_LONG, f"{size} bytes; SendGrid takes 30 MB")]
    return []


def request_body(call: SendCall, addressees: Sequence[Addressee]) -> bytes:
    """The JSON of one request. Raises ValueError for what cannot be sent this way."""
    try:
        mail = _mail(call, addressees)
    except ApiKeyIncludedException as error:
        raise ValueError("the content begins with what looks like a SendGrid API key") from error
    return json.dumps(mail.get(), ensure_ascii=False, separators=(",", ":")).encode()


def _mail(call: SendCall, addressees: Sequence[Addressee]) -> Any:
    message = call.message
    if message.sender is None:
        raise ValueError("a mail needs a sender")
    if any(map(_BREAKS.search, _header_texts(message))):
        raise ValueError("line breaks and NUL cannot stand in a header")
    mail = Mail(from_email=_mailbox(From(), message.sender), subject=Subject(message.subject))
    for index, addressee in enumerate(addressees):
        mail.add_personalization(_personalization(addressee), index)
    # A mail without content is refused; one blank is the shortest there is.
    if message.text or not message.html:
        mail.add_content(Content("text/plain", message.text or " "))
    if message.html:
        mail.add_content(Content("text/html", message.html))
    if len(message.reply_to) == 1:
        mail.reply_to = _mailbox(ReplyTo(), message.reply_to[0])
    elif message.reply_to:
        mail.reply_to_list = [_mailbox(ReplyTo(), mailbox) for mailbox in message.reply_to]
    for header in reversed(message.headers):
        mail.add_header(Header(header.name, header.value))
    mail.add_header(Header("Message-ID", call.rfc_message_id))
    for tag in reversed(tuple(dict.fromkeys(message.tags))):
        mail.add_category(Category(tag))
    _add_custom_args(mail, call)
    _add_attachments(mail, message)
    return mail


def _header_texts(message: MailMessage) -> Iterator[str]:
    """All that SendGrid puts into header lines."""
    yield message.subject
    for mailbox in (message.sender, *message.reply_to, *message.recipients):
        if mailbox is not None:
            yield mailbox.name
            yield mailbox.address
    for header in message.headers:
        yield header.name
        yield header.value
    for attachment in message.attachments:
        yield attachment.filename
        yield attachment.content_type
        yield attachment.content_id


def _personalization(addressee: Addressee) -> Any:
    personalization = Personalization()
    personalization.add_to(_mailbox(To(), addressee.recipient))
    delivery = ids.to_text(ids.DELIVERY, addressee.delivery_id)
    personalization.add_custom_arg(CustomArg("mailgrpc_delivery_id", delivery))
    return personalization


def _add_custom_args(mail: Any, call: SendCall) -> None:
    for key, value in call.message.custom_args.items():
        mail.add_custom_arg(CustomArg(key, value))
    mail.add_custom_arg(CustomArg("mailgrpc_message_id", ids.to_text(ids.MESSAGE, call.message_id)))
    mail.add_custom_arg(CustomArg("mailgrpc_call_id", ids.to_text(ids.CALL, call.call_id)))


def _add_attachments(mail: Any, message: MailMessage) -> None:
    for attachment in reversed(message.attachments):
        mail.add_attachment(
            Attachment(
                file_content=b64encode(attachment.data).decode(),
                file_name=attachment.filename or "attachment",
                file_type=attachment.content_type or "application/octet-stream",
                disposition="inline" if attachment.content_id else "attachment",
                content_id=attachment.content_id or None,
            )
        )


def _mailbox(empty: Email, mailbox: Mailbox | Recipient) -> Any:
    """`empty` with address and name, past its parser."""
    empty.email = mailbox.address
    empty.name = mailbox.name or None
    return empty
