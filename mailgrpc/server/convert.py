"""Where protobuf meets the domain: the only file that knows both.

Inbound, what the caller wrote is carried over as it is, good or bad; `core/shape.py` judges it.
Only what the domain cannot even hold (a broken timestamp, an unknown id) is refused here. Outbound,
a domain object is always whole.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TypeVar

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from mailgrpc.core import event as domain
from mailgrpc.core.delivery import Delivery, Result, Role, State
from mailgrpc.core.event import Attempt, EventKind, Filter, MessageStatus
from mailgrpc.core.ids import (
    CALL,
    DELIVERY,
    EVENT,
    MESSAGE,
    from_text,
    message_of,
    to_text,
)
from mailgrpc.core.message import (
    Attachment,
    DeliveryOptions,
    Header,
    Mailbox,
    MailMessage,
    Recipient,
    RetryWishes,
    Submission,
)
from mailgrpc.errors import InvalidRequest, Reason, RequestError, Violation
from mailgrpc.v1 import (
    delivery_pb2,
    errors_pb2,
    event_pb2,
    mail_service_pb2,
    message_pb2,
)

_T = TypeVar("_T")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_SECONDS = 253402300799  # 9999-12-31T23:59:59Z


def submission(request: mail_service_pb2.EnqueueRequest) -> Submission:
    """What one Enqueue said. Raises InvalidRequest for what cannot be held."""
    if not request.HasField("message"):
        raise InvalidRequest(Violation("message", Reason.REQUIRED, "a message is needed"))
    return Submission(
        message=_message(request.message),
        options=_options(request.options) if request.HasField("options") else _NO_OPTIONS,
        request_id=request.request_id,
        validate_only=request.validate_only,
    )


_NO_OPTIONS = DeliveryOptions()


# More of a list than its limit (100 at the most) is refused by its length: what lies behind is not
# worth an object each, millions of which fit into a request.
_LOOKED_AT = 101


def _message(m: message_pb2.MailMessage) -> MailMessage:
    # Most messages have one recipient and little else: what is not there costs one look.
    recipients = [Recipient(r.address, r.name, Role.TO) for r in _first(m.to)]
    if cc := m.cc:
        recipients += [Recipient(r.address, r.name, Role.CC) for r in _first(cc)]
    if bcc := m.bcc:
        recipients += [Recipient(r.address, r.name, Role.BCC) for r in _first(bcc)]
    args = m.custom_args
    return MailMessage(
        _mailbox(m.sender) if m.HasField("sender") else None,
        tuple(recipients),
        m.subject,
        m.text,
        m.html,
        tuple([_mailbox(r) for r in _first(reply_to)]) if (reply_to := m.reply_to) else (),
        tuple([Header(h.name, h.value) for h in _first(headers)]) if (headers := m.headers) else (),
        tuple(
            [
                Attachment(a.filename, a.data, a.content_type, a.content_id)
                for a in _first(attachments)
            ]
        )
        if (attachments := m.attachments)
        else (),
        tuple(_first(tags)) if (tags := m.tags) else (),
        tuple(_first(categories)) if (categories := m.categories) else (),
        m.flags,
        {k: args[k] for k in (args if len(args) <= _LOOKED_AT else islice(args, _LOOKED_AT))},
        m.correlation_id,
    )


def _first(items: Sequence[_T]) -> Sequence[_T]:
    return items if len(items) <= _LOOKED_AT else items[:_LOOKED_AT]


def _mailbox(m: message_pb2.Mailbox) -> Mailbox:
    return Mailbox(m.address, m.name)


def _options(o: message_pb2.DeliveryOptions) -> DeliveryOptions:
    return DeliveryOptions(
        mode=o.mode,
        priority=o.priority,
        retry=_retry(o.retry) if o.HasField("retry") else None,
        send_at=moment("options.send_at", o.send_at) if o.HasField("send_at") else None,
        expire_at=moment("options.expire_at", o.expire_at) if o.HasField("expire_at") else None,
        channel=o.channel,
        dedupe_window=duration("options.dedupe_window", o.dedupe_window)
        if o.HasField("dedupe_window")
        else None,
    )


def _retry(r: message_pb2.RetryPolicy) -> RetryWishes:
    return RetryWishes(
        max_attempts=r.max_attempts,
        initial_backoff=duration("options.retry.initial_backoff", r.initial_backoff)
        if r.HasField("initial_backoff")
        else None,
        max_backoff=duration("options.retry.max_backoff", r.max_backoff)
        if r.HasField("max_backoff")
        else None,
        multiplier=r.multiplier,
    )


def moment(field: str, value: Timestamp) -> datetime:
    """A point in time, to the microsecond. Raises InvalidRequest outside the years 1 to 9999."""
    if not (-62135596800 <= value.seconds <= _MAX_SECONDS and 0 <= value.nanos < 1_000_000_000):
        raise InvalidRequest(Violation(field, Reason.OUT_OF_RANGE, "not a valid timestamp"))
    return _EPOCH + timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)


def duration(field: str, value: Duration) -> timedelta:
    """A span of time, to the microsecond. Raises InvalidRequest for more than 10,000 years."""
    signs_agree = value.seconds * value.nanos >= 0
    if abs(value.seconds) > 315576000000 or abs(value.nanos) > 999_999_999 or not signs_agree:
        raise InvalidRequest(Violation(field, Reason.OUT_OF_RANGE, "not a valid duration"))
    return timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)


def message_filter(field: str, f: delivery_pb2.MessageFilter) -> Filter:
    """A filter as asked; ids that nobody was given are kept out of the set, and match nothing.

    Raises InvalidRequest. Recipients are normalised by the caller of this function.
    """
    ids = [from_text(MESSAGE, text) for text in f.message_ids]
    for index, found in enumerate(ids):
        if found is None:
            raise InvalidRequest(
                Violation(f"{field}.message_ids[{index}]", Reason.OUT_OF_RANGE, "not a message id")
            )
    states = []
    for index, number in enumerate(f.states):
        if number not in _STATES:
            raise InvalidRequest(
                Violation(f"{field}.states[{index}]", Reason.OUT_OF_RANGE, "not a state")
            )
        states.append(State(number))
    return Filter(
        message_ids=frozenset(i for i in ids if i is not None),
        correlation_ids=frozenset(f.correlation_ids),
        recipients=frozenset(f.recipients),
        tags=frozenset(f.tags),
        states=frozenset(states),
        created_after=moment(f"{field}.created_after", f.created_after)
        if f.HasField("created_after")
        else None,
        created_before=moment(f"{field}.created_before", f.created_before)
        if f.HasField("created_before")
        else None,
    )


_STATES = frozenset(int(state) for state in State)


def refuse_unknown_fields(request: Message) -> int:
    """Raise InvalidRequest for the first field that this version does not know; else its bytes.

    Two sizes are compared before anything is walked: the walk is for requests that are refused.
    """
    data = request.SerializeToString()
    request.DiscardUnknownFields()
    if request.ByteSize() != len(data):
        request.ParseFromString(data)
        if (path := _walk_unknown(request, "")) is not None:
            raise InvalidRequest(unknown_violation(path))
    return len(data)


def unknown_violation(path: str) -> Violation:
    """That a field of the request is not known here."""
    return Violation(
        path, Reason.UNKNOWN_FIELD, "this server does not know this field and will not ignore it"
    )


def unknown_number(request: Message) -> str | None:
    """The number of a field of `request` itself that this version does not know."""
    for unknown in UnknownFieldSet(request):  # type: ignore[attr-defined]  # by index
        return str(unknown.field_number)
    return None


def _walk_unknown(request: Message, prefix: str) -> str | None:
    if (number := unknown_number(request)) is not None:
        return prefix + number
    for field, value in request.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        parts = (
            [(f"{prefix}{field.name}[{i}].", part) for i, part in enumerate(value)]
            if field.is_repeated
            else [(f"{prefix}{field.name}.", value)]
        )
        for path, part in parts:
            if (found := _walk_unknown(part, path)) is not None:
                return found
    return None


# Outbound


def timestamp(value: datetime) -> Timestamp:
    """A point in time, exactly."""
    since = value - _EPOCH
    return Timestamp(seconds=since.days * 86400 + since.seconds, nanos=since.microseconds * 1000)


def _span(value: timedelta) -> Duration:
    return Duration(seconds=value.days * 86400 + value.seconds, nanos=value.microseconds * 1000)


def _result(r: Result) -> delivery_pb2.AttemptResult:
    return delivery_pb2.AttemptResult(
        outcome=int(r.outcome),  # type: ignore[arg-type]
        cause=int(r.cause),  # type: ignore[arg-type]
        status_code=r.status_code,
        enhanced_code=r.enhanced_code,
        text=r.text,
        provider_message_id=r.provider_message_id,
        retry_after=None if r.retry_after is None else _span(r.retry_after),
    )


def delivery(d: Delivery) -> delivery_pb2.Delivery:
    """A delivery as callers see it."""
    return delivery_pb2.Delivery(
        delivery_id=to_text(DELIVERY, d.delivery_id),
        message_id=to_text(MESSAGE, message_of(d.delivery_id)),
        recipient=d.recipient,
        state=int(d.state),  # type: ignore[arg-type]
        state_since=timestamp(d.state_since),
        wait_reason=int(d.wait_reason),  # type: ignore[arg-type]
        due_at=None if d.due_at is None else timestamp(d.due_at),
        attempt_count=d.attempt_count,
        last_result=None if d.last_result is None else _result(d.last_result),
        suppression_reason=int(d.suppression_reason),  # type: ignore[arg-type]
        duplicate_of_message_id="" if d.duplicate_of is None else to_text(MESSAGE, d.duplicate_of),
        possibly_sent=d.possibly_sent,
        version=d.version,
        role=int(d.role),  # type: ignore[arg-type]
    )


def attempt(a: Attempt) -> delivery_pb2.Attempt:
    """An attempt as callers see it."""
    return delivery_pb2.Attempt(
        delivery_id=to_text(DELIVERY, a.delivery_id),
        number=a.number,
        call_id=to_text(CALL, a.call_id),
        channel=a.channel,
        provider=a.provider,
        started_at=timestamp(a.started_at),
        ended_at=None if a.ended_at is None else timestamp(a.ended_at),
        result=None if a.result is None else _result(a.result),
    )


def status(s: MessageStatus) -> delivery_pb2.MessageStatus:
    """A message's state, with its deliveries."""
    return delivery_pb2.MessageStatus(
        message_id=to_text(MESSAGE, s.message_id),
        request_id=s.request_id,
        correlation_id=s.labels.correlation_id,
        state=int(s.state),  # type: ignore[arg-type]
        ended=s.ended,
        counts=[
            delivery_pb2.StateCount(state=int(state), count=count)  # type: ignore[arg-type]
            for state, count in sorted(s.counts.items())
        ],
        deliveries=[delivery(d) for d in s.deliveries],
        subject=s.subject,
        tags=s.labels.tags,
        created_at=timestamp(s.created_at),
        updated_at=timestamp(s.updated_at),
    )


