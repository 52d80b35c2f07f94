"""The contract in words: states, times, events and results as a person reads them."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from mailgrpc.cli.output import Cell, Styled
from mailgrpc.v1.delivery_pb2 import (
    Attempt,
    AttemptOutcome,
    AttemptResult,
    Delivery,
    DeliveryState,
    FailureCause,
    SuppressionReason,
    WaitReason,
)
from mailgrpc.v1.event_pb2 import Event, EventKind

_STYLES = {
    DeliveryState.DELIVERY_STATE_QUEUED: "cyan",
    DeliveryState.DELIVERY_STATE_SENDING: "cyan",
    DeliveryState.DELIVERY_STATE_DEFERRED: "yellow",
    DeliveryState.DELIVERY_STATE_SENT: "green",
    DeliveryState.DELIVERY_STATE_DELIVERED: "green",
    DeliveryState.DELIVERY_STATE_BOUNCED: "red",
    DeliveryState.DELIVERY_STATE_COMPLAINED: "red",
    DeliveryState.DELIVERY_STATE_FAILED: "red",
    DeliveryState.DELIVERY_STATE_OUTCOME_UNKNOWN: "bold red",
}


def state_name(state: DeliveryState.ValueType) -> str:
    """`SENT`; the number of a state that this version does not know."""
    try:
        return DeliveryState.Name(state).removeprefix("DELIVERY_STATE_")
    except ValueError:
        return str(state)


def state_cell(state: DeliveryState.ValueType) -> Cell:
    """The state in its colour."""
    return Styled(state_name(state), _STYLES.get(state, "dim"))


def move_cell(event: Event) -> Cell:
    """`QUEUED → SENDING`, or what kind of event it is."""
    if event.kind != EventKind.EVENT_KIND_STATE_CHANGED:
        return Styled(kind_name(event.kind), "magenta")
    change = event.state_changed
    new = state_name(change.delivery.state)
    style = _STYLES.get(change.delivery.state, "dim")
    if change.old_state == DeliveryState.DELIVERY_STATE_UNSPECIFIED:
        return Styled(new, style)
    return Styled(f"{state_name(change.old_state)} → {new}", style)


def kind_name(kind: EventKind.ValueType) -> str:
    """`MESSAGES_CLEARED`; the number of a kind that this version does not know."""
    try:
        return EventKind.Name(kind).removeprefix("EVENT_KIND_")
    except ValueError:
        return str(kind)


def event_detail(event: Event) -> str:
    """What there is to say about an event beside the states."""
    if event.kind == EventKind.EVENT_KIND_MESSAGES_CLEARED:
        return f"{event.messages_cleared.count} messages"
    if event.kind != EventKind.EVENT_KIND_STATE_CHANGED:
        return ""
    return delivery_detail(event.state_changed.delivery)


def delivery_detail(delivery: Delivery) -> str:
    """Why it is where it is, in one line."""
    state = delivery.state
    parts = []
    if state == DeliveryState.DELIVERY_STATE_SUPPRESSED:
        parts.append(suppression_name(delivery.suppression_reason))
        parts.append(delivery.duplicate_of_message_id)
    elif state != DeliveryState.DELIVERY_STATE_SENDING:
        parts.append(result_text(delivery.last_result))
    if state == DeliveryState.DELIVERY_STATE_DEFERRED or (
        state == DeliveryState.DELIVERY_STATE_QUEUED
        and delivery.wait_reason
        not in (WaitReason.WAIT_REASON_UNSPECIFIED, WaitReason.WAIT_REASON_DUE)
    ):
        parts.append(next_try(delivery))
    if delivery.attempt_count > 1:
        parts.append(f"attempt {delivery.attempt_count}")
    if delivery.possibly_sent:
        parts.append("possibly sent")
    return "   ".join(filter(None, parts))


def next_try(delivery: Delivery) -> str:
    """`next in 10 s (backoff)`, counted from when the delivery came into its state."""
    reason = WaitReason.Name(delivery.wait_reason).removeprefix("WAIT_REASON_").lower()
    shown = "" if reason in ("backoff", "unspecified") else f" ({reason.replace('_', ' ')})"
    if not delivery.HasField("due_at"):
        return f"waits{shown}"
    wait = delivery.due_at.ToDatetime() - delivery.state_since.ToDatetime()
    return f"next in {length(wait.total_seconds())}{shown}"


def result_text(result: AttemptResult) -> str:
    """`250 2.0.0 Ok`: what the provider said, or the cause where it said nothing."""
    code = str(result.status_code or "")
    enhanced = result.enhanced_code
    words = result.text.removeprefix(code).lstrip(" -")
    words = words.removeprefix(enhanced).lstrip()
    said = " ".join(filter(None, (code, enhanced, words)))
    if said or result.cause == FailureCause.FAILURE_CAUSE_UNSPECIFIED:
        return said
    return FailureCause.Name(result.cause).removeprefix("FAILURE_CAUSE_").lower().replace("_", " ")


def suppression_name(reason: SuppressionReason.ValueType) -> str:
    """`PREFERENCE`."""
    try:
        return SuppressionReason.Name(reason).removeprefix("SUPPRESSION_REASON_")
    except ValueError:
        return str(reason)


def length(seconds: float) -> str:
    """`0.02 s`, `1 s`, `9.5 s`, `90 s`, `5 min`, `3.2 h`."""
    seconds = max(seconds, 0.0)
    if seconds == 0:
        return "0 s"
    if seconds < 100:
        digits = 2 if seconds < 0.995 else 1 if seconds < 9.95 else 0
        return f"{seconds:.{digits}f} s".replace(".0 s", " s")
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 86400:.0f} d"


def local_time(stamp: Timestamp, *, millis: bool = False) -> str:
    """A time in the zone of whoever reads it; empty where it is not set."""
    if not stamp.seconds and not stamp.nanos:
        return ""
    moment = stamp.ToDatetime(UTC).astimezone()
    return clock_time(moment) if millis else moment.isoformat(" ", "seconds")


def clock_time(moment: datetime) -> str:
    """`15:04:05.678`."""
    return moment.strftime("%H:%M:%S.%f")[:-3]


def outcome_cell(attempt: Attempt) -> Cell:
    """What an attempt came to; empty while it runs."""
    if not attempt.HasField("result"):
        return Styled("runs", "cyan")
    outcome = attempt.result.outcome
    name = AttemptOutcome.Name(outcome).removeprefix("ATTEMPT_OUTCOME_")
    accepted = outcome == AttemptOutcome.ATTEMPT_OUTCOME_ACCEPTED
    return Styled(name, "green" if accepted else "red")
