"""How a message's content lies in its row: msgpack for what is only ever read whole.

Subject, tags, arguments and so on have columns of their own, because they are asked for alone.
The first element is the version of this form; a reader knows all that were ever written.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import msgpack
import orjson

from mailgrpc.core.delivery import Role
from mailgrpc.core.message import (
    Attachment,
    DeliveryOptions,
    Header,
    Mailbox,
    MailMessage,
    Recipient,
    RetryWishes,
)

_FORM = 1


def pack_content(message: MailMessage) -> bytes:
    """The content without what has columns of its own, and without the files' data."""
    assert message.sender is not None, "a checked message has a sender"
    packed: bytes = msgpack.packb(
        (
            _FORM,
            (message.sender.address, message.sender.name),
            [(r.address, r.name, int(r.role), r.key) for r in message.recipients],
            [(m.address, m.name) for m in message.reply_to],
            message.text,
            message.html,
            [(h.name, h.value) for h in message.headers],
            [(a.filename, a.content_type, a.content_id) for a in message.attachments],
            message.categories,
            message.flags,
        )
    )
    return packed


def unpack_message(row: Any, files: Mapping[int, bytes]) -> MailMessage | None:
    """The message of a row of `messages`; None once its content is erased."""
    if row["content"] is None:
        return None
    form, *fields = msgpack.unpackb(row["content"])
    if form != _FORM:
        raise ValueError(f"content of message {row['id']} has form {form}, which is newer")
    sender, recipients, reply_to, text, html, headers, attachments, categories, flags = fields
    return MailMessage(
        sender=Mailbox(*sender),
        recipients=tuple(
            Recipient(address, name, Role(role), key) for address, name, role, key in recipients
        ),
        subject=row["subject"],
        text=text,
        html=html,
        reply_to=tuple(Mailbox(*m) for m in reply_to),
        headers=tuple(Header(*h) for h in headers),
        attachments=tuple(
            Attachment(filename, files.get(position, b""), content_type, content_id)
            for position, (filename, content_type, content_id) in enumerate(attachments)
        ),
        tags=tuple(unpack_json(row["tags"])),
        categories=tuple(categories),
        flags=flags,
        custom_args=unpack_json(row["custom_args"]),
        correlation_id=row["correlation_id"],
    )


def pack_json(value: object) -> str:
    """JSON text for a jsonb parameter."""
    return orjson.dumps(value).decode() if value else "{}" if isinstance(value, Mapping) else "[]"


def unpack_json(value: Any) -> Any:
    """The value of a jsonb column, which the driver gives as text."""
    return orjson.loads(value) if isinstance(value, str) else value


_NO_OPTIONS = DeliveryOptions()


def pack_options(options: DeliveryOptions) -> str:
    """The options as the caller gave them, as JSON text; what was left out stays out."""
    if options == _NO_OPTIONS:
        return "{}"
    packed: dict[str, object] = {}
    for name in ("mode", "priority", "channel"):
        if value := getattr(options, name):
            packed[name] = value
    for name in ("send_at", "expire_at"):
        if moment := getattr(options, name):
            packed[name] = moment.isoformat()
    if options.dedupe_window is not None:
        packed["dedupe_window_s"] = options.dedupe_window.total_seconds()
    if (retry := options.retry) is not None:
        packed["retry"] = {
            "max_attempts": retry.max_attempts,
            "initial_backoff_s": _seconds(retry.initial_backoff),
            "max_backoff_s": _seconds(retry.max_backoff),
            "multiplier": retry.multiplier,
        }
    return pack_json(packed)


def unpack_options(value: Any) -> DeliveryOptions:
    """The options of a row of `messages`."""
    packed = unpack_json(value)
    if not packed:
        return _NO_OPTIONS
    retry = packed.get("retry")
    return DeliveryOptions(
        mode=packed.get("mode", 0),
        priority=packed.get("priority", 0),
        channel=packed.get("channel", ""),
        send_at=_moment(packed.get("send_at")),
        expire_at=_moment(packed.get("expire_at")),
        dedupe_window=_duration(packed.get("dedupe_window_s")),
        retry=retry
        and RetryWishes(
            max_attempts=retry["max_attempts"],
            initial_backoff=_duration(retry["initial_backoff_s"]),
            max_backoff=_duration(retry["max_backoff_s"]),
            multiplier=retry["multiplier"],
        ),
    )


def _seconds(duration: timedelta | None) -> float | None:
    return None if duration is None else duration.total_seconds()


def _duration(seconds: float | None) -> timedelta | None:
    return None if seconds is None else timedelta(seconds=seconds)


def _moment(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
