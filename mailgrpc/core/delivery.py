"""The states of a delivery and what moves it: the one table that everything else is held to.

A delivery (message × recipient) is the unit of state. `MOVES` is the whole state machine; the
diagram in docs/states.md, the enum of the contract and the CHECK in the database are tested
against it. `next_step` is the branch that decides after every attempt, and it is pure: the same
delivery, result, time and chance give the same step.

The rule behind it. An attempt that ended without proof is never counted as not sent:

    outcome            RETRYING                        SEND_ONCE, or a forced attempt
    ACCEPTED           SENT                            SENT
    DEFERRED (proof)   DEFERRED, until used up         DEFERRED; forced: FAILED
    REJECTED (proof)   FAILED                          FAILED
    UNKNOWN            DEFERRED and possibly sent      OUTCOME_UNKNOWN, never tried by itself

Attempts used up end in FAILED only where no attempt may have been sent, else in OUTCOME_UNKNOWN.

Two kinds of DEFERRED say nothing about the mail and use no attempt up, not even a forced one: the
channel failed as a whole (`Result.of_channel`), or the worker's lease ran out before the mail left.
The attempt is `spared`: it was made and is shown, and does not count against the policy. What is
only ever spared waits until its expiry.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Mapping
from datetime import datetime, timedelta
from random import Random

from mailgrpc.core.retry import RetryPolicy, backoff
from mailgrpc.core.value import value
from mailgrpc.errors import Reason


class State(enum.IntEnum):
    """Where a delivery is; numbers are those of `DeliveryState` in the contract."""

    QUEUED = 1
    SENDING = 2
    DEFERRED = 3
    SENT = 4
    DELIVERED = 5
    BOUNCED = 6
    COMPLAINED = 7
    FAILED = 8
    OUTCOME_UNKNOWN = 9
    SUPPRESSED = 10
    CANCELLED = 11
    EXPIRED = 12


class Mode(enum.IntEnum):
    """What an ambiguous attempt leads to; numbers are those of `DeliveryMode`."""

    RETRYING = 1
    SEND_ONCE = 2


class Outcome(enum.IntEnum):
    """What an attempt returned; numbers are those of `AttemptOutcome`."""

    ACCEPTED = 1  # the provider took it
    DEFERRED = 2  # provably not sent, may be tried again
    REJECTED = 3  # provably not sent, pointless to try again
    UNKNOWN = 4  # may or may not have been sent


class Cause(enum.IntEnum):
    """Why an attempt was not accepted; numbers are those of `FailureCause`."""

    UNSPECIFIED = 0
    BAD_ADDRESS = 1
    MAILBOX_FULL = 2
    POLICY = 3
    CONTENT = 4
    TOO_LARGE = 5
    SENDER = 6
    RATE_LIMITED = 7
    CREDENTIALS = 8
    DNS = 9
    CONNECTION = 10
    TLS = 11
    TIMEOUT = 12
    PROVIDER = 13
    WORKER_LOST = 14
    INTERNAL = 15


class WaitReason(enum.IntEnum):
    """Why a QUEUED or DEFERRED delivery is not being sent yet; numbers are those of the contract."""

    UNSPECIFIED = 0
    DUE = 1
    SCHEDULED = 2
    BACKOFF = 3
    RATE_LIMITED = 4
    CHANNEL_PAUSED = 5
    HELD = 6


class SuppressionReason(enum.IntEnum):
    """Why a delivery was not sent; numbers are those of the contract."""

    UNSPECIFIED = 0
    PREFERENCE = 1
    MANUAL = 2
    BOUNCE = 3
    COMPLAINT = 4
    UNSUBSCRIBE = 5
    STOPPED = 6
    DUPLICATE = 7


class Role(enum.IntEnum):
    """Which list of the message a recipient stood in; numbers are those of `RecipientRole`."""

    TO = 1
    CC = 2
    BCC = 3


_WAITING_MOVES = frozenset({State.SENDING, State.CANCELLED, State.EXPIRED, State.SUPPRESSED})
_PROOF = frozenset({State.SENT, State.DELIVERED, State.BOUNCED, State.COMPLAINED, State.FAILED})

MOVES: Mapping[State, frozenset[State]] = {
    # Late proof about an attempt made before Resend, backoff, cancel or expiry moves these too.
    State.QUEUED: _WAITING_MOVES | _PROOF,
    State.DEFERRED: _WAITING_MOVES | _PROOF | {State.QUEUED},
    State.SENDING: frozenset({State.SENT, State.DEFERRED, State.FAILED, State.OUTCOME_UNKNOWN}),
    State.SENT: frozenset({State.DELIVERED, State.BOUNCED, State.COMPLAINED, State.QUEUED}),
    State.DELIVERED: frozenset({State.BOUNCED, State.COMPLAINED, State.QUEUED}),
    State.BOUNCED: frozenset({State.DELIVERED, State.COMPLAINED, State.QUEUED}),
    State.COMPLAINED: frozenset(),
    State.FAILED: frozenset({State.QUEUED}),
    State.OUTCOME_UNKNOWN: _PROOF | {State.QUEUED},
    State.SUPPRESSED: frozenset({State.QUEUED}),
    State.CANCELLED: _PROOF | {State.QUEUED},
    State.EXPIRED: _PROOF | {State.QUEUED},
}
"""From each state to the states that may follow. What is not here does not happen."""

UNENDED = frozenset({State.QUEUED, State.SENDING, State.DEFERRED})
"""States that move by themselves; all others are ended."""

WITHOUT_PROOF = frozenset(
    {State.OUTCOME_UNKNOWN, State.DEFERRED, State.QUEUED, State.CANCELLED, State.EXPIRED}
)
"""States that rest on no proof about the last attempt: a late result may still correct them."""

LATE_PROOF: Mapping[Outcome, State] = {
    Outcome.ACCEPTED: State.SENT,
    Outcome.REJECTED: State.FAILED,
    Outcome.DEFERRED: State.FAILED,  # OUTCOME_UNKNOWN alone: what waits is tried again anyway
}
"""Where a late result takes a delivery that rests on no proof; UNKNOWN proves nothing."""

AGGREGATE_ORDER = (
    State.SENDING,
    State.QUEUED,
    State.DEFERRED,
    State.OUTCOME_UNKNOWN,
    State.FAILED,
    State.BOUNCED,
    State.COMPLAINED,
    State.EXPIRED,
    State.CANCELLED,
    State.SUPPRESSED,
    State.SENT,
    State.DELIVERED,
)
"""A message's state is the first of these that one of its deliveries has."""

