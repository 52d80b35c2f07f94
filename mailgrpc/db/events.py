"""The feed's rows: reading a page behind a place, and checking that a place is still this feed's.

A place is a position in each lane. Within a lane events become visible in the order of `seq`
(each writer holds the lane's lock from nextval to commit), so `seq > place` misses none. Over
lanes, `seq` is one sequence and a change of a delivery is decided under its row's lock, so a later
event of it has a higher seq; a page is one statement, hence one snapshot, merged by seq and cut
there: whoever sees an effect has seen its cause.
"""

from __future__ import annotations

from mailgrpc.core.delivery import (
    Delivery,
    Mode,
    Role,
    State,
    SuppressionReason,
    WaitReason,
)
from mailgrpc.core.event import Attempt, Event, EventKind
from mailgrpc.core.place import ORIGIN, Place, Position
from mailgrpc.db.content import unpack_json
from mailgrpc.db.engine import Database
from mailgrpc.db.rows import Row, result_of

LANES = range(16)


async def read_events(
    db: Database, place: Place, limit: int, *, project_id: int | None = None
) -> list[Event]:
    """The next events behind a place, of one project or of all, at most `limit`, without labels.

    With a project the page may skip many rows of others; the caller moves its place by what is
    returned, and to the end it learned from `read_place` when nothing more is.
    """
    rows = await db.fetch(
        """SELECT e.* FROM unnest($1::smallint[], $2::bigint[]) AS p(lane, seq)
           CROSS JOIN LATERAL (
               SELECT * FROM events e WHERE e.lane = p.lane AND e.seq > p.seq
                   AND ($4::integer IS NULL OR e.project_id = $4)
               ORDER BY e.seq LIMIT $3) e
           ORDER BY e.seq LIMIT $3""",
        list(LANES),
        [place.get(lane, ORIGIN).seq for lane in LANES],
        limit,
        project_id,
    )
    return [event_of(row) for row in rows]


async def read_place(db: Database) -> dict[int, Position]:
    """The end of the feed now: the last event of each lane that has any."""
    rows = await db.fetch(
        """SELECT e.lane, e.seq, e.fingerprint FROM unnest($1::smallint[]) AS p(lane)
           CROSS JOIN LATERAL (SELECT * FROM events e WHERE e.lane = p.lane
               ORDER BY e.seq DESC LIMIT 1) e""",
        list(LANES),
    )
    return {row["lane"]: Position(row["seq"], row["fingerprint"]) for row in rows}


async def find_strangers(db: Database, place: Place) -> set[int]:
    """The lanes in which a place is not this feed's: dropped by retention, or of a lost history.

    A lane at its beginning is strange once anything of it was dropped.
    """
    lanes = sorted(set(LANES) | set(place))
    rows = await db.fetch(
        """SELECT p.lane FROM unnest($1::smallint[], $2::bigint[], $3::integer[])
               AS p(lane, seq, fingerprint)
           LEFT JOIN feed_horizon h ON h.lane = p.lane
           LEFT JOIN events e ON e.lane = p.lane AND e.seq = p.seq
           WHERE h.lane IS NULL OR p.seq < h.seq
               -- An event at the horizon itself may be gone; nothing behind it is.
               OR (p.seq > h.seq AND e.fingerprint IS DISTINCT FROM p.fingerprint)""",
        lanes,
        [place.get(lane, ORIGIN).seq for lane in lanes],
        [place.get(lane, ORIGIN).fingerprint for lane in lanes],
    )
    return {row["lane"] for row in rows}


async def drop_events(db: Database, older_than_s: float, limit: int = 5000) -> int:
    """Drop events older than the retention, a bounded number a call. How many were dropped.

    The horizon moves first and in a transaction of its own, so that a reader who checks it after
    a page cannot have read a page with a hole and not know.
    """
    rows = await db.write(
        """WITH cut AS (
               SELECT p.lane, max(e.seq) AS seq FROM unnest($1::smallint[]) AS p(lane)
               CROSS JOIN LATERAL (SELECT e.seq, e.occurred_at FROM events e
                   WHERE e.lane = p.lane ORDER BY e.seq LIMIT $3) e
               WHERE e.occurred_at < clock_timestamp() - make_interval(secs => $2)
               GROUP BY p.lane)
           UPDATE feed_horizon h SET seq = cut.seq FROM cut
           WHERE h.lane = cut.lane AND h.seq < cut.seq RETURNING h.lane""",
        list(LANES),
        older_than_s,
        limit,
    )
    if not rows:
        return 0
    dropped = await db.write(
        """DELETE FROM events e USING feed_horizon h WHERE e.lane = h.lane AND e.seq <= h.seq
           RETURNING 1"""
    )
    return len(dropped)


def event_of(row: Row) -> Event:
    """A row of `events` as the domain sees it, without labels."""
    kind = EventKind(row["kind"])
    delivery = attempt = None
    if kind is EventKind.STATE_CHANGED:
        result = result_of(row)
        delivery = Delivery(
            delivery_id=row["delivery_id"],
            recipient=row["recipient"],
            role=Role(row["role"]),
            state=State(row["state"]),
            state_since=row["occurred_at"],
            version=row["version"],
            mode=Mode.RETRYING,  # not told by events
            attempt_count=row["attempt_count"],
            due_at=row["due_at"],
            wait_reason=WaitReason(row["wait_reason"]),
            possibly_sent=row["possibly_sent"],
            suppression_reason=SuppressionReason(row["suppression_reason"]),
            duplicate_of=row["duplicate_of"],
            last_result=result,
        )
        # Only a start and the end of an attempt are moved by one.
        if row["state"] == State.SENDING or row["old_state"] == State.SENDING:
            attempt = Attempt(
                delivery_id=row["delivery_id"],
                number=row["attempt_count"],
                call_id=row["call_id"],
                channel=row["channel"],
                provider=row["provider"] or "",
                started_at=row["attempt_started_at"],
                ended_at=row["attempt_ended_at"],
                result=result,
            )
    return Event(
        lane=row["lane"],
        seq=row["seq"],
        fingerprint=row["fingerprint"],
        project_id=row["project_id"],
        kind=kind,
        occurred_at=row["occurred_at"],
        actor=row["actor"],
        message_id=row["message_id"],
        old_state=State(row["old_state"]) if row["old_state"] else None,
        delivery=delivery,
        attempt=attempt,
        payload=unpack_json(row["payload"]) if row["payload"] else None,
    )
