"""The errors that mailgrpc raises, as one tree.

    MailgrpcError
    ├── SettingsError            a setting is wrong; its text names the setting and the mend
    ├── SchemaError              the database is not at the schema version of this program
    ├── StoreUnavailable         PostgreSQL cannot be asked now; nothing is known to be half done
    ├── EmbeddedError            PostgreSQL, Valkey or the inbox of `mailgrpc up` did not start
    └── RequestError             a caller's request cannot be carried out; becomes a gRPC status
        ├── InvalidRequest       one or more fields are wrong, each named in a Violation
        ├── NotFound
        ├── RequestIdMismatch    the request_id is known, with another request
        ├── Precondition         the state of what was named forbids it
        ├── TokenExpired         the resume token points at history that is gone
        ├── Unauthenticated
        ├── PermissionDenied
        ├── Exhausted            a queue, a rate or a size; carries when to come back
        ├── Unavailable          the store or this server, for now; carries when to come back
        └── NotImplementedYet

A RequestError carries a Reason. The number of a Reason is the ErrorReason of the contract and
decides the status code (`server/interceptors.py`); tests hold the two enums together.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import timedelta


class Reason(enum.IntEnum):
    """Why a request was refused; numbers and names are those of `ErrorReason` in the contract."""

    UNSPECIFIED = 0
    REQUIRED = 1
    TOO_LONG = 2
    OUT_OF_RANGE = 3
    CONTROL_CHARACTER = 4
    INVALID_ADDRESS = 5
    TEST_ADDRESS = 6
    DUPLICATE_RECIPIENT = 7
    TOO_MANY = 8
    RESERVED_FLAG = 9
    ZERO_FLAGS = 10
    UNKNOWN_CATEGORY = 11
    UNKNOWN_CHANNEL = 12
    RESERVED_HEADER = 13
    INVALID_SCHEDULE = 14
    INVALID_TOKEN = 15
    UNKNOWN_FIELD = 16
    FILTER_TOO_WIDE = 17
    MESSAGE_NOT_FOUND = 30
    REQUEST_ID_MISMATCH = 31
    MESSAGE_SENDING = 32
    NOT_RESENDABLE = 33
    DUPLICATE_RISK = 34
    STILL_SUPPRESSED = 35
    CONTENT_ERASED = 36
    RESUME_TOKEN_EXPIRED = 37
    KEY_MISSING = 50
    KEY_INVALID = 51
    SCOPE_MISSING = 52
    SENDER_NOT_ALLOWED = 53
    RATE_LIMITED = 60
    QUEUE_FULL = 61
    TOO_MANY_STREAMS = 62
    REQUEST_TOO_LARGE = 63
    STORE_UNAVAILABLE = 70
    SHUTTING_DOWN = 71
    NOT_IMPLEMENTED = 72
    INTERNAL = 73


@dataclass(frozen=True, slots=True)
class Violation:
    """One field of a request that is wrong.

    `field` is the path as the caller wrote it, e.g. `message.to[2].address`.
    """

    field: str
    reason: Reason
    description: str


class MailgrpcError(Exception):
    """The root of the tree."""


class SettingsError(MailgrpcError):
    """A setting is wrong, missing or unknown."""


class SchemaError(MailgrpcError):
    """The database is older or newer than this program."""


class StoreUnavailable(MailgrpcError):
    """PostgreSQL cannot be asked now."""


class EmbeddedError(MailgrpcError):
    """A server of the embedded default did not start or ended by itself."""


class RequestError(MailgrpcError):
    """A caller's request cannot be carried out; `text` is meant for that caller."""

    def __init__(
        self,
        reason: Reason,
        text: str,
        *,
        violations: tuple[Violation, ...] = (),
        retry_after: timedelta | None = None,
        quota: str | None = None,
    ) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text
        self.violations = violations
        self.retry_after = retry_after
        self.quota = quota


class InvalidRequest(RequestError):
    """One or more fields are wrong. The reason is that of the first violation."""

    def __init__(self, *violations: Violation) -> None:
        first = violations[0]
        text = f"{first.field}: {first.description}"
        if len(violations) > 1:
            text += f" (and {len(violations) - 1} more)"
        super().__init__(first.reason, text, violations=violations)


class NotFound(RequestError):
    """No such message in the caller's project."""

    def __init__(self, text: str) -> None:
        super().__init__(Reason.MESSAGE_NOT_FOUND, text)


class RequestIdMismatch(RequestError):
    """The request_id was used before, for another request."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            Reason.REQUEST_ID_MISMATCH,
            f"request_id {request_id!r} was used for a different request",
        )


class Precondition(RequestError):
    """The state of the message or delivery forbids what was asked."""


class TokenExpired(RequestError):
    """The resume token points at history that no longer exists here."""

    def __init__(self, text: str) -> None:
        super().__init__(Reason.RESUME_TOKEN_EXPIRED, text)


class Unauthenticated(RequestError):
    """No API key, or none that is known."""


class PermissionDenied(RequestError):
    """The API key may not do this."""


class Exhausted(RequestError):
    """A queue, rate or size is at its limit."""


class Unavailable(RequestError):
    """The store or this server cannot answer now; the same call later may succeed."""


class NotImplementedYet(RequestError):
    """A method of the contract that this version does not serve."""

    def __init__(self, method: str) -> None:
        super().__init__(Reason.NOT_IMPLEMENTED, f"{method} is not implemented by this server")
