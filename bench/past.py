"""A past: messages that have ended, put straight into the tables by SQL.

As they would lie there after days of traffic: ids and all that belongs to them spread over the days,
a range of ids for each day, request ids of all of them (as if none had been forgotten), events of the
last week. Analysed and checkpointed, so that what is measured afterwards does not pay for it.
"""

from __future__ import annotations

import asyncio
import time

import asyncpg

from bench.family import Family

DAYS = 30
EVENTS_DAYS = 7
_CHUNK = 100_000

# A database that is new holds all of the past in its first range: make it end where the past begins.
_CUT = """
DO $$
DECLARE
    v_begin timestamptz := date_trunc('day', now(), 'UTC') - make_interval(days => {days});
    v_table text;
BEGIN
    FOREACH v_table IN ARRAY ARRAY['messages', 'deliveries', 'attempts', 'attachments'] LOOP
        EXECUTE format('ALTER TABLE %1$s DETACH PARTITION %1$s_before', v_table);
        EXECUTE format('ALTER TABLE %1$s ATTACH PARTITION %1$s_before
            FOR VALUES FROM (MINVALUE) TO (%2$L)', v_table, first_id_at(v_begin));
    END LOOP;
    UPDATE days SET until = v_begin, until_id = first_id_at(v_begin) WHERE name = 'before';
    FOR v_day IN 0 .. {days} LOOP
        WHILE make_day(1, '3 days', v_begin + make_interval(days => v_day) - interval '2 hours') LOOP
        END LOOP;
    END LOOP;
END $$
"""

# $1 the first number of a chunk and $2 the last, $3 when number 0 was, $4 seconds between two.
_ROWS = """
WITH n AS (
    SELECT i, $3::timestamptz + i * $4::float8 * interval '1 second' AS at, md5(i::text || $5) AS hash
    FROM generate_series($1::bigint, $2::bigint) AS i
), r AS (
    SELECT i, at, hash, (lpad(to_hex(floor(extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7'
        || substr(hash, 1, 3) || '8' || substr(hash, 4, 11) || '0000')::uuid AS id,
        (lpad(to_hex(floor(extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7'
        || substr(hash, 1, 3) || '8' || substr(hash, 4, 11) || '0001')::uuid AS delivery,
        substr(hash, 1, 12) || '@example.test' AS recipient
    FROM n
)
"""
_TABLES = {
    "messages": """INSERT INTO messages (id, project_id, created_at, request_id, correlation_id,
            subject, tags, custom_args, options, flags, content)
        SELECT id, 1, at, hash, '', 'Your receipt', '[]', jsonb_build_object('order', hash), '{}', 0,
            convert_to(repeat(hash, 10), 'UTF8') FROM r""",
    "deliveries": """INSERT INTO deliveries (id, project_id, recipient, role, channel, priority, mode,
            flags, state, state_since, version, expire_at, attempt_count, call_id,
            attempt_started_at)
        SELECT delivery, 1, recipient, 1, 'default', 20, 1, 0, 4, at, 3, at + interval '5 days', 1, id,
            at FROM r""",
    "attempts": """INSERT INTO attempts
        SELECT delivery, 1, id, id, 'default', 'capture', at, at, 1, 0, 250, '', '250 OK', hash, NULL
        FROM r""",
    "request_ids": """INSERT INTO request_ids (project_id, request_id, kind, message_id, fingerprint,
            rule, created_at)
        SELECT 1, md5(hash), 1, id, decode(hash || hash, 'hex'), 1, at FROM r""",
    "events": """INSERT INTO events (lane, seq, project_id, kind, occurred_at, message_id, delivery_id,
            recipient, role, old_state, state, version, wait_reason, due_at, possibly_sent,
            suppression_reason, attempt_count, channel)
        SELECT 0, nextval('feed_seq'), 1, 16, at, id, delivery, recipient, 1, v.old, v.new, v.version, 0,
            NULL, false, 0, 1, 'default'
        FROM r CROSS JOIN (VALUES (0, 1, 1), (1, 2, 2), (2, 4, 3)) AS v(old, new, version)
        WHERE at > now() - interval '7 days' ORDER BY i, v.version""",
}


def make_days(family: Family, days: int = DAYS) -> None:
    """Ranges of a day each for the past of a database that is empty."""
    family.sql(_CUT.format(days=days))


def fill(family: Family, messages: int, *, first_day: float, days: float, salt: str = "") -> float:
    """Put in so many messages, spread over `days` from `first_day` days ago on; the seconds it took.

    Not settled: see `settle`.
    """

    async def put(table: str) -> None:
        connection = await asyncpg.connect(
            family.url,
            server_settings={"search_path": "mailgrpc", "synchronous_commit": "off"},
            command_timeout=600,
        )
        try:
            begin = await connection.fetchval(
                "SELECT now() - make_interval(secs => $1)", first_day * 86400.0
            )
            step = days * 86400.0 / messages
            for start in range(0, messages, _CHUNK):
                last = min(start + _CHUNK, messages) - 1
                await connection.execute(_ROWS + _TABLES[table], start, last, begin, step, salt)
        finally:
            await connection.close()

    async def all_tables() -> None:
        await asyncio.gather(*(put(table) for table in _TABLES))

    began = time.monotonic()
    asyncio.run(all_tables())
    return time.monotonic() - began


def settle(family: Family) -> None:
    """Vacuum and analyse, so that nothing is left to do beside a measurement, and checkpoint."""
    for table in (*_TABLES, "due", "scheduled"):
        family.sql(f"VACUUM (ANALYZE, FREEZE) {table}")
    family.checkpoint()
