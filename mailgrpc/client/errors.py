"""What a call can end in, as one tree.

    MailError                      a call failed: `code`, `reason`, `text`, `violations`
    ├── InvalidRequestError        INVALID_ARGUMENT; each wrong field stands in `violations`
    ├── MessageNotFoundError       NOT_FOUND
    ├── RequestIdMismatchError     ALREADY_EXISTS: the request_id was used for another request
    ├── PreconditionError          FAILED_PRECONDITION: the state of the message forbids it
    ├── ResumeTokenExpiredError    OUT_OF_RANGE: events were missed, take a new snapshot
    ├── AccessDeniedError          UNAUTHENTICATED, PERMISSION_DENIED
    ├── ExhaustedError             RESOURCE_EXHAUSTED: a queue, a rate or a size
    ├── UnavailableError           UNAVAILABLE, DEADLINE_EXCEEDED: it was done or it was not
    └── NotEndedError              the wait for a message's end is over (a TimeoutError, too)

A class stands for a status; what exactly is wrong is `reason`, the name of an ErrorReason of the
contract without its prefix. A newer server may send reasons that this client does not know, so it
is a text. It is empty where the answer did not come from mailgrpc: from a proxy, or from nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from mailgrpc.errors import MailgrpcError
from mailgrpc.v1.delivery_pb2 import MessageStatus
from mailgrpc.v1.errors_pb2 import ErrorReason, ItemError

DOMAIN = "mailgrpc"
Trailers: TypeAlias = Iterable[tuple[str, Any]]
_DETAILS = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class Violation:
    """One field of a request that is wrong; `field` is its path, e.g. `message.to[2].address`."""

    field: str
    reason: str
    description: str


class MailError(MailgrpcError):
    """A call failed. `retry_after_s` is when the server asked to be called again, in seconds."""

    def __init__(
        self,
        code: grpc.StatusCode,
        text: str,
        *,
        reason: str = "",
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.reason = reason
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        head = f"{self.code.name} {self.reason}".rstrip()
        return f"{head}: {self.text}" if self.text else head


class InvalidRequestError(MailError):
    """One or more fields are wrong: see `violations`."""


class MessageNotFoundError(MailError):
    """No such message in this project, or it was removed."""


class RequestIdMismatchError(MailError):
    """The request_id was used before, for a different request."""


class PreconditionError(MailError):
    """The state of what was named forbids what was asked."""


class ResumeTokenExpiredError(MailError):
    """The token points at history that is gone: begin again with a snapshot."""


class AccessDeniedError(MailError):
    """No API key, an unknown one, or one that may not do this."""


class ExhaustedError(MailError):
    """A queue is full, a rate too high or a request too large."""


class UnavailableError(MailError):
    """Nobody answered, or not in time.

    The request was carried out or it was not: repeating it with the same request_id settles that.
    """


class NotEndedError(UnavailableError, TimeoutError):
    """A message has not ended within the time; `status` is how it stood."""

    def __init__(self, status: MessageStatus, waited_s: float) -> None:
        text = f"{status.message_id} has not ended within {waited_s:g} s"
        super().__init__(grpc.StatusCode.DEADLINE_EXCEEDED, text)
        self.status = status


_CLASSES: dict[grpc.StatusCode, type[MailError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: MessageNotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: RequestIdMismatchError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.OUT_OF_RANGE: ResumeTokenExpiredError,
    grpc.StatusCode.UNAUTHENTICATED: AccessDeniedError,
    grpc.StatusCode.PERMISSION_DENIED: AccessDeniedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: UnavailableError,
}


def error_of(code: grpc.StatusCode) -> type[MailError]:
    """The class that stands for a status."""
    return _CLASSES.get(code, MailError)


def error_from_call(error: grpc.RpcError) -> MailError:
    """The error behind what a stub raised, blocking or asyncio, with the details it carries."""
    call: Any = error  # each of the two stubs has a class of its own, with these methods
    code = call.code() or grpc.StatusCode.UNKNOWN
    reason, violations, retry_after_s = _read_details(call.trailing_metadata() or ())
    return error_of(code)(
        code,
        call.details() or "",
        reason=reason,
        violations=violations,
        retry_after_s=retry_after_s,
    )


def error_from_item(item: ItemError) -> MailError:
    """The error that a call about one item of an answer about many would have ended in."""
    code = _CODES.get(item.code, grpc.StatusCode.UNKNOWN)
    violations = [Violation(v.field, _name(v.reason), v.description) for v in item.violations]
    return error_of(code)(code, item.description, reason=_name(item.reason), violations=violations)


def _read_details(trailers: Trailers) -> tuple[str, list[Violation], float | None]:
    """(reason, violations, retry after) out of the google.rpc details in the trailers."""
    reason, violations, retry_after_s = "", list[Violation](), None
    for detail in _details(trailers):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason = info.reason if info.domain == DOMAIN else ""
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations = [Violation(v.field, v.reason, v.description) for v in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    return reason, violations, retry_after_s


def _details(trailers: Trailers) -> Sequence[AnyMessage]:
    for key, value in trailers:
        if key == _DETAILS:
            try:
                details: Sequence[AnyMessage] = status_pb2.Status.FromString(value).details
                return details
            except DecodeError:  # a proxy's own idea of details: the status stands without them
                return ()
    return ()


def _name(reason: int) -> str:
    try:
        return ErrorReason.Name(reason).removeprefix("ERROR_REASON_")  # type: ignore[arg-type]
    except ValueError:
        return str(reason)
