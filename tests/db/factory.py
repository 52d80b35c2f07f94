"""Rows in states that only a provider's answers or much time would bring about."""

from __future__ import annotations

import uuid
from typing import Any

from mailgrpc.core.delivery import UNENDED, State
from mailgrpc.core.ids import MESSAGE, delivery_id, from_text
from mailgrpc.db.engine import Database


def uuid_of(message_id: str) -> uuid.UUID:
    """The message id behind its text."""
    found = from_text(MESSAGE, message_id)
    assert found is not None
    return found


async def put_delivery(
    db: Database, message_id: str, state: State, *, number: int = 1, **columns: Any
) -> None:
    """Put the delivery to recipient `number` of a message into a state, with these columns.

    Its rows in `due` and `scheduled` are as they should be for that state.
    """
    identifier = delivery_id(uuid_of(message_id), number)
    running = state is State.SENDING
    await db.write(
        """UPDATE deliveries SET state = $2::smallint, state_since = clock_timestamp(),
               version = version + 1, wait_reason = CASE WHEN $2::smallint IN (1, 3) THEN 1 ELSE 0 END,
               due_at = CASE WHEN $2::smallint IN (1, 3) THEN clock_timestamp() + interval '8 hours' END,
               attempt_id = CASE WHEN $3::boolean THEN gen_random_uuid() END,
               call_id = CASE WHEN $3::boolean THEN gen_random_uuid() ELSE call_id END,
               attempt_started_at = CASE WHEN $3::boolean THEN clock_timestamp() END,
               attempt_count = attempt_count + $3::boolean::integer
           WHERE id = $1""",
        identifier,
        int(state),
        running,
    )
    for name, value in columns.items():
        await db.write(f"UPDATE deliveries SET {name} = $2 WHERE id = $1", identifier, value)
    if not running:
        await db.write("DELETE FROM due WHERE delivery_id = $1", identifier)
    if state in UNENDED and not running:
        await db.write(
            """INSERT INTO scheduled (delivery_id, channel, project_id, priority, due_at)
               SELECT id, channel, project_id, priority, due_at FROM deliveries WHERE id = $1""",
            identifier,
        )


async def suppress(db: Database, address: str, reason: int, project_id: int = 1) -> None:
    """Put an address on the list of those that are never mailed."""
    await db.write(
        "INSERT INTO suppressions (project_id, address, reason) VALUES ($1, $2, $3)",
        project_id,
        address,
        reason,
    )
