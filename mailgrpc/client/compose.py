"""From plain Python values to an EnqueueRequest.

What is wrong with a mail the server says. Here only what the contract cannot express is refused,
with TypeError or ValueError.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, TypeAlias, TypedDict, Unpack

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from mailgrpc.v1.mail_service_pb2 import EnqueueRequest
from mailgrpc.v1.message_pb2 import (
    Attachment,
    DeliveryMode,
    DeliveryOptions,
    Header,
    Mailbox,
    MailMessage,
    Priority,
    Recipient,
    RetryPolicy,
)

Address: TypeAlias = str | Mailbox | Recipient
"""`ada@example.org`, `Ada Lovelace <ada@example.org>`, or the contract's own."""

File: TypeAlias = str | os.PathLike[str] | tuple[str, bytes] | Attachment
"""A path, (filename, content), or the contract's own: that one can be shown inline."""


class _Needed(TypedDict):
    sender: Address
    subject: str


class Mail(_Needed, total=False):
    """The arguments of `send` and `compose`. What is left out has the contract's default.

    Times are aware datetimes. `headers` keep their order. At least one of `text` and `html` is
    needed, and the server says so. `sender` and `subject` are needed, too.
    """

    to: Address | Iterable[Address]
    cc: Address | Iterable[Address]
    bcc: Address | Iterable[Address]
    reply_to: Address | Iterable[Address]
    text: str
    html: str
    headers: Mapping[str, str] | Iterable[tuple[str, str]]
    attachments: Iterable[File]
    tags: Iterable[str]
    categories: Iterable[str]
    flags: int
    custom_args: Mapping[str, str]
    correlation_id: str
    mode: Literal["RETRYING", "SEND_ONCE"]
    priority: Literal["BULK", "NORMAL", "HIGH", "URGENT"]
    retry: RetryPolicy
    send_at: datetime
    expire_at: datetime
    channel: str
    dedupe_window: timedelta
    request_id: str  # empty or left out: a fresh UUID
    validate_only: bool


def compose(**mail: Unpack[Mail]) -> EnqueueRequest:
    """The request for one mail, its request_id filled. Reads attachments that are paths.

    Raises TypeError for arguments that do not exist or are missing, ValueError for values that
    the contract cannot express, OSError for files that cannot be read.
    """
    if unknown := mail.keys() - Mail.__required_keys__ - Mail.__optional_keys__:
        raise TypeError(f"unknown argument {min(unknown)!r}")
    if missing := Mail.__required_keys__ - mail.keys():
        raise TypeError(f"argument {min(missing)!r} is missing")
    request = EnqueueRequest(
        request_id=mail.get("request_id") or new_request_id(),
        message=_message(mail),
        validate_only=mail.get("validate_only", False),
    )
    options = _options(mail)
    if options.ListFields():
        request.options.CopyFrom(options)
    return request


def new_request_id() -> str:
    """An id that nobody else uses."""
    return str(uuid.uuid4())


def timestamp(moment: datetime) -> Timestamp:
    """The contract's form of an aware datetime. Raises ValueError for a naive one."""
    if moment.tzinfo is None:
        raise ValueError(f"{moment.isoformat()}: a time needs its zone, e.g. datetime.now(UTC)")
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp


def duration(seconds: float) -> Duration:
    """The contract's form of a number of seconds."""
    length = Duration()
    length.FromTimedelta(timedelta(seconds=seconds))
    return length


def parse_address(text: str) -> tuple[str, str]:
    """(address, name) of `ada@example.org` or `Ada Lovelace <ada@example.org>`."""
    name, bracket, rest = text.strip().rpartition("<")
    if not bracket or not rest.endswith(">"):
        return text.strip(), ""
    return rest[:-1].strip(), name.strip().strip('"').replace('\\"', '"')


def _message(mail: Mail) -> MailMessage:
    headers = mail.get("headers", ())
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return MailMessage(
        sender=_mailbox(mail["sender"]),
        to=_recipients(mail.get("to", ())),
        cc=_recipients(mail.get("cc", ())),
        bcc=_recipients(mail.get("bcc", ())),
        reply_to=[_mailbox(address) for address in _several(mail.get("reply_to", ()))],
        subject=mail["subject"],
        text=mail.get("text", ""),
        html=mail.get("html", ""),
        headers=[Header(name=name, value=value) for name, value in pairs],
        attachments=[_attachment(file) for file in mail.get("attachments", ())],
        tags=_texts(mail.get("tags", ())),
        categories=_texts(mail.get("categories", ())),
        flags=mail.get("flags", 0),
        custom_args=mail.get("custom_args", {}),
        correlation_id=mail.get("correlation_id", ""),
    )


def _options(mail: Mail) -> DeliveryOptions:
    options = DeliveryOptions(channel=mail.get("channel", ""))
    if mode := mail.get("mode"):
        options.mode = DeliveryMode.Value(f"DELIVERY_MODE_{mode}")
    if priority := mail.get("priority"):
        options.priority = Priority.Value(f"PRIORITY_{priority}")
    if (retry := mail.get("retry")) is not None:
        options.retry.CopyFrom(retry)
    if (send_at := mail.get("send_at")) is not None:
        options.send_at.CopyFrom(timestamp(send_at))
    if (expire_at := mail.get("expire_at")) is not None:
        options.expire_at.CopyFrom(timestamp(expire_at))
    if (window := mail.get("dedupe_window")) is not None:
        options.dedupe_window.FromTimedelta(window)
    return options


def _several(addresses: Address | Iterable[Address]) -> Iterable[Address]:
    return (addresses,) if isinstance(addresses, str | Mailbox | Recipient) else addresses


def _recipients(addresses: Address | Iterable[Address]) -> list[Recipient]:
    return [
        Recipient(address=box.address, name=box.name) for box in map(_mailbox, _several(addresses))
    ]


def _mailbox(address: Address) -> Mailbox:
    if isinstance(address, str):
        bare, name = parse_address(address)
        return Mailbox(address=bare, name=name)
    return Mailbox(address=address.address, name=address.name)


def _attachment(file: File) -> Attachment:
    if isinstance(file, Attachment):
        return file
    if isinstance(file, tuple):
        filename, data = file
        return Attachment(filename=filename, data=data)
    path = Path(file)
    return Attachment(filename=path.name, data=path.read_bytes())


def _texts(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):
        raise TypeError(f"{texts!r}: expected several texts, as a list")
    return texts
