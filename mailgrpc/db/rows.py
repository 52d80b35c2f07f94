"""Rows to domain objects: the one place that knows the columns of a delivery and of a result.

Numbers become members of the domain's enums by a look into a table, which is several times faster
than asking the enum; asyncpg gives times in UTC.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from mailgrpc.core.delivery import (
    Cause,
    Delivery,
    Mode,
    Outcome,
    Result,
    Role,
    State,
    SuppressionReason,
    WaitReason,
)

RESULT_COLUMNS = """a.provider, a.ended_at, a.outcome, a.cause, a.status_code, a.enhanced_code,
    a.text, a.provider_message_id, a.retry_after_ms"""
"""Of the attempts that ended (alias a); all NULL where there is none."""

LAST_ATTEMPT = "LEFT JOIN attempts a ON a.delivery_id = d.id AND a.number = d.attempt_count"
"""A delivery (alias d) with its last attempt; none while it runs."""

ROLES = {int(m): m for m in Role}
STATES = {int(m): m for m in State}
WAIT_REASONS = {int(m): m for m in WaitReason}
SUPPRESSION_REASONS = {int(m): m for m in SuppressionReason}
_MODES = {int(m): m for m in Mode}
_OUTCOMES = {int(m): m for m in Outcome}
_CAUSES = {int(m): m for m in Cause}

Row = Any
"""A row of the driver, or anything that answers `row[column]`."""


def delivery_of(row: Row, result: Result | None = None) -> Delivery:
    """A row of `deliveries` (all columns) as the domain sees it."""
    return Delivery(
        delivery_id=row["id"],
        recipient=row["recipient"],
        role=ROLES[row["role"]],
        state=STATES[row["state"]],
        state_since=row["state_since"],
        version=row["version"],
        mode=_MODES[row["mode"]],
        flags=row["flags"],
        attempt_count=row["attempt_count"],
        spared=row["spared"],
        due_at=row["due_at"],
        wait_reason=WAIT_REASONS[row["wait_reason"]],
        expire_at=row["expire_at"],
        forced=row["forced"],
        possibly_sent=row["possibly_sent"],
        suppression_reason=SUPPRESSION_REASONS[row["suppression_reason"]],
        duplicate_of=row["duplicate_of"],
        last_result=result,
    )


def result_of(row: Row) -> Result | None:
    """The result in a row that has the columns of one; None where it has none."""
    if row["outcome"] is None:
        return None
    retry_after_ms = row["retry_after_ms"]
    return Result(
        outcome=_OUTCOMES[row["outcome"]],
        cause=_CAUSES[row["cause"]],
        status_code=row["status_code"],
        enhanced_code=row["enhanced_code"],
        text=row["text"],
        provider_message_id=row["provider_message_id"],
        retry_after=None if retry_after_ms is None else timedelta(milliseconds=retry_after_ms),
    )