RESENT_EXPIRY = timedelta(days=5)
"""How long what Resend has forced may wait for its channel."""

LEASE_LOST_WAIT = timedelta(seconds=1)
"""Until a delivery is due again whose worker lost its lease before the mail left."""

LONGEST_WAIT = timedelta(days=60)
"""A provider is not obeyed further: no expiry lies further ahead, and a Retry-After of millennia
is no date at all."""


@value
class Result:
    """What one attempt came to, as a provider tells it for one delivery."""

    outcome: Outcome
    cause: Cause = Cause.UNSPECIFIED
    status_code: int = 0  # SMTP or HTTP; 0 where there was none
    enhanced_code: str = ""  # RFC 3463, e.g. "5.1.1"
    text: str = ""  # at most 1,024 bytes, no control characters: see result_text
    provider_message_id: str = ""
    retry_after: timedelta | None = None
    of_channel: bool = False  # DEFERRED, and says nothing about this mail: the channel as a whole


@value
class Delivery:
    """One message to one recipient, as its row says."""

    delivery_id: uuid.UUID  # see core/ids.py
    recipient: str  # normalised
    role: Role
    state: State
    state_since: datetime
    version: int
    mode: Mode
    flags: int = 0  # of its message, categories included
    attempt_count: int = 0
    spared: int = 0  # attempts of these that do not count against the policy
    due_at: datetime | None = None
    wait_reason: WaitReason = WaitReason.UNSPECIFIED
    expire_at: datetime | None = None  # None: never
    forced: bool = False  # by Resend: one attempt, no retry
    possibly_sent: bool = False
    suppression_reason: SuppressionReason = SuppressionReason.UNSPECIFIED
    duplicate_of: uuid.UUID | None = None  # a message id
    last_result: Result | None = None


@value
class Step:
    """What becomes of a delivery. `due_at` and `wait_reason` are set where it waits."""

    state: State
    possibly_sent: bool
    due_at: datetime | None = None
    wait_reason: WaitReason = WaitReason.UNSPECIFIED
    spares: bool = False  # the attempt does not count against the policy


def next_step(
    delivery: Delivery,
    result: Result,
    now: datetime,
    policy: RetryPolicy,
    rng: Random,
    pause: timedelta = timedelta(seconds=10),
) -> Step:
    """What the result of the attempt that is running means for its delivery (in SENDING).

    `pause` is how long its channel is not asked, where the result is the channel's.

    A wait never reaches past `expire_at`: the delivery is due then at the latest, and its start
    finds it expired. Where no start comes, because no worker serves its channel or too much waits
    before it, the sweeper expires it instead (worker/expiry.py).
    """
    possibly_sent = delivery.possibly_sent or result.outcome is Outcome.UNKNOWN
    if result.outcome is Outcome.ACCEPTED:
        return Step(State.SENT, possibly_sent)
    if result.outcome is Outcome.REJECTED:
        return Step(State.FAILED, possibly_sent)
    if (wait := _spared_wait(result, pause)) is not None:
        due_at = _not_past_expiry(delivery, now + wait)
        reason = WaitReason.CHANNEL_PAUSED if result.of_channel else WaitReason.BACKOFF
        return Step(State.DEFERRED, possibly_sent, due_at, reason, spares=True)
    once = delivery.forced or delivery.mode is Mode.SEND_ONCE
    if result.outcome is Outcome.UNKNOWN and once:
        return Step(State.OUTCOME_UNKNOWN, possibly_sent)
    used = delivery.attempt_count - delivery.spared
    if delivery.forced or used >= policy.max_attempts:
        return Step(State.OUTCOME_UNKNOWN if possibly_sent else State.FAILED, possibly_sent)

    wait = backoff(used, policy, rng)
    reason = WaitReason.BACKOFF
    if result.retry_after is not None and result.retry_after > wait:
        wait = min(result.retry_after, LONGEST_WAIT)
        reason = WaitReason.RATE_LIMITED
    return Step(State.DEFERRED, possibly_sent, _not_past_expiry(delivery, now + wait), reason)


