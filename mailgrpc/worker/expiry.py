"""Expiry where no start comes to find it: no worker serves the channel, or too much waits before.

A start expires what it finds expired, at no cost; most end there. For the others `due` is walked
now and then, by its primary key and so the oldest first, a bounded number of rows at a time, and
the next walk goes on where the last one stopped. That costs the same whatever waits and why, and
needs no index; to look at unserved channels alone would miss what a busy one never comes to.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime

from mailgrpc.core.delivery import State, Step
from mailgrpc.db.deliveries import Move, move_deliveries, read_deliveries, read_expired
from mailgrpc.db.engine import Database

WALK_EVERY_S = 60.0
PAGE_ROWS = 1000
PAGES_A_WALK = 50
GRACE_S = 60.0
"""Whoever serves the channel comes first: it knows at the start, and needs no walk."""

_START = uuid.UUID(int=0)


class Expiry:
    """The walk of one worker. Several at once are harmless: a move happens from one version."""

    def __init__(
        self, database: Database, *, lane: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._database = database
        self._lane = lane
        self._clock = clock
        self._walked_at = float("-inf")
        self._after = _START

    async def walk(self) -> int:
        """Walk on, if it is time; how many expired. Raises StoreUnavailable."""
        if self._clock() - self._walked_at < WALK_EVERY_S:
            return 0
        self._walked_at = self._clock()
        expired = 0
        for _ in range(PAGES_A_WALK):
            page = await read_expired(self._database, self._after, PAGE_ROWS, GRACE_S)
            # Before the move: a page that cannot be moved does not hold up those behind it.
            self._after = page.last or _START
            expired += await self._expire(page.expired)
            if page.last is None:
                break
        return expired

    async def _expire(self, expired: Mapping[uuid.UUID, datetime]) -> int:
        if not expired:
            return 0
        deliveries = await read_deliveries(self._database, list(expired))
        moves = [
            Move(d, Step(State.EXPIRED, d.possibly_sent), expire_at=d.expire_at)
            for d in deliveries.values()
            # Read anew: a Resend gives it another expiry.
            if d.state in (State.QUEUED, State.DEFERRED) and d.expire_at == expired[d.delivery_id]
        ]
        return await move_deliveries(self._database, self._lane, "", moves) if moves else 0