def event(e: domain.Event) -> event_pb2.Event:
    """A fact, the same in the stream and in lists."""
    shown = event_pb2.Event(
        event_id=to_text(EVENT, e.event_id),
        kind=int(e.kind),  # type: ignore[arg-type]
        occurred_at=timestamp(e.occurred_at),
        message_id="" if e.message_id is None else to_text(MESSAGE, e.message_id),
        correlation_id=e.labels.correlation_id,
        custom_args=e.labels.custom_args,
        tags=e.labels.tags,
        actor=e.actor,
    )
    if e.delivery is not None:
        changed = shown.state_changed
        changed.delivery.CopyFrom(delivery(e.delivery))
        shown.delivery_id = changed.delivery.delivery_id
        shown.recipient = e.delivery.recipient
        if e.old_state is not None:
            changed.old_state = int(e.old_state)  # type: ignore[assignment]
        if e.attempt is not None:
            changed.attempt.CopyFrom(attempt(e.attempt))
    elif e.kind is EventKind.MESSAGE_REMOVED:
        shown.message_removed.SetInParent()
    elif e.kind is EventKind.MESSAGES_CLEARED and e.payload is not None:
        cleared = shown.messages_cleared
        cleared.count = e.payload["count"]
        json_format.ParseDict(e.payload["filter"], cleared.filter, ignore_unknown_fields=True)
    return shown


