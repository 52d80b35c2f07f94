"""Claim, start and record over the same tables by asyncpg, 200 deliveries at a time.

One connection, one batch after the other, a transaction and so a commit for each of the three. The
rows that remain are those that a worker leaves: the delivery SENT, its attempt, its two events, and
none in `due`. Nothing is decided: no preference, no suppression and no expiry is looked up, no
content is read, no mail is built, no project takes its turn, no lock of the feed is taken, and
nothing is written to a journal.
"""

from __future__ import annotations

import time

import asyncpg

from mailgrpc.core.ids import new_id

BATCH = 200

_CLAIM = """UPDATE due SET session_id = 1, claims = claims + 1 WHERE delivery_id IN (
        SELECT delivery_id FROM due WHERE channel = 'default' AND project_id = 1
            AND priority = 20 AND due_at <= now() AND session_id IS NULL
        ORDER BY due_at, delivery_id LIMIT $1 FOR UPDATE SKIP LOCKED)
    RETURNING delivery_id"""

_START = """WITH started AS (
        UPDATE deliveries d SET state = 2, state_since = now(), version = version + 1,
            wait_reason = 0, due_at = NULL, attempt_count = attempt_count + 1,
            attempt_id = u.attempt, call_id = u.call, attempt_started_at = now()
        FROM unnest($1::uuid[], $2::uuid[], $3::uuid[]) u(id, attempt, call)
        WHERE d.id = u.id AND d.state = 1 RETURNING d.*)
    INSERT INTO events (lane, seq, project_id, kind, occurred_at, message_id, delivery_id,
        recipient, role, old_state, state, version, wait_reason, possibly_sent,
        suppression_reason, attempt_count, call_id, channel, attempt_started_at)
    SELECT 0, nextval('feed_seq'), project_id, 16, state_since, message_of(id), id, recipient,
        role, 1, 2, version, 0, false, 0, attempt_count, call_id, channel, attempt_started_at
    FROM started"""

_RECORD = """WITH sent AS (
        UPDATE deliveries SET state = 4, state_since = now(), version = version + 1,
            attempt_id = NULL
        WHERE id = ANY ($1::uuid[]) AND state = 2 RETURNING *),
    tried AS (
        INSERT INTO attempts (delivery_id, number, id, call_id, channel, provider, started_at,
            ended_at, outcome, cause, status_code, enhanced_code, text, provider_message_id)
        SELECT s.id, s.attempt_count, u.attempt, s.call_id, s.channel, 'capture',
            s.attempt_started_at, now(), 1, 0, 250, '', '', 'capture-' || s.call_id
        FROM sent s JOIN unnest($1::uuid[], $2::uuid[]) u(id, attempt) ON u.id = s.id),
    left_queue AS (DELETE FROM due WHERE delivery_id = ANY ($1::uuid[]))
    INSERT INTO events (lane, seq, project_id, kind, occurred_at, message_id, delivery_id,
        recipient, role, old_state, state, version, wait_reason, possibly_sent,
        suppression_reason, attempt_count, call_id, channel, provider, attempt_started_at,
        attempt_ended_at, outcome, cause, status_code, enhanced_code, text, provider_message_id)
    SELECT 0, nextval('feed_seq'), project_id, 16, state_since, message_of(id), id, recipient,
        role, 2, 4, version, 0, false, 0, attempt_count, call_id, channel, 'capture',
        attempt_started_at, now(), 1, 0, 250, '', '', 'capture-' || call_id
    FROM sent"""


async def drain(url: str) -> tuple[int, float]:
    """Send all that is due, as far as the tables can tell: how many, and in how many seconds."""
    connection = await asyncpg.connect(
        url, server_settings={"search_path": "mailgrpc", "jit": "off"}
    )
    claim, start, record = [await connection.prepare(s) for s in (_CLAIM, _START, _RECORD)]
    done = 0
    began = time.perf_counter()
    while claimed := [row["delivery_id"] for row in await claim.fetch(BATCH)]:
        attempts = [new_id() for _ in claimed]
        await start.fetch(claimed, attempts, [new_id() for _ in claimed])
        await record.fetch(claimed, attempts)
        done += len(claimed)
    took = time.perf_counter() - began
    await connection.close()
    return done, took
