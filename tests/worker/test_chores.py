"""Retention drops what has outlived its promise, and nothing else."""

from __future__ import annotations

import uuid

from mailgrpc.core.delivery import State
from mailgrpc.db.engine import Database
from mailgrpc.db.workers import end_session, mark_reaped, open_session
from mailgrpc.worker.expiry import Expiry
from mailgrpc.worker.sweep import Reaper, Sweeper
from tests.worker.rig import Clock, Store

WEEK_S = 7 * 86400.0


async def _nothing() -> None:
    """No neighbour has left a journal."""


def _sweeper(db: Database, retention_days: int | None = None) -> Sweeper:
    return Sweeper(
        db,
        Reaper(db, lane=0, clock=Clock()),
        Expiry(db, lane=0),
        lambda: None,
        _nothing,
        event_retention_s=WEEK_S,
        retention_days=retention_days,
    )


async def _request(db: Database, name: str, message: uuid.UUID, age: str) -> None:
    await db.write(
        """INSERT INTO request_ids (project_id, request_id, kind, message_id, fingerprint, rule,
               created_at) VALUES (1, $1, 1, $2, '', 1, now() - $3::text::interval)""",
        name,
        message,
        age,
    )


async def _ended(db: Database, message: uuid.UUID, age: str) -> uuid.UUID:
    await db.write(
        """UPDATE deliveries SET state = $2, state_since = now() - $3::text::interval
           WHERE message_of(id) = $1""",
        message,
        State.SENT,
        age,
    )
    return message


async def test_a_request_id_stays_a_week_and_a_day_past_the_end_of_its_message(
    db: Database, store: Store
) -> None:
    waiting, just_ended, ended, cleared = await store.put_many([["a@example.com"]] * 4)
    await _ended(db, just_ended, "23 hours")
    await _ended(db, ended, "25 hours")
    await db.write("DELETE FROM deliveries WHERE message_of(id) = $1", cleared)
    await _request(db, "young", ended, "6 days")
    await _request(db, "of a message that waits", waiting, "30 days")
    await _request(db, "of a message that has just ended", just_ended, "8 days")
    await _request(db, "of a cleared message, young", cleared, "6 days")
    await _request(db, "old", ended, "8 days")
    await _request(db, "of a cleared message, old", cleared, "8 days")

    await _sweeper(db).do_chores()
    kept = {row[0] for row in await db.fetch("SELECT request_id FROM request_ids")}
    assert kept == {
        "young",
        "of a message that waits",
        "of a message that has just ended",
        "of a cleared message, young",
    }


async def test_events_stay_for_their_retention_and_the_horizon_tells(
    db: Database, store: Store
) -> None:
    await store.put()
    await db.write("UPDATE events SET occurred_at = now() - interval '8 days'")
    await store.put()
    await _sweeper(db).do_chores()
    [kept] = await db.fetch("SELECT seq FROM events")
    assert await store.value("SELECT seq FROM feed_horizon WHERE lane = 0") == kept["seq"] - 1


async def test_sessions_are_forgotten_a_week_after_nothing_was_left_of_them(
    db: Database, store: Store
) -> None:
    long_over, over, unreaped, alive = [await open_session(db, "x", []) for _ in range(4)]
    for session in (long_over, over, unreaped):
        await end_session(db, session)
    for session in (long_over, over):
        assert await mark_reaped(db, session)
    await db.write("UPDATE workers SET ended_at = now() - interval '8 days' WHERE id <> $1", alive)
    await db.write(
        "UPDATE workers SET reaped_at = now() - interval '8 days' WHERE id = $1", long_over
    )
    await _sweeper(db).do_chores()
    assert {row[0] for row in await db.fetch("SELECT id FROM workers")} == {over, unreaped, alive}


async def test_what_was_told_lately_stays_while_a_window_reaches_it(
    db: Database, store: Store
) -> None:
    for key, until in (("in", "1 minute"), ("out", "-1 minute")):
        await db.write(
            """INSERT INTO recent_content
               VALUES (1, $1, $2, now(), now() + $3::text::interval)""",
            key.encode(),
            uuid.uuid4(),
            until,
        )
    await _sweeper(db).do_chores()
    assert [row[0] for row in await db.fetch("SELECT key FROM recent_content")] == [b"in"]


async def test_days_are_made_ahead_and_old_ones_dropped(db: Database, store: Store) -> None:
    await store.put()
    await db.write("DELETE FROM due")
    await _sweeper(db, retention_days=30).do_chores()
    assert await store.value("SELECT max(until) > now() + interval '3 days' FROM days")
    await db.write("UPDATE days SET until = until - interval '40 days' WHERE name = 'before'")
    await _sweeper(db, retention_days=30).do_chores()  # looks, and finds it quiet
    assert await store.value("SELECT count(*) FROM messages") == 1
    await db.write("UPDATE days SET quiet_since = quiet_since - interval '2 days'")
    await _sweeper(db).do_chores()  # without a retention all is kept
    assert await store.value("SELECT count(*) FROM messages") == 1
    await _sweeper(db, retention_days=30).do_chores()
    assert await store.value("SELECT count(*) FROM messages") == 0