def message(m: MailMessage, *, with_data: bool) -> message_pb2.MailMessage:
    """The content as it was handed over; without data the attachments are named only."""
    lists: dict[Role, list[message_pb2.Recipient]] = {role: [] for role in Role}
    for r in m.recipients:
        lists[r.role].append(message_pb2.Recipient(address=r.address, name=r.name))
    return message_pb2.MailMessage(
        sender=None if m.sender is None else _mailbox_out(m.sender),
        to=lists[Role.TO],
        cc=lists[Role.CC],
        bcc=lists[Role.BCC],
        reply_to=[_mailbox_out(r) for r in m.reply_to],
        subject=m.subject,
        text=m.text,
        html=m.html,
        headers=[message_pb2.Header(name=h.name, value=h.value) for h in m.headers],
        attachments=[
            message_pb2.Attachment(
                filename=a.filename,
                content_type=a.content_type,
                content_id=a.content_id,
                data=a.data if with_data else b"",
            )
            for a in m.attachments
        ],
        tags=m.tags,
        categories=m.categories,
        flags=m.flags,
        custom_args=m.custom_args,
        correlation_id=m.correlation_id,
    )


def _mailbox_out(m: Mailbox) -> message_pb2.Mailbox:
    return message_pb2.Mailbox(address=m.address, name=m.name)


