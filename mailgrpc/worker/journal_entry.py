"""A result as bytes: what `record_outcomes` needs of it, and nothing of the mail.

A list whose first element is the number of this form. A later version that needs another form
reads this one too: a journal may be older than the program that finds it.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgpack

from mailgrpc.core.delivery import Cause, Outcome, Result, State, Step, WaitReason
from mailgrpc.db.deliveries import Recorded

FORM = 1
MOST_BYTES = 2040  # what a slot holds
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_TEXT_CHARACTERS = 256
_PACKER = msgpack.Packer(unicode_errors="surrogatepass")  # one is made for each call of packb


def pack(recorded: Recorded) -> bytes:
    """The entry, at most MOST_BYTES; the provider's words are cut where they are longer."""
    entry = _packed(recorded)
    if len(entry) <= MOST_BYTES:
        return entry
    result = recorded.result
    short = replace(
        result,
        text=result.text[:_TEXT_CHARACTERS],
        provider_message_id=result.provider_message_id[:_TEXT_CHARACTERS],
        enhanced_code=result.enhanced_code[:_TEXT_CHARACTERS],
    )
    entry = _packed(replace(recorded, result=short))
    if len(entry) > MOST_BYTES:
        raise ValueError(f"an entry of {len(entry)} bytes")
    return entry


def _packed(r: Recorded) -> bytes:
    result, step = r.result, r.step
    return bytes(
        _PACKER.pack(
            [
                FORM,
                r.delivery_id.bytes,
                r.attempt_id.bytes,
                r.number,
                r.call_id.bytes,
                r.channel,
                _of_time(r.started_at),
                r.provider,
                _of_time(r.ended_at),
                int(result.outcome),
                int(result.cause),
                result.status_code,
                result.enhanced_code,
                result.text,
                result.provider_message_id,
                None if result.retry_after is None else result.retry_after // _MICROSECOND,
                int(step.state),
                step.possibly_sent,
                None if step.due_at is None else _of_time(step.due_at),
                int(step.wait_reason),
                step.spares,
            ]
        )
    )


def unpack(entry: bytes) -> Recorded:
    """The result of an entry. Raises ValueError where it is none of a form that is known."""
    try:
        form, *fields = msgpack.unpackb(entry, unicode_errors="surrogatepass")
        if form != FORM:
            raise ValueError(f"an entry of form {form}")
        return _recorded(*fields)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"not an entry: {error}") from error


def _recorded(
    delivery_id: bytes,
    attempt_id: bytes,
    number: int,
    call_id: bytes,
    channel: str,
    started_at: int,
    provider: str,
    ended_at: int,
    outcome: int,
    cause: int,
    status_code: int,
    enhanced_code: str,
    text: str,
    provider_message_id: str,
    retry_after: int | None,
    *step: Any,
) -> Recorded:
    state, possibly_sent, due_at, wait_reason, spares = step
    return Recorded(
        uuid.UUID(bytes=delivery_id),
        uuid.UUID(bytes=attempt_id),
        number,
        uuid.UUID(bytes=call_id),
        channel,
        _time(started_at),
        provider,
        _time(ended_at),
        Result(
            Outcome(outcome),
            Cause(cause),
            status_code,
            enhanced_code,
            text,
            provider_message_id,
            None if retry_after is None else retry_after * _MICROSECOND,
        ),
        Step(
            State(state),
            possibly_sent,
            None if due_at is None else _time(due_at),
            WaitReason(wait_reason),
            spares,
        ),
    )


def _of_time(moment: datetime) -> int:
    """Microseconds since 1970, exactly: a float would round them."""
    return (moment - _EPOCH) // _MICROSECOND


def _time(microseconds: int) -> datetime:
    return _EPOCH + microseconds * _MICROSECOND
