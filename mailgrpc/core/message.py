"""What a caller hands over: the message, its recipients, and how it wants them delivered.

These objects exist in two conditions. As `server/convert.py` makes them they hold what the caller
wrote, good or bad. `core/shape.py` checks them and returns the same types with addresses
normalised; everything behind it relies on that. A message never changes afterwards.

What the caller left out stays None or empty, and is not filled with a default here: two requests
are the same only when the same things were said (`core/fingerprint.py`), whatever the defaults
of the day are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from datetime import datetime, timedelta
from enum import IntEnum

from mailgrpc.core.delivery import Mode, Role
from mailgrpc.core.retry import DEFAULT_POLICY, RetryPolicy
from mailgrpc.core.value import value


class Priority(IntEnum):
    """Which of two due deliveries starts first; numbers are those of the contract."""

    BULK = 10
    NORMAL = 20
    HIGH = 30
    URGENT = 40


@value
class Mailbox:
    """An address with a name to show. `address` is bare; checked: its domain is ASCII, lower."""

    address: str
    name: str = ""


@value
class Recipient:
    """One recipient.

    `address` is how it is written to the provider (local part as the caller wrote it); `key` is
    how it is compared and stored (local part lowercased too), empty before the check.
    """

    address: str
    name: str = ""
    role: Role = Role.TO
    key: str = ""


@value
class Header:
    """An additional header field, unfolded and unencoded."""

    name: str
    value: str


@value
class Attachment:
    """A file. With a `content_id` it is inline, for the HTML part to refer to."""

    filename: str
    data: bytes = b""
    content_type: str = ""  # "type/subtype"; the check fills it from the filename
    content_id: str = ""  # without angle brackets


@value
class MailMessage:
    """Content and recipients. `recipients` holds to, cc and bcc, in this order."""

    sender: Mailbox | None
    recipients: tuple[Recipient, ...]
    subject: str
    text: str = ""
    html: str = ""
    reply_to: tuple[Mailbox, ...] = ()
    headers: tuple[Header, ...] = ()
    attachments: tuple[Attachment, ...] = ()
    tags: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    flags: int = 0
    custom_args: Mapping[str, str] = field(default_factory=dict)
    correlation_id: str = ""


@value
class RetryWishes:
    """What the caller said about retrying; 0 and None mean the server's policy."""

    max_attempts: int = 0
    initial_backoff: timedelta | None = None
    max_backoff: timedelta | None = None
    multiplier: float = 0.0

    def policy(self) -> RetryPolicy:
        """The policy that these wishes and the defaults make together."""
        first = self.initial_backoff or DEFAULT_POLICY.initial_backoff
        return RetryPolicy(
            max_attempts=self.max_attempts or DEFAULT_POLICY.max_attempts,
            initial_backoff=first,
            max_backoff=max(first, self.max_backoff or DEFAULT_POLICY.max_backoff),
            multiplier=self.multiplier or DEFAULT_POLICY.multiplier,
        )


@value
class DeliveryOptions:
    """How to deliver. `mode` and `priority` are numbers of the contract, 0 where unset."""

    mode: int = 0
    priority: int = 0
    retry: RetryWishes | None = None
    send_at: datetime | None = None
    expire_at: datetime | None = None
    channel: str = ""
    dedupe_window: timedelta | None = None

    @property
    def effective_mode(self) -> Mode:
        """The mode with its default, RETRYING."""
        return Mode(self.mode) if self.mode else Mode.RETRYING

    @property
    def effective_priority(self) -> Priority:
        """The priority with its default, NORMAL."""
        return Priority(self.priority) if self.priority else Priority.NORMAL


@value
class Submission:
    """One Enqueue: the message, its options, and the caller's own id for the request."""

    message: MailMessage
    options: DeliveryOptions = DeliveryOptions()
    request_id: str = ""
    validate_only: bool = False


DEFAULT_CHANNEL = "default"
"""The channel of a message that names none."""

MAX_RECIPIENTS = 100
MAX_REQUEST_BYTES = 10 * 1024 * 1024
DEFAULT_EXPIRY = timedelta(days=5)
MAX_SEND_AHEAD = timedelta(days=30)
MAX_EXPIRY_AHEAD = timedelta(days=60)
MIN_DEDUPE_WINDOW = timedelta(seconds=1)
MAX_DEDUPE_WINDOW = timedelta(hours=24)
