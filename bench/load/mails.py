"""Random mails, made before the clock starts: no two bodies, recipients or request ids alike."""

from __future__ import annotations

import os
import uuid

from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import message_pb2


def request(
    *, mode: int = 0, domain: str = "example.org", attachment_bytes: int = 0
) -> pb.EnqueueRequest:
    """One mail to one recipient, with a body of 600 characters."""
    order = str(uuid.uuid4())
    message = message_pb2.MailMessage(
        sender=message_pb2.Mailbox(address="shop@example.org", name="The Shop"),
        to=[message_pb2.Recipient(address=f"{os.urandom(6).hex()}@{domain}")],
        subject="Your receipt",
        text=os.urandom(300).hex(),
        custom_args={"order": order},
    )
    if attachment_bytes:
        message.attachments.add(filename="receipt.pdf", data=os.urandom(attachment_bytes))
    made = pb.EnqueueRequest(request_id=order, message=message)
    if mode:
        made.options.mode = mode  # type: ignore[assignment]
    return made
