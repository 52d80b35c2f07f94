"""What was handed over to a worker: the rows behind mailgrpc/handover.py."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from mailgrpc.core.value import value
from mailgrpc.db.content import unpack_message, unpack_options
from mailgrpc.db.deliveries import Started, started_of
from mailgrpc.db.engine import Database
from mailgrpc.db.messages import StoredContent
from mailgrpc.db.rows import Row


@value
class Handed:
    """A delivery that was started by the commit that took it in; with all that it takes to send it."""

    started: Started
    row: Row

    def content(self) -> StoredContent:
        """Its message. Raises what unpacking raises."""
        return StoredContent(
            project=self.row["project"],
            message=unpack_message(self.row, {}),
            options=unpack_options(self.row["options"]),
            created_at=self.row["created_at"],
        )


async def read_handed(
    db: Database, session_id: int, started: Sequence[tuple[uuid.UUID, uuid.UUID]]
) -> list[Handed]:
    """Of these attempts, each with its delivery, those that run in this session.

    None of their messages has files. Raises StoreUnavailable.
    """
    rows = await db.fetch(
        "SELECT * FROM read_handed($1, $2, $3)",
        session_id,
        [delivery_id for _, delivery_id in started],
        [attempt_id for attempt_id, _ in started],
    )
    return [Handed(started_of(row), row) for row in rows]


async def read_running(
    db: Database, session_id: int, channel: str, running_s: float
) -> list[Started]:
    """What was handed over to this session on a channel and has been running for so long.

    Reads what is due on the channel: once a minute, and at each new epoch. Raises StoreUnavailable.
    """
    rows = await db.fetch(
        # The LIMIT is a fence: the planner would read all deliveries where it thinks that many are due.
        # Of what was handed over the attempt and its call have one id, which nothing else has.
        """SELECT d.* FROM due q
           CROSS JOIN LATERAL (SELECT * FROM deliveries d WHERE d.id = q.delivery_id LIMIT 1) AS d
           WHERE q.session_id = $1 AND q.channel = $2 AND d.state = 2 AND d.attempt_id = d.call_id
               AND d.attempt_started_at <= clock_timestamp() - make_interval(secs => $3)""",
        session_id,
        channel,
        running_s,
    )
    return [started_of(row) for row in rows]
