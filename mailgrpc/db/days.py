"""The ranges of time that messages lie in, with their deliveries, attempts and files.

Each range is a partition of each of the four tables, by id, which is by time (core/ids.py). They are
made ahead; what no range takes falls into a net, so that an insert never fails. Retention drops a
range whole, in the time that a few entries of the catalogue take, once nothing in it lives.

What can go wrong: making and dropping need locks that every write conflicts with. Waiting for one
would make all others wait behind us, so it is waited for some 50 ms and then tried again later.

What it costs the others is the number of ranges, in the memory of each connection (about 0.1 MB a
range), hence `width_of`: what is kept is cut into about thirty.
"""

from __future__ import annotations

import asyncio
import math
from datetime import datetime, timedelta

from mailgrpc.db.engine import Database

AHEAD = timedelta(days=3)
"""No worker may run for so long, and nothing falls into the net."""
RANGES = 30
_TRIES = 20
_APART_S = 0.25


def width_of(retention_days: int | None) -> int:
    """How many days a range has: as many as cut what is kept into about RANGES; 30 without limit."""
    return RANGES if retention_days is None else math.ceil(retention_days / RANGES)


async def make_days(
    db: Database, retention_days: int | None, *, now: datetime | None = None
) -> int:
    """Make the ranges that are missing, up to AHEAD of now. How many.

    One that cannot be made because somebody is in the way is left to the next call.
    """
    made = 0
    while (
        await db.write(
            "SELECT make_day($1, $2, coalesce($3, clock_timestamp()))",
            width_of(retention_days),
            AHEAD,
            now,
        )
    )[0][0]:
        made += 1
    return made


async def drop_days(
    db: Database, lane: int, retention_days: int, *, now: datetime | None = None
) -> list[str]:
    """Drop the ranges that are older than the retention; their names.

    One with something that waits, or waited until a day ago, is kept and looked at again by the next
    call, and so is one that others are busy with. The watchers of all projects are told.
    """
    rows = await db.fetch(
        """SELECT name FROM days
           WHERE until <= coalesce($2, clock_timestamp()) - make_interval(days => $1 - 1)
           ORDER BY until""",
        retention_days,
        now,
    )
    return [row["name"] for row in rows if await _drop(db, lane, row["name"], retention_days, now)]


async def _drop(
    db: Database, lane: int, name: str, retention_days: int, now: datetime | None
) -> bool:
    for _ in range(_TRIES):
        [(came_to,)] = await db.write(
            "SELECT drop_day($1, $2, $3, coalesce($4, clock_timestamp()))",
            lane,
            name,
            retention_days,
            now,
        )
        if came_to != "busy":
            return bool(came_to == "dropped")
        await asyncio.sleep(_APART_S)
    return False
