"""Pages of messages for a snapshot, ascending by id; each page is read at its own moment."""

from __future__ import annotations

import uuid

from mailgrpc.core.event import Filter, MessageStatus
from mailgrpc.db.clear import matching
from mailgrpc.db.engine import Database
from mailgrpc.db.messages import read_statuses
from mailgrpc.db.tables import messages

SNAPSHOT_PAGE = 200
Page = tuple[list[MessageStatus], uuid.UUID | None]
"""The messages, and the id to go on from; None at the end."""


async def read_unended_page(
    db: Database, project_id: int, wanted: Filter, after: uuid.UUID | None
) -> Page:
    """Messages with a delivery that has not ended.

    Found through `due` and `scheduled`, where each such delivery has its row, so the cost does
    not grow with what has ended.
    """
    rows = await db.fetch(
        # Merged before it is cut, so that neither table runs ahead of the other.
        """SELECT DISTINCT message_of(delivery_id) AS id FROM (
               (SELECT delivery_id FROM due WHERE project_id = $1
                    AND ($2::uuid IS NULL OR delivery_id > last_delivery_of($2))
                    ORDER BY delivery_id LIMIT $3)
               UNION ALL
               (SELECT delivery_id FROM scheduled WHERE project_id = $1
                    AND ($2::uuid IS NULL OR delivery_id > last_delivery_of($2))
                    ORDER BY delivery_id LIMIT $3)
               ORDER BY delivery_id LIMIT $3) AS waiting ORDER BY id""",
        project_id,
        after,
        SNAPSHOT_PAGE,
    )
    return await _page(db, project_id, wanted, [row["id"] for row in rows])


async def read_all_page(
    db: Database, project_id: int, wanted: Filter, after: uuid.UUID | None
) -> Page:
    """Messages that a filter means, whatever became of them."""
    query = matching(project_id, wanted).order_by(messages.c.id).limit(SNAPSHOT_PAGE)
    if after is not None:
        query = query.where(messages.c.id > after)
    rows = await db.select(query)
    return await _page(db, project_id, wanted, [row.id for row in rows])


async def _page(db: Database, project_id: int, wanted: Filter, ids: list[uuid.UUID]) -> Page:
    statuses = await read_statuses(db, project_id, ids)
    page = [statuses[i] for i in ids if i in statuses and wanted.means(statuses[i])]
    return page, ids[-1] if ids else None
