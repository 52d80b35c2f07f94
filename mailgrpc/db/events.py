"""The feed's rows: reading a page behind a place, and checking that a place is still this feed's.

A place is a position in each lane. Within a lane events become visible in the order of `seq`
(each writer holds the lane's lock from nextval to commit), so `seq > place` misses none. Over
lanes, `seq` is one sequence and a change of a delivery is decided under its row's lock, so a later
event of it has a higher seq; a page is one statement, hence one snapshot, merged by seq and cut
there: whoever sees an effect has seen its cause.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from mailgrpc.core.delivery import Delivery, Mode, Outcome, State
from mailgrpc.core.event import Attempt, Event, EventKind
from mailgrpc.core.place import HISTORY_GONE, ORIGIN, Place, Position
from mailgrpc.db.content import unpack_json
from mailgrpc.db.engine import Database
from mailgrpc.db.rows import ROLES, STATES, SUPPRESSION_REASONS, WAIT_REASONS, Row, result_of
from mailgrpc.errors import TokenExpired

LANES = range(16)
_KINDS = {int(m): m for m in EventKind}
_MOVED_BY_ATTEMPTS = frozenset(
    {State.SENDING, State.SENT, State.DEFERRED, State.FAILED, State.OUTCOME_UNKNOWN}
)
"""States that a delivery comes to by a start, by a result, or by a result that came late."""


async def read_events(db: Database, place: Place, limit: int) -> list[Event]:
    """The next events behind a place, of all projects, at most `limit`, without labels.

    Raises TokenExpired where the place is not this feed's, as `check_place` does. Checked in the same
    statement: the horizon moves in a transaction before the drop, so a snapshot in which rows
    are missing shows it moved; and a database with another history cannot answer in between.
    """
    rows = await db.fetch(
        f"""{_PLACE}
           SELECT s.is_strange, e.* FROM (SELECT EXISTS ({_STRANGE}) AS is_strange) s
           LEFT JOIN (SELECT e.* FROM p CROSS JOIN LATERAL (
                   SELECT * FROM events e WHERE e.lane = p.lane AND e.seq > p.seq
                   ORDER BY e.seq LIMIT $4) e
               ORDER BY e.seq LIMIT $4) e ON NOT s.is_strange
           ORDER BY e.seq""",  # noqa: S608  constants only
        *_columns(place),
        limit,
    )
    if rows[0]["is_strange"]:
        raise TokenExpired(HISTORY_GONE)
    return [event_of(row) for row in rows if row["lane"] is not None]


@dataclass(frozen=True, slots=True)
class Page:
    """What of a page of the feed somebody waits for, and the place behind all of it."""

    events: Sequence[Event]
    behind: Place
    size: int  # of the page


async def read_page_about(
    db: Database, place: Place, limit: int, messages: Sequence[uuid.UUID]
) -> Page:
    """What `read_events` would read, of which only what somebody waits for comes over.

    That is what is of these messages, and every event that is no change of a state (removals are
    told to all). The rest costs PostgreSQL a look and us nothing. Raises TokenExpired as
    `read_events` does.
    """
    rows = await db.fetch(
        f"""{_PLACE}, page AS MATERIALIZED (
               SELECT e.* FROM p CROSS JOIN LATERAL (
                   SELECT e.lane, e.seq, e.kind <> {EventKind.STATE_CHANGED:d}
                       OR e.message_id = ANY ($5::uuid[]) AS is_wanted
                   FROM events e WHERE e.lane = p.lane AND e.seq > p.seq
                   ORDER BY e.seq LIMIT $4) e
               ORDER BY e.seq LIMIT $4),
           shown AS (
               SELECT lane, max(seq) AS seq, true AS is_end FROM page GROUP BY lane
               UNION ALL SELECT lane, seq, false FROM page WHERE is_wanted)
           SELECT s.is_strange, x.is_end, (SELECT count(*) FROM page)::integer AS size, e.*
           FROM (SELECT EXISTS ({_STRANGE}) AS is_strange) s
           LEFT JOIN shown x ON NOT s.is_strange
           LEFT JOIN LATERAL (SELECT * FROM events e
               WHERE e.lane = x.lane AND e.seq = x.seq LIMIT 1) e ON true
           ORDER BY e.seq""",  # noqa: S608  constants only
        *_columns(place),
        limit,
        messages,
    )
    if rows[0]["is_strange"]:
        raise TokenExpired(HISTORY_GONE)
    ends = {r["lane"]: Position(r["seq"], r["fingerprint"]) for r in rows if r["is_end"]}
    events = [event_of(r) for r in rows if r["is_end"] is False]
    return Page(events, {**place, **ends}, rows[0]["size"])


_PLACE = """WITH p AS MATERIALIZED (
    SELECT * FROM unnest($1::smallint[], $2::bigint[], $3::integer[]) AS p(lane, seq, fingerprint))"""
# The lanes of `p` in which a place is not this feed's: before the horizon, or on an event that is
# another one here. The event at the horizon itself may be gone; nothing behind it is. Subqueries,
# so that each lane costs a look at an index whatever the planner thinks of the tables.
_STRANGE = """SELECT p.lane FROM p
    CROSS JOIN LATERAL (
        SELECT (SELECT h.seq FROM feed_horizon h WHERE h.lane = p.lane) AS seq) h
    WHERE CASE WHEN p.seq > h.seq THEN p.fingerprint IS DISTINCT FROM
        (SELECT e.fingerprint FROM events e WHERE e.lane = p.lane AND e.seq = p.seq)
        ELSE p.seq IS DISTINCT FROM h.seq END"""


def _columns(place: Place) -> tuple[list[int], list[int], list[int]]:
    lanes = sorted(set(LANES) | set(place))
    positions = [place.get(lane, ORIGIN) for lane in lanes]
    return lanes, [p.seq for p in positions], [p.fingerprint for p in positions]


async def read_place(db: Database) -> dict[int, Position]:
    """The end of the feed now: the last event of each lane, or where all were dropped the horizon.

    Lanes that never had an event are left out.
    """
    rows = await db.fetch(
        """SELECT h.lane, coalesce(e.seq, h.seq) AS seq, coalesce(e.fingerprint, 0) AS fingerprint
           FROM feed_horizon h LEFT JOIN LATERAL (
               SELECT e.seq, e.fingerprint FROM events e
               WHERE e.lane = h.lane AND e.seq > h.seq ORDER BY e.seq DESC LIMIT 1) e ON true
           WHERE coalesce(e.seq, h.seq) > 0 ORDER BY h.lane"""
    )
    return {row["lane"]: Position(row["seq"], row["fingerprint"]) for row in rows}


async def check_place(db: Database, place: Place) -> None:
    """Raise TokenExpired where a place is not this feed's.

    Either what lies behind it was dropped, in a lane at its beginning too, or it is a place of a
    history that was lost.
    """
    if await db.fetch(f"{_PLACE} {_STRANGE}", *_columns(place)):
        raise TokenExpired(HISTORY_GONE)


async def drop_events(db: Database, older_than_s: float, limit: int = 5000) -> int:
    """Drop events older than the retention, at most `limit` a lane. How many were dropped.

    The horizon moves first and in a transaction of its own, so that whoever reads a page with a
    hole sees in the same snapshot that it has one. What an earlier call left behind the horizon,
    because it was cut short there, goes with this one.
    """
    await db.write(
        """WITH cut AS (
               SELECT h.lane, max(e.seq) AS seq FROM feed_horizon h
               CROSS JOIN LATERAL (SELECT e.seq, e.occurred_at FROM events e
                   WHERE e.lane = h.lane AND e.seq > h.seq ORDER BY e.seq LIMIT $2) e
               WHERE e.occurred_at < clock_timestamp() - make_interval(secs => $1)
               GROUP BY h.lane)
           UPDATE feed_horizon h SET seq = cut.seq FROM cut
           WHERE h.lane = cut.lane AND h.seq < cut.seq""",
        older_than_s,
        limit,
    )
    # By ctid: rows here are never updated, and no plan can scan the table for it.
    [row] = await db.write(
        """WITH gone AS (
               DELETE FROM events WHERE ctid = ANY (ARRAY(
                   SELECT e.ctid FROM feed_horizon h CROSS JOIN LATERAL (
                       SELECT e.ctid FROM events e WHERE e.lane = h.lane AND e.seq <= h.seq
                       ORDER BY e.seq LIMIT $1) e))
               RETURNING 1)
           SELECT count(*) AS dropped FROM gone""",
        limit,
    )
    return int(row["dropped"])


def event_of(row: Row) -> Event:
    """A row of `events` as the domain sees it, without labels."""
    kind = _KINDS[row["kind"]]
    delivery = attempt = None
    if kind is EventKind.STATE_CHANGED:
        result = result_of(row)
        delivery = Delivery(
            delivery_id=row["delivery_id"],
            recipient=row["recipient"],
            role=ROLES[row["role"]],
            state=STATES[row["state"]],
            state_since=row["occurred_at"],
            version=row["version"],
            mode=Mode.RETRYING,  # not told by events
            attempt_count=row["attempt_count"],
            due_at=row["due_at"],
            wait_reason=WAIT_REASONS[row["wait_reason"]],
            possibly_sent=row["possibly_sent"],
            suppression_reason=SUPPRESSION_REASONS[row["suppression_reason"]],
            duplicate_of=row["duplicate_of"],
            last_result=result,
        )
        # SENT by the acceptance of an attempt that was overtaken: the last one did not do it.
        is_by_another = row["state"] == State.SENT and (
            result is None or result.outcome is not Outcome.ACCEPTED
        )
        if row["state"] in _MOVED_BY_ATTEMPTS and row["attempt_count"] > 0 and not is_by_another:
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
        old_state=STATES[row["old_state"]] if row["old_state"] else None,
        delivery=delivery,
        attempt=attempt,
        payload=unpack_json(row["payload"]) if row["payload"] else None,
    )
