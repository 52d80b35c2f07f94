"""What SendGrid's answers mean; the table stands in `sendgrid.py`.

An error's body is `{"errors": [{"message": …, "field": …, "help": …}]}`; `field` is null or a path
such as `personalizations.0.to.0.email`.

The channel as a whole (`of_channel`) is what 401, 403 and 429 speak of: the key and its rates are
every mail's. But a 403 with a field is about something in this request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from mailgrpc.core.delivery import Cause, Outcome, Result, result_text

LONGEST_WAIT = timedelta(days=1)

_OF_CHANNEL = frozenset({401, 403, 429})

_BY_STATUS = {
    202: (Outcome.ACCEPTED, Cause.UNSPECIFIED),
    400: (Outcome.REJECTED, Cause.CONTENT),
    401: (Outcome.DEFERRED, Cause.CREDENTIALS),
    403: (Outcome.DEFERRED, Cause.CREDENTIALS),
    408: (Outcome.DEFERRED, Cause.TIMEOUT),
    413: (Outcome.REJECTED, Cause.TOO_LARGE),
    429: (Outcome.DEFERRED, Cause.RATE_LIMITED),
}

_REPEAT_ELSEWHERE = frozenset({307, 308})
"""RFC 9110, 15.4.8 and 15.4.9: whoever follows says the same POST again at another place. A server
that had taken the mail would have it sent twice by everybody who does. The other redirects may be
followed by GET: 303 is even the answer to a POST that was carried out."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer. The status is what counts; the body may be cut short."""

    status: int
    headers: Mapping[str, str]  # found whatever the case of their names
    body: bytes

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The errors that the body tells; none where it is not of SendGrid's form."""
        try:
            body = json.loads(self.body)
        except ValueError:
            return []
        errors = body.get("errors") if isinstance(body, dict) else None
        errors = errors if isinstance(errors, list) else []
        return [error for error in errors if isinstance(error, dict)]

    @property
    def fields(self) -> list[str]:
        """The field of each error, empty where it names none."""
        return [str(error.get("field") or "") for error in self.errors]


def result_of(answer: Answer) -> Result:
    """The result for all recipients of the request."""
    status = answer.status
    is_refusal = 400 <= status < 500 or status in _REPEAT_ELSEWHERE
    fallback = Outcome.DEFERRED if is_refusal else Outcome.UNKNOWN
    outcome, cause = _BY_STATUS.get(status, (fallback, Cause.PROVIDER))
    fields = answer.fields
    if status == 403 and any(map(_is_sender, fields)):
        outcome, cause = Outcome.REJECTED, Cause.SENDER
    if status == 400 and fields:
        cause = _cause_of_fields(fields)
    return Result(
        outcome,
        cause,
        status_code=status,
        text="" if status == 202 else error_text(answer),
        provider_message_id=result_text(answer.headers.get("X-Message-Id", ""))[:128],
        retry_after=retry_after(answer) if outcome is Outcome.DEFERRED else None,
        of_channel=status in _OF_CHANNEL and not (status == 403 and any(fields)),
    )


def concerns_recipients(answer: Answer) -> bool:
    """Whether a refusal may be about some of the recipients only."""
    fields = answer.fields
    return not fields or any(not f or f.startswith("personalizations") for f in fields)


def error_text(answer: Answer) -> str:
    """SendGrid's words, or the first of whatever else came, cleaned."""
    messages = []
    for error, field in zip(answer.errors, answer.fields, strict=True):
        message = str(error.get("message"))
        messages.append(f"{field}: {message}" if field else message)
    return result_text("; ".join(messages) or answer.body[:1024].decode("utf-8", "replace"))


def retry_after(answer: Answer) -> timedelta | None:
    """How long to wait: Retry-After (seconds or a date), else X-RateLimit-Reset (Unix time)."""
    after = answer.headers.get("Retry-After", "").strip()
    reset = answer.headers.get("X-RateLimit-Reset", "").strip()
    try:
        if after.isdecimal():
            wait = float(after)
        elif after:
            wait = parsedate_to_datetime(after).timestamp() - time.time()
        elif reset:
            wait = float(reset) - time.time()
        else:
            return None
        return timedelta(seconds=min(max(0.0, wait), LONGEST_WAIT.total_seconds()))
    except (ValueError, OverflowError):
        return None


def _is_sender(field: str) -> bool:
    return field == "from" or field.startswith("from.")


def _cause_of_fields(fields: list[str]) -> Cause:
    """Whom a 400 is about, where all its errors agree."""
    if all(map(_is_sender, fields)):
        return Cause.SENDER
    if all(field.startswith("personalizations") and ".to" in field for field in fields):
        return Cause.BAD_ADDRESS
    return Cause.CONTENT
