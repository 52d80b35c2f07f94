"""When a call is tried again. Pure: the time that is left and chance are handed in.

Every method that changes something may be repeated: Enqueue and Resend by their request_id, which
this client always fills, the others by what they are. So the question is only whether another try
can help:

    UNAVAILABLE          yes
    DEADLINE_EXCEEDED    yes: one try has a shorter deadline than the whole call
    RESOURCE_EXHAUSTED   where the server says when to come back (QUEUE_FULL, RATE_LIMITED)
    CANCELLED            where it says nothing but that: a call that a server never looked at
    anything else        no

A stream only reads, so it is also resumed after what a proxy or the transport makes of a broken
connection: INTERNAL, UNKNOWN or CANCELLED that mailgrpc itself did not say.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import grpc

from mailgrpc.client.errors import MailError

_TRANSIENT = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})
_BROKEN_STREAM = frozenset(
    {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPolicy:
    """How long, how often. All in seconds.

    The wait before the n-th repetition is `first_wait_s` × 2^(n - 1), at most `longest_wait_s`,
    shortened at random by up to a half, so that callers that failed together do not come back
    together. A longer wait that the server asks for is kept.
    """

    timeout_s: float = 60.0
    try_timeout_s: float = 20.0
    first_wait_s: float = 0.1
    longest_wait_s: float = 5.0

    def wait_before_retry(
        self, error: MailError, tries_made: int, left_s: float, rng: Random
    ) -> float | None:
        """The wait before a call is tried again; None: it is not, the error stands."""
        exhausted = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        comes_back = exhausted and error.retry_after_s is not None
        if error.code not in _TRANSIENT and not comes_back and not _was_turned_away(error):
            return None
        wait = self.backoff(error, tries_made, rng)
        return wait if wait < left_s else None

    def wait_before_resume(self, error: MailError, failures: int, rng: Random) -> float | None:
        """The wait before a stream is resumed; None: it is not, the error stands."""
        from_elsewhere = error.code in _BROKEN_STREAM and not error.reason
        if from_elsewhere or error.code in _TRANSIENT:
            return self.backoff(error, failures, rng)
        return self.wait_before_retry(error, failures, float("inf"), rng)

    def backoff(self, error: MailError, failures: int, rng: Random) -> float:
        """The wait after `failures` (1 or more) failures in a row."""
        doubled = self.first_wait_s * 2.0 ** min(failures - 1, 30)
        wait = min(doubled, self.longest_wait_s) * rng.uniform(0.5, 1)
        return max(wait, (error.retry_after_s or 0) * rng.uniform(1, 1.2))


def _was_turned_away(error: MailError) -> bool:
    """Whether gRPC itself ended a call that waited to be taken in: too many did, or the server ended.

    It says CANCELLED with its own name for a text. What the caller cancels here has another.
    """
    return error.code is grpc.StatusCode.CANCELLED and error.text == error.code.name
