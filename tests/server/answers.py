"""What a refused call says, read as a caller reads it: from the status and its details."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

DETAILS = "grpc-status-details-bin"
_KINDS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.QuotaFailure,
)


@dataclass(frozen=True)
class Refusal:
    """A status with its google.rpc details. `reason` is empty where there are none."""

    code: grpc.StatusCode
    text: str
    reason: str = ""
    violations: tuple[tuple[str, str], ...] = ()  # (field, reason)
    retry_s: float | None = None
    quota: str = ""
    size: int = 0  # bytes of the details


async def refusal_of(call: Awaitable[Any]) -> Refusal:
    """How a call was refused; one that was not fails the test."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return read_refusal(error)
    pytest.fail(f"it was not refused: {answer}")


def read_refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """The parts of an error; asserts that they agree with each other."""
    found = dict(error.trailing_metadata() or ()).get(DETAILS)
    if found is None:
        return Refusal(error.code(), error.details() or "")
    status = status_pb2.Status.FromString(found)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    parts: dict[Any, Any] = {}
    for packed in status.details:
        kind = next(k for k in _KINDS if packed.Is(k.DESCRIPTOR))
        assert packed.Unpack(parts.setdefault(kind, kind()))
    info, bad, retry, quota = (parts.get(kind) for kind in _KINDS)
    assert info.domain == "mailgrpc"
    assert info.metadata["help"]
    return Refusal(
        code=error.code(),
        text=error.details() or "",
        reason=info.reason,
        violations=tuple((v.field, v.reason) for v in bad.field_violations) if bad else (),
        retry_s=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
        quota=quota.violations[0].subject if quota else "",
        size=len(found),
    )
