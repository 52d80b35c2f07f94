"""Worker sessions: the rows behind the leases. The protocol stands in worker/sessions.py."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from mailgrpc.db.deliveries import Started, started_of
from mailgrpc.db.engine import Database


@dataclass(frozen=True, slots=True)
class SessionRow:
    """A session that is not entirely over."""

    session_id: int
    name: str
    channels: tuple[str, ...]
    started_at: datetime
    beat: int
    beat_at: datetime
    ended_at: datetime | None  # ahead of now: ended, and not to be settled before
    is_over: bool  # that has passed: what it had started may be settled
    lease_s: float
    held: str  # why it starts nothing; empty: it does
    paused: tuple[str, ...]  # channels that failed as a whole


async def open_session(
    db: Database, name: str, channels: Sequence[str], lease_s: float = 30.0
) -> int:
    """A new session. Raises StoreUnavailable.

    Its id is drawn at random: a sequence that went back in a fail-over to a standby which lacked
    the last commits would give two workers one session.
    """
    session_id = secrets.randbits(62)
    await db.write(
        "INSERT INTO workers (id, name, channels, lease_s) VALUES ($1, $2, $3, $4)",
        session_id,
        name,
        list(channels),
        lease_s,
    )
    return session_id


async def beat(db: Database, session_id: int, held: str = "", paused: Sequence[str] = ()) -> bool:
    """Show that the session lives, and how. False: it has been ended, and may start nothing more.

    Waits for the claims and starts that are under way in it.
    """
    rows = await db.write(
        """UPDATE workers SET beat = beat + 1, beat_at = clock_timestamp(), held = $2, paused = $3
           WHERE id = $1 AND ended_at IS NULL RETURNING id""",
        session_id,
        held,
        list(paused),
    )
    return bool(rows)


async def begin_epoch(
    db: Database,
    session_id: int,
    channel: str,
    epoch: int,
    held: str = "",
    paused: Sequence[str] = (),
) -> bool:
    """Beat, and let nothing of an earlier epoch on this channel take or start anything from now on.

    For a worker that does not know what became of one: it may still be on its way, and would lease
    rows that nobody knows of for as long as the session lives. Waits for what is under way, as
    `end_session` does. False: the session has been ended.
    """
    [row] = await db.write(
        "SELECT begin_epoch($1, $2, $3, $4, $5)", session_id, channel, epoch, held, list(paused)
    )
    return bool(row["begin_epoch"])


async def read_sessions(db: Database) -> list[SessionRow]:
    """The sessions that live, and those that ended with something left in `due`."""
    rows = await db.fetch(
        """SELECT *, coalesce(ended_at <= clock_timestamp(), false) AS is_over FROM workers
           WHERE reaped_at IS NULL ORDER BY started_at, id"""
    )
    return [
        SessionRow(
            row["id"],
            row["name"],
            tuple(row["channels"]),
            row["started_at"],
            row["beat"],
            row["beat_at"],
            row["ended_at"],
            row["is_over"],
            row["lease_s"],
            row["held"],
            tuple(row["paused"]),
        )
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class Load:
    """A session and what it holds, by the clock of the database."""

    session: SessionRow
    beat_age_s: float
    claimed: int  # leased, SENDING included
    sending: int


async def read_loads(db: Database) -> list[Load]:
    """What `mailgrpc workers` lists. Reads all of `due`, which has no index on sessions."""
    sessions = {s.session_id: s for s in await read_sessions(db)}
    rows = await db.fetch(
        """SELECT w.id, extract(epoch FROM clock_timestamp() - w.beat_at)::float8 AS beat_age_s,
               coalesce(q.claimed, 0) AS claimed, coalesce(q.sending, 0) AS sending
           FROM workers w LEFT JOIN (
               SELECT q.session_id, count(*) AS claimed,
                   count(*) FILTER (WHERE d.state = 2) AS sending
               FROM due q LEFT JOIN deliveries d ON d.id = q.delivery_id
               WHERE q.session_id IS NOT NULL GROUP BY q.session_id) q ON q.session_id = w.id
           WHERE w.id = ANY ($1::bigint[]) ORDER BY w.started_at, w.id""",
        list(sessions),
    )
    return [
        Load(sessions[row["id"]], row["beat_age_s"], row["claimed"], row["sending"]) for row in rows
    ]


async def end_session(
    db: Database, session_id: int, seen_beat: int | None = None, *, settle_after_s: float = 0.0
) -> bool:
    """End a session; with `seen_beat` only if it has not beaten since. Whether it is ended now.

    Waits for the claims, starts and inserts that are under way in it, and none follows. `settle_after_s`: how
    long nobody may settle what it had started.
    """
    [row] = await db.write("SELECT end_session($1, $2, $3)", session_id, seen_beat, settle_after_s)
    return bool(row["end_session"])


async def release_unstarted(
    db: Database, session_id: int, *, lost: bool, channel: str | None = None
) -> int:
    """Give back what a session had claimed and not started, on a channel or on all. How many.

    `lost` keeps each row's count of claims: their worker died with them. Reads all of `due`; this
    is rare.
    """
    [row] = await db.write("SELECT release_claims($1, $2, $3)", session_id, lost, channel)
    return int(row["release_claims"])


async def read_started(db: Database, session_id: int, limit: int = 500) -> list[Started]:
    """What an ended session had started and not recorded."""
    rows = await db.fetch(
        """SELECT d.* FROM due q JOIN deliveries d ON d.id = q.delivery_id
           WHERE q.session_id = $1 AND d.state = 2 ORDER BY d.id LIMIT $2""",
        session_id,
        limit,
    )
    return [started_of(row) for row in rows]


async def mark_reaped(db: Database, session_id: int) -> bool:
    """An ended session is entirely over, if nothing of it is left. Whether it is."""
    rows = await db.write(
        """UPDATE workers SET reaped_at = clock_timestamp() WHERE id = $1
           AND ended_at <= clock_timestamp() AND NOT EXISTS (SELECT FROM due WHERE session_id = $1)
           RETURNING id""",
        session_id,
    )
    return bool(rows)
