"""Which messages a filter means, and removing them in chunks."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass

import sqlalchemy as sa

from mailgrpc.core.delivery import UNENDED, State
from mailgrpc.core.event import CLOCK_SLACK, Filter
from mailgrpc.core.ids import first_id_at
from mailgrpc.db.engine import Database
from mailgrpc.db.tables import deliveries, messages

CHUNK_MESSAGES = 250
CHUNK_DELIVERIES = 2000
"""At most so many a transaction: short enough that others do not feel its locks."""
PAUSE_SHARE = 2.0
PAUSE_MAX_S = 0.0125
"""After a chunk so many times what it took is left to the others, and at most so long: a million
messages are gone within two minutes all the same."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """What a chunk did. `sending` messages were left alone."""

    cleared: int
    sending: int


def _of_message() -> sa.ColumnElement[bool]:
    last = sa.func.mailgrpc.last_delivery_of(messages.c.id)
    return sa.and_(deliveries.c.id > messages.c.id, deliveries.c.id <= last)


def matching(project_id: int, wanted: Filter) -> sa.Select[tuple[uuid.UUID]]:
    """The ids of the project's messages that a filter means.

    A message matches `recipients` and `states` when one of its deliveries does.
    """
    m = messages.c
    query = sa.select(m.id).where(m.project_id == project_id)
    if wanted.message_ids:
        query = query.where(m.id.in_(wanted.message_ids))
    if wanted.correlation_ids:
        query = query.where(m.correlation_id.in_(wanted.correlation_ids))
        if "" not in wanted.correlation_ids:
            query = query.where(m.correlation_id != "")  # said, so that the index is used
    if wanted.tags:
        query = query.where(m.tags.has_any(sa.cast(sorted(wanted.tags), sa.ARRAY(sa.Text))))
    if wanted.created_after:
        # Ids are ordered by time: a range of the key, then the exact moment.
        query = query.where(m.id >= first_id_at(wanted.created_after - CLOCK_SLACK))
        query = query.where(m.created_at >= wanted.created_after)
    if wanted.created_before:
        query = query.where(m.id < first_id_at(wanted.created_before + CLOCK_SLACK))
        query = query.where(m.created_at < wanted.created_before)
    if wanted.recipients or wanted.states:
        some = sa.select(sa.literal(1)).where(_of_message())
        if wanted.recipients:
            some = some.where(deliveries.c.recipient.in_(wanted.recipients))
        if wanted.states:
            some = some.where(deliveries.c.state.in_([int(s) for s in wanted.states]))
        query = query.where(some.exists())
    return query


async def find_clearable(
    db: Database,
    project_id: int,
    wanted: Filter,
    *,
    force: bool,
    after: uuid.UUID | None,
    limit: int,
) -> tuple[list[list[uuid.UUID]], list[uuid.UUID]]:
    """The next messages that Clear may remove, and those it leaves because they are being sent.

    The first come in chunks of at most CHUNK_DELIVERIES deliveries. By id, from `after` on; at most
    `limit` in both together.
    """
    # One look at the deliveries of each message, for all that is asked of them.
    of_it = (
        sa.select(
            sa.func.count().label("size"),
            _some(deliveries.c.state == int(State.SENDING)).label("sending"),
            _some(deliveries.c.state.in_(_WAITING)).label("waiting"),
        )
        .where(_of_message())
        .lateral("of_it")
    )
    query = matching(project_id, wanted).join_from(messages, of_it, sa.true())
    if after is not None:
        query = query.where(messages.c.id > after)
    if not force:
        query = query.where(sa.not_(of_it.c.waiting))
    rows = await db.select(
        query.add_columns(of_it.c.sending, of_it.c.size).order_by(messages.c.id).limit(limit)
    )
    chunks: list[list[uuid.UUID]] = []
    room = 0
    for row in rows:
        if row.sending:
            continue
        if not chunks or row.size > room:
            chunks.append([])
            room = CHUNK_DELIVERIES
        chunks[-1].append(row.id)
        room -= row.size
    return chunks, [r.id for r in rows if r.sending]


async def has_clearable(
    db: Database, project_id: int, wanted: Filter, *, force: bool, after: uuid.UUID | None
) -> bool:
    """Whether there is a message behind `after` that Clear may remove."""
    query = matching(project_id, wanted)
    if after is not None:
        query = query.where(messages.c.id > after)
    forbidding = [int(State.SENDING)] if force else [int(s) for s in UNENDED]
    some = sa.select(sa.literal(1)).where(_of_message(), deliveries.c.state.in_(forbidding))
    rows = await db.select(query.where(sa.not_(some.exists())).order_by(messages.c.id).limit(1))
    return bool(rows)


_WAITING = [int(s) for s in sorted(UNENDED - {State.SENDING})]


def _some(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    return sa.func.coalesce(sa.func.bool_or(condition), sa.false())


async def clear_messages(
    db: Database,
    lane: int,
    actor: str,
    project_id: int,
    message_ids: list[uuid.UUID],
    *,
    force: bool,
    filter_json: str,
) -> Cleared:
    """Remove these messages in one transaction, and tell every watcher.

    States are checked again under lock: what is being sent by now stays. Returns after a pause in
    proportion to what it took: the busier the database is, the more it is left to the others.
    """
    began = time.monotonic()
    [row] = await db.write(
        "SELECT * FROM clear_messages($1, $2, $3, $4, $5, $6)",
        lane,
        actor,
        project_id,
        message_ids,
        force,
        filter_json,
    )
    await asyncio.sleep(min((time.monotonic() - began) * PAUSE_SHARE, PAUSE_MAX_S))
    return Cleared(row["cleared"], row["sending"])
