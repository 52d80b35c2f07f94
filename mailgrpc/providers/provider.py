"""What a provider owes to the worker: one call, honestly classed.

A provider says how to send and what each answer means. It never raises for a refusal, a time-out
or a broken connection: every delivery of a call gets exactly one Result. Where it cannot prove
that a delivery was not accepted, the outcome is UNKNOWN; a wrong DEFERRED here is a second mail
to somebody, a wrong UNKNOWN only a question.

    phase                                       failure means
    waiting for a free connection               DEFERRED: nothing was said yet
    resolve, connect, TLS, greeting, log-in     DEFERRED, of_channel: the same for every mail
    before the last look                        DEFERRED or REJECTED: no message was given
    from the first byte after the last look     UNKNOWN, unless the answer itself is a refusal
    an answer, wherever it comes                by itself; of_channel where it says that no mail
                                                fares better now: credentials, rates, leaving

`of_channel` stands with DEFERRED alone, because what it stops is tried again without using up an
attempt. It is set only where the failure cannot be about this mail or this recipient: one mail that
breaks a server, or is refused in the words of a busy one, would else hold up all others for days.
Where that is not certain it is not set, and the mail pays with an attempt; if it is the channel,
the next connection tells. Waiting for a connection is of our own making, never of the channel's.

The last look (`SendCall.last_look`) is asked at the last point that still proves non-sending:
before the write that holds the final dot, or before the first byte of an HTTP request. A provider
that splits a call into several requests asks again before each. It answers False when the worker's
lease may have run out; what has not been decided by then ends DEFERRED with cause WORKER_LOST, and
nothing more is sent.

A call that is cancelled leaves nothing behind: its connection is dropped, not used again. Its
outcome is then unknown to everybody but the reaper.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import datetime
from enum import Enum
from typing import Protocol

from mailgrpc.core.delivery import Cause, Outcome, Result
from mailgrpc.core.message import MailMessage, Recipient
from mailgrpc.core.value import value
from mailgrpc.errors import Violation


class Grouping(Enum):
    """How deliveries of one message may share a call."""

    ENVELOPE = "envelope"  # headers do not depend on who is in the group (SMTP)
    PERSONAL = "personal"  # each recipient sees only itself (SendGrid's personalizations)


@value
class Addressee:
    """One delivery within a call."""

    delivery_id: uuid.UUID
    recipient: Recipient


def nothing() -> SendCall | None:
    """That no call waits."""
    return None


@value
class SendCall:
    """One call: a message to some of its recipients, in one attempt of each.

    `rfc_message_id` is the Message-ID header with its angle brackets, the same in every attempt.
    `created_at` is when the message was accepted: the Date header, the same in every attempt.
    `following` gives a call that waits behind this one, if any, and only once: a provider may begin it
    while it waits for this one's answer. It is made by the same task, right after this one; where this one
    takes long, by another and before it has ended; or, at the end of the process, not at all.
    """

    call_id: uuid.UUID
    message_id: uuid.UUID
    project: str
    message: MailMessage
    rfc_message_id: str
    created_at: datetime
    addressees: Sequence[Addressee]
    last_look: Callable[[], bool]
    following: Callable[[], SendCall | None] = nothing


class Provider(Protocol):
    """A use of a protocol or service with its credentials: what a channel URL becomes."""

    name: str  # "smtp", "sendgrid", "capture"
    grouping: Grouping
    group_max: int  # deliveries of one message a call may carry, at most

    def check(self, message: MailMessage) -> list[Violation]:
        """What of a (checked) message this provider cannot carry; asked at Enqueue, no I/O."""

    async def send(self, call: SendCall) -> list[Result]:
        """Carry out one call. One Result an addressee, in their order. Never raises for I/O.

        A message that cannot be put into the provider's form is REJECTED with cause CONTENT.
        """

    async def probe(self) -> str:
        """Connect and log in without sending, for `mailgrpc doctor`; the answer in a line.

        Raises ProbeFailed with what to do about it.
        """

    async def close(self) -> None:
        """End the pooled connections."""


class ProbeFailed(Exception):
    """A channel cannot be used as it is configured; the text says why."""


def everyone(call: SendCall, result: Result) -> list[Result]:
    """The same result for each addressee."""
    return [result] * len(call.addressees)


def worker_lost() -> Result:
    """What a call ends with when the last look said no."""
    return Result(
        Outcome.DEFERRED, Cause.WORKER_LOST, text="the worker's lease ran out before the mail left"
    )
