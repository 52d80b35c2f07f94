"""Forgetting: request ids, contents seen lately, and worker sessions that are long over."""

from __future__ import annotations

from mailgrpc.db.engine import Database

REQUEST_IDS_DAYS = 7


async def forget_old_requests(db: Database, limit: int = 5000) -> int:
    """Drop request ids older than a week whose message ended more than a day ago, or is gone.

    How many; call again until it is none. In no order: those which must stay (a message that
    waits for weeks) are looked at each time; there are few. Each call passes over what the calls
    before it left to the vacuum, hence so many at a time.
    """
    rows = await db.write(
        """DELETE FROM request_ids WHERE (project_id, request_id) IN (
               SELECT r.project_id, r.request_id FROM request_ids r
               WHERE r.created_at < clock_timestamp() - make_interval(days => $1)
               AND NOT EXISTS (SELECT FROM deliveries d
                   WHERE d.id > r.message_id AND d.id <= last_delivery_of(r.message_id)
                   AND (d.state IN (1, 2, 3)
                       OR d.state_since > clock_timestamp() - interval '1 day'))
               LIMIT $2)
           RETURNING 1""",
        REQUEST_IDS_DAYS,
        limit,
    )
    return len(rows)


async def forget_old_rest(db: Database) -> None:
    """Drop what no dedupe_window reaches any more, and sessions that ended a week ago."""
    await db.write("DELETE FROM recent_content WHERE keep_until < clock_timestamp()")
    await db.write("DELETE FROM workers WHERE reaped_at < clock_timestamp() - interval '7 days'")
