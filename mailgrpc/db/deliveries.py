"""Deliveries: claim, start, record and move. Each is one call of a function in the database.

The order of a delivery's life, and what each call promises:

    claim_due           leases it to a session; changes no state
    start_deliveries    re-reads everything that forbids a send; only what it returns may be sent
    record_outcomes     writes each result to its attempt always, to its delivery where that
                        attempt is the running one, or by the rule on late results
    move_deliveries     everything else that changes a state, from a version that was read
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from mailgrpc.core.delivery import LATE_PROOF, WITHOUT_PROOF, Delivery, Result, Step
from mailgrpc.core.value import value
from mailgrpc.db.engine import Database
from mailgrpc.db.rows import LAST_ATTEMPT, RESULT_COLUMNS, delivery_of, result_of


@value
class Claimed:
    """A delivery under this session's lease.

    `claims` counts this claim, and those since it last waited whose worker ended with them.
    """

    delivery_id: uuid.UUID
    project_id: int
    claims: int


@value
class Claims:
    """A batch.

    Where it is empty, `next_due_in_s` says when something will be due, if anything is: by the clock
    of PostgreSQL, which need not agree with ours. `suspect` is a delivery with which workers have
    died and that was passed over; the next claim is to name it.
    """

    claimed: list[Claimed]
    next_due_in_s: float | None
    suspect: uuid.UUID | None = None


async def claim_due(
    db: Database,
    session_id: int,
    channel: str,
    limit: int,
    after_project: int,
    *,
    epoch: int = 0,
    suspect: uuid.UUID | None = None,
) -> Claims:
    """Lease up to `limit` due deliveries of a channel, or `suspect` alone where it is still due.

    Raises SessionEnded, StoreUnavailable; asyncpg.PostgresError (MG003) once a later epoch has begun
    on this channel: only a claim that was given up can meet that, and nobody waits for it.
    """
    rows = await db.write(
        "SELECT * FROM claim_due($1, $2, $3, $4, $5, $6)",
        session_id,
        channel,
        limit,
        after_project,
        epoch,
        suspect,
    )
    claimed, passed_over = [], None
    for row in rows:
        if row["claims"] is not None:
            claimed.append(Claimed(row["delivery_id"], row["project_id"], row["claims"]))
        else:
            passed_over = row["delivery_id"]
    return Claims(claimed, None if claimed else rows[0]["next_due_in_s"], passed_over)


async def release_claims(db: Database, session_id: int, delivery_ids: Sequence[uuid.UUID]) -> None:
    """Give claimed deliveries back, as if they had not been claimed. Raises StoreUnavailable.

    What has been started meanwhile keeps its lease.
    """
    await db.write("SELECT release_claims($1, false, NULL, $2)", session_id, delivery_ids)


async def drop_bereft(db: Database, session_id: int, delivery_ids: Sequence[uuid.UUID]) -> None:
    """Drop, of these claims, those whose delivery was cleared. Raises StoreUnavailable.

    Both rows are written by one statement, so there is none whose delivery is still to come.
    """
    await db.write(
        """DELETE FROM due q WHERE q.delivery_id = ANY ($2::uuid[]) AND q.session_id = $1
           AND NOT EXISTS (SELECT FROM deliveries d WHERE d.id = q.delivery_id
               AND d.id = ANY ($2::uuid[]))""",
        session_id,
        delivery_ids,
    )


@value
class Starting:
    """A claimed delivery that a worker is about to start, with the ids of its new attempt."""

    delivery_id: uuid.UUID
    attempt_id: uuid.UUID
    call_id: uuid.UUID


@value
class Started:
    """A delivery in SENDING, and its running attempt."""

    delivery: Delivery
    attempt_id: uuid.UUID
    call_id: uuid.UUID
    channel: str
    started_at: datetime


async def start_deliveries(
    db: Database, session_id: int, lane: int, starting: Sequence[Starting], *, epoch: int = 0
) -> list[Started]:
    """Move what was claimed in this epoch to SENDING, each with its new attempt; the commit is in.

    What is not returned is not to be sent: it expired, is suppressed, or is not ours any more.
    After AmbiguousCommit nothing of it may be sent before the same call, with the same attempts and
    epoch, was run again and has answered: it starts nothing twice, and answers what did start. To
    give up instead leaves deliveries in SENDING until the session ends. Raises SessionEnded,
    StoreUnavailable.
    """
    rows = await db.write(
        "SELECT * FROM start_deliveries($1, $2, $3, $4, $5, $6)",
        session_id,
        lane,
        [s.delivery_id for s in starting],
        [s.attempt_id for s in starting],
        [s.call_id for s in starting],
        epoch,
    )
    return [started_of(row) for row in rows]


def started_of(row: Any) -> Started:
    """A row of `deliveries` in SENDING."""
    return Started(
        delivery_of(row),
        row["attempt_id"],
        row["call_id"],
        row["channel"],
        row["attempt_started_at"],
    )


@value
class Recorded:
    """The end of one attempt: what came back, and the step that it means."""

    delivery_id: uuid.UUID
    attempt_id: uuid.UUID
    number: int  # of the attempt, from 1
    call_id: uuid.UUID
    channel: str
    started_at: datetime
    provider: str
    ended_at: datetime
    result: Result
    step: Step

    @classmethod
    def of(
        cls, started: Started, provider: str, ended_at: datetime, result: Result, step: Step
    ) -> Recorded:
        """The end of an attempt that was started here."""
        return cls(
            started.delivery.delivery_id,
            started.attempt_id,
            started.delivery.attempt_count,
            started.call_id,
            started.channel,
            started.started_at,
            provider,
            ended_at,
            result,
            step,
        )


async def record_outcomes(db: Database, lane: int, recorded: Sequence[Recorded]) -> None:
    """Write results, late or not. Each delivery at most once in a call. Raises StoreUnavailable.

    Running it again after AmbiguousCommit is harmless: what an attempt knows already moves nothing.
    """
    await db.write(
        "SELECT record_outcomes($1, $2, $3)",
        lane,
        [_result_row(r) for r in recorded],
        list(WITHOUT_PROOF),
    )


def _result_row(recorded: Recorded) -> tuple[Any, ...]:
    """A result as the type `attempt_result` has it."""
    result, step = recorded.result, recorded.step
    return (
        recorded.delivery_id,
        recorded.attempt_id,
        recorded.number,
        recorded.call_id,
        recorded.channel,
        recorded.provider,
        recorded.started_at,
        recorded.ended_at,
        result.outcome,
        result.cause,
        result.status_code,
        result.enhanced_code,
        result.text,
        result.provider_message_id,
        _milliseconds(result),
        step.state,
        step.possibly_sent,
        step.due_at,
        step.wait_reason,
        step.spares,
        LATE_PROOF.get(result.outcome),
    )


def _milliseconds(result: Result) -> int | None:
    if result.retry_after is None:
        return None
    return min(int(result.retry_after.total_seconds() * 1000), 2**31 - 1)


@value
class Move:
    """A step for a delivery that is not SENDING, decided on what was read of it."""

    delivery: Delivery
    step: Step
    forced: bool = False
    expire_at: datetime | None = None


async def move_deliveries(db: Database, lane: int, actor: str, moves: Sequence[Move]) -> int:
    """Carry out moves; each happens only from the version it was decided on. How many did."""
    rows = await db.write(
        "SELECT id FROM move_deliveries($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        lane,
        actor,
        *_move_columns(moves, with_state=True),
    )
    return len(rows)


async def resend_deliveries(
    db: Database,
    lane: int,
    actor: str,
    *,
    project_id: int,
    request_id: str,
    message_id: uuid.UUID,
    fingerprint: bytes,
    rule: int,
    response: str,
    moves: Sequence[Move],
) -> bool:
    """Queue deliveries once more, and remember the request with its answer: all or nothing.

    Whether it was done: False means that the request_id is known. Raises StaleVersion when a
    delivery changed since it was read.
    """
    [row] = await db.write(
        "SELECT * FROM resend_deliveries($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,$14)",
        lane,
        actor,
        project_id,
        request_id,
        message_id,
        fingerprint,
        rule,
        response,
        *_move_columns(moves, with_state=False),
    )
    return bool(row["won"])


def _move_columns(moves: Sequence[Move], *, with_state: bool) -> list[list[Any]]:
    columns: list[list[Any]] = [
        [m.delivery.delivery_id for m in moves],
        [m.delivery.version for m in moves],
        [m.step.state for m in moves],
        [m.step.due_at for m in moves],
        [m.step.wait_reason for m in moves],
        [m.forced for m in moves],
        [m.step.possibly_sent for m in moves],
        [m.expire_at for m in moves],
    ]
    if not with_state:  # Resend moves to QUEUED, due
        del columns[4], columns[2]
    return columns


async def read_deliveries(
    db: Database, delivery_ids: Sequence[uuid.UUID]
) -> dict[uuid.UUID, Delivery]:
    """The deliveries of these ids, with their last result."""
    rows = await db.fetch(
        f"SELECT d.*, {RESULT_COLUMNS} FROM deliveries d {LAST_ATTEMPT} "  # noqa: S608  constants
        "WHERE d.id = ANY ($1::uuid[])",
        delivery_ids,
    )
    return {row["id"]: delivery_of(row, result_of(row)) for row in rows}


@value
class DuePage:
    """A page of `due`: what of it has expired unclaimed, and where the next one begins."""

    expired: dict[uuid.UUID, datetime]  # delivery -> the expire_at that it was read with
    last: uuid.UUID | None  # None: there is no further page


async def read_expired(db: Database, after: uuid.UUID, limit: int, grace_s: float) -> DuePage:
    """Read the next `limit` rows of `due`, by id, for deliveries that expired `grace_s` ago.

    `scheduled` needs no look: a delivery is due before it expires, so it is in `due` by then.
    """
    page = await db.fetch(
        "SELECT delivery_id, session_id FROM due WHERE delivery_id > $1"
        " ORDER BY delivery_id LIMIT $2",
        after,
        limit,
    )
    rows = await db.fetch(
        """SELECT d.id, d.expire_at FROM deliveries d WHERE d.id = ANY ($1::uuid[]) AND d.state IN (1, 3)
           AND d.expire_at < clock_timestamp() - make_interval(secs => $2)""",
        [row["delivery_id"] for row in page if row["session_id"] is None],
        grace_s,
    )
    last = page[-1]["delivery_id"] if len(page) == limit else None
    return DuePage({row["id"]: row["expire_at"] for row in rows}, last)


async def promote_scheduled(db: Database, limit: int = 2000) -> int:
    """Move what comes due within ten minutes from `scheduled` to `due`. How many."""
    rows = await db.write(
        """WITH soon AS (
               DELETE FROM scheduled WHERE delivery_id IN (
                   SELECT delivery_id FROM scheduled
                   WHERE due_at <= now() + interval '10 minutes'
                   ORDER BY due_at LIMIT $1 FOR UPDATE SKIP LOCKED)
               RETURNING *)
           INSERT INTO due (delivery_id, channel, project_id, priority, due_at)
           SELECT delivery_id, channel, project_id, priority, due_at FROM soon
           ON CONFLICT DO NOTHING RETURNING delivery_id""",
        limit,
    )
    return len(rows)