def step_beside_acceptance(step: Step, delivery: Delivery, *, another_was_accepted: bool) -> Step:
    """What becomes of `next_step`'s step where another attempt is known to have been accepted.

    That one was overtaken: its worker was taken for gone, and its result came after all. Nothing is
    tried again, or called unknown, that is known to be sent. What Resend has forced was wanted in
    spite of what came before. The database carries this out, which alone knows all attempts
    (`record_outcomes`); the two are tested against each other.
    """
    is_open = step.state in (State.DEFERRED, State.OUTCOME_UNKNOWN)
    if another_was_accepted and is_open and not delivery.forced:
        return Step(State.SENT, step.possibly_sent, spares=step.spares)
    return step


def _spared_wait(result: Result, pause: timedelta) -> timedelta | None:
    """How long a delivery waits whose attempt says nothing about it; None where it says some."""
    if result.outcome is not Outcome.DEFERRED:
        return None
    if result.of_channel:
        return min(max(pause, result.retry_after or pause), LONGEST_WAIT)
    return LEASE_LOST_WAIT if result.cause is Cause.WORKER_LOST else None


def _not_past_expiry(delivery: Delivery, due_at: datetime) -> datetime:
    return due_at if delivery.expire_at is None else min(due_at, delivery.expire_at)


def late_step(
    delivery: Delivery,
    result: Result,
    *,
    others_may_have_left: bool,
    is_overtaken: bool = False,
) -> Step | None:
    """What a result that came late means; None where it changes nothing but its attempt.

    For an attempt of a delivery that is no longer SENDING. Only proof moves it, and only where the
    state rests on none: a pending retry is then dropped. Of an attempt that `is_overtaken`, because
    another was started after it, only its acceptance counts, and not against what Resend has forced
    since. Proof that it was not sent takes the mark `possibly_sent` away, unless
    `others_may_have_left`: another attempt ended UNKNOWN or was accepted. That it could have been
    tried again does not bring an ended delivery back to life: its caller was told that this never
    happens by itself. The database carries this out as it stores the result (`record_outcomes`);
    the two are tested against each other.
    """
    state = LATE_PROOF.get(result.outcome)
    if state is None or delivery.state not in WITHOUT_PROOF:
        return None
    if result.outcome is Outcome.ACCEPTED:
        if is_overtaken and delivery.forced:
            return None
        return Step(state, delivery.possibly_sent)
    if is_overtaken:
        return None
    if result.outcome is Outcome.DEFERRED and (
        delivery.state is not State.OUTCOME_UNKNOWN or others_may_have_left
    ):
        return None
    return Step(state, others_may_have_left)


def aggregate(states: set[State]) -> State:
    """The state of a message with these deliveries. `states` is not empty."""
    return next(state for state in AGGREGATE_ORDER if state in states)


def result_text(text: str) -> str:
    """A provider's words, fit to store and to show: one line, at most 1,024 bytes of UTF-8."""
    if not text.isprintable():  # mostly there is nothing to replace
        text = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(text.split())
    return line.encode("utf-8", "replace")[:1024].decode("utf-8", "ignore")


def resend_refusal(delivery: Delivery, *, accept_duplicate_risk: bool) -> Reason | None:
    """Why a delivery may not be sent once more by force; None where it may.

    Whether what suppressed it still stands is for the caller to find out.
    """
    if delivery.state is State.SENDING:
        return Reason.MESSAGE_SENDING
    if delivery.state in (State.QUEUED, State.COMPLAINED):
        return Reason.NOT_RESENDABLE
    is_duplicate = delivery.suppression_reason is SuppressionReason.DUPLICATE
    if (_may_have_been_sent(delivery) or is_duplicate) and not accept_duplicate_risk:
        return Reason.DUPLICATE_RISK
    return None


def _may_have_been_sent(delivery: Delivery) -> bool:
    return delivery.possibly_sent or delivery.state in (
        State.SENT,
        State.DELIVERED,
        State.OUTCOME_UNKNOWN,
    )


def resend_step(delivery: Delivery, now: datetime) -> tuple[Step, bool, datetime | None]:
    """What Resend makes of a delivery that it may: (step, forced, expire_at).

    A DEFERRED one is due now and its policy goes on, or its single attempt if that was spared; an
    ended one gets a single attempt, and a new expiry: the old one may have passed, and without any
    it would wait for ever where its channel is gone.
    """
    step = Step(State.QUEUED, _may_have_been_sent(delivery), now, WaitReason.DUE)
    if delivery.state is State.DEFERRED:
        return step, delivery.forced, delivery.expire_at
    return step, True, now + RESENT_EXPIRY
