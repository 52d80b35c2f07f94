"""The Python client: `MailClient` for threads, `AsyncMailClient` for asyncio. Base install only.

    from mailgrpc.client import MailClient

    with MailClient("127.0.0.1:50051") as client:
        receipt = client.send(
            sender="Shop <shop@example.org>",
            to=["ada@example.org"],
            subject="Your receipt",
            text="Thank you.",
            attachments=["invoice.pdf"],
            request_id="order-4711-receipt",
        )

On top of the stubs it gives every Enqueue and Resend a request_id, so that trying again is safe;
tries again where that can help (`policy`); reads the feed across reconnects without a gap or a
repeat (`watching`); and turns statuses into exceptions with everything that the server said
(`errors`). All settings are arguments; `from_settings` takes them from the environment.

Read `calls` for what it does, `transport` for how one text serves threads and asyncio.
"""

from mailgrpc.client.calls import Receipt
from mailgrpc.client.clients import (
    AsyncEvents,
    AsyncMailClient,
    AsyncWatch,
    Events,
    MailClient,
    Watch,
)
from mailgrpc.client.compose import Mail, compose, new_request_id
from mailgrpc.client.errors import (
    AccessDeniedError,
    ExhaustedError,
    InvalidRequestError,
    MailError,
    MessageNotFoundError,
    NotEndedError,
    PreconditionError,
    RequestIdMismatchError,
    ResumeTokenExpiredError,
    UnavailableError,
    Violation,
    error_from_item,
)
from mailgrpc.client.policy import CallPolicy
from mailgrpc.client.watching import Update

__all__ = [
    "AccessDeniedError",
    "AsyncEvents",
    "AsyncMailClient",
    "AsyncWatch",
    "CallPolicy",
    "Events",
    "ExhaustedError",
    "InvalidRequestError",
    "Mail",
    "MailClient",
    "MailError",
    "MessageNotFoundError",
    "NotEndedError",
    "PreconditionError",
    "Receipt",
    "RequestIdMismatchError",
    "ResumeTokenExpiredError",
    "UnavailableError",
    "Update",
    "Violation",
    "Watch",
    "compose",
    "error_from_item",
    "new_request_id",
]