def options(o: DeliveryOptions) -> message_pb2.DeliveryOptions:
    """The options as they were given; what was left out stays out."""
    shown = message_pb2.DeliveryOptions(
        mode=o.mode,  # type: ignore[arg-type]
        priority=o.priority,  # type: ignore[arg-type]
        channel=o.channel,
        send_at=None if o.send_at is None else timestamp(o.send_at),
        expire_at=None if o.expire_at is None else timestamp(o.expire_at),
        dedupe_window=None if o.dedupe_window is None else _span(o.dedupe_window),
    )
    if (r := o.retry) is not None:
        shown.retry.max_attempts = r.max_attempts
        shown.retry.multiplier = r.multiplier
        if r.initial_backoff is not None:
            shown.retry.initial_backoff.CopyFrom(_span(r.initial_backoff))
        if r.max_backoff is not None:
            shown.retry.max_backoff.CopyFrom(_span(r.max_backoff))
        shown.retry.SetInParent()
    return shown


SHOWN_VIOLATIONS = 20
"""More are counted, not listed: details travel in trailers, which are limited."""


def shown_violations(
    violations: Sequence[Violation], most: int = SHOWN_VIOLATIONS
) -> Iterable[Violation]:
    """The first of them, cut to size, and a word about the rest."""
    for v in violations[:most]:
        yield Violation(v.field[:80], v.reason, v.description[:100])
    if (more := len(violations) - most) > 0:
        yield Violation("", violations[most].reason, f"and {more} more")


def item_error(error: RequestError, code: int) -> errors_pb2.ItemError:
    """An error in an answer about many. `code` is the number of the gRPC status."""
    return errors_pb2.ItemError(
        code=code,
        reason=int(error.reason),  # type: ignore[arg-type]
        description=error.text,
        violations=[
            errors_pb2.FieldViolation(
                field=v.field,
                reason=int(v.reason),  # type: ignore[arg-type]
                description=v.description,
            )
            for v in shown_violations(error.violations)
        ],
    )


def message_id(field: str, text: str) -> uuid.UUID | None:
    """The id in a request; None for one that nobody was given, which is then not found."""
    if not text:
        raise InvalidRequest(Violation(field, Reason.REQUIRED, "a message id is needed"))
    return from_text(MESSAGE, text)
