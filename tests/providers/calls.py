"""Messages and calls, made from as little as a test has to say."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from mailgrpc.core import ids
from mailgrpc.core.message import Mailbox, MailMessage, Recipient
from mailgrpc.providers.provider import Addressee, SendCall

CREATED_AT = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def message(*addresses: str, **fields: Any) -> MailMessage:
    """A small mail to `addresses`, with other fields as given."""
    small = MailMessage(
        sender=Mailbox("shop@example.org", "The Shop"),
        recipients=tuple(Recipient(a, key=a.lower()) for a in addresses or ("ann@example.test",)),
        subject="Your receipt",
        text="Thank you.\n",
    )
    return replace(small, **fields)


def call_of(mail: MailMessage, *, last_look: Callable[[], bool] = lambda: True) -> SendCall:
    """A call to all recipients of `mail`."""
    message_id = ids.new_message_id()
    return SendCall(
        call_id=uuid.uuid4(),
        message_id=message_id,
        project="default",
        message=mail,
        rfc_message_id=f"<{message_id.hex}@mail.example.org>",
        created_at=CREATED_AT,
        addressees=[
            Addressee(ids.delivery_id(message_id, n), recipient)
            for n, recipient in enumerate(mail.recipients, start=1)
        ],
        last_look=last_look,
    )


def call_to(*addresses: str, last_look: Callable[[], bool] = lambda: True) -> SendCall:
    """A call with a small mail to `addresses`."""
    return call_of(message(*addresses), last_look=last_look)
