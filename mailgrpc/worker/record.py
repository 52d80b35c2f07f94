"""Recording: what came back from providers becomes rows, many in one round trip.

Promises. A result that was handed in is written, whatever PostgreSQL does meanwhile: it is asked
again until it answers. A result always reaches its attempt; it changes the delivery when that
attempt is running, or by the rule on late results:

    the attempt is the last one started, and the state rests on no proof    late_step
    a newer attempt has been started                                        the attempt alone

The journal (a local, fsynced file of results that are not in PostgreSQL yet) has its place here:
between `put` and the flush. Until it exists a worker that is killed with results in memory leaves
them to the reaper, which knows only that the attempts were started.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Sequence

from mailgrpc.core.delivery import late_step
from mailgrpc.db.deliveries import (
    Move,
    Recorded,
    is_last_attempt,
    move_deliveries,
    read_deliveries,
    record_outcomes,
)
from mailgrpc.db.engine import Database
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import StoreUnavailable

log = logging.getLogger(__name__)

FLUSH_RESULTS = 500
_RETRY_S = 0.5
_LATE_TRIES = 5


async def record(database: Database, lane: int, results: Sequence[Recorded]) -> None:
    """Write results, late or not. Each delivery at most once. Raises StoreUnavailable."""
    late = await record_outcomes(database, lane, results)
    if late:
        await _apply_late(database, lane, [r for r in results if _id(r) in late])


async def _apply_late(database: Database, lane: int, late: Sequence[Recorded]) -> None:
    """Results whose delivery is not in their attempt any more: only proof still moves it."""
    for _ in range(_LATE_TRIES):
        last = await is_last_attempt(database, [(_id(r), r.started.attempt_id) for r in late])
        deliveries = await read_deliveries(database, list(last))
        moves = []
        for r in late:
            delivery = deliveries.get(_id(r))
            step = None if delivery is None else late_step(delivery, r.result)
            if delivery is not None and step is not None:
                moves.append(Move(delivery, step, expire_at=delivery.expire_at))
        if not moves or await move_deliveries(database, lane, "", moves) == len(moves):
            return
    # Somebody else keeps moving them; their attempts hold the results.
    log.warning("%d late results left to their attempts", len(late))


def _id(recorded: Recorded) -> uuid.UUID:
    return recorded.started.delivery.delivery_id


class Recorder:
    """The queue of results of one worker; a flush begins as soon as the last one has ended."""

    def __init__(self, database: Database, doorbell: Doorbell, *, lane: int) -> None:
        self._database = database
        self._doorbell = doorbell
        self._lane = lane
        self._waiting: deque[Recorded] = deque()
        self._flusher: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Results that are not recorded yet."""
        return len(self._waiting)

    def put(self, results: Sequence[Recorded]) -> None:
        """Hand results in. Returns at once."""
        self._waiting.extend(results)
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.get_running_loop().create_task(self._flush_all())

    async def drain(self) -> None:
        """Return once everything that was handed in is recorded."""
        while self._flusher is not None and not self._flusher.done():
            await asyncio.shield(self._flusher)

    async def _flush_all(self) -> None:
        while self._waiting:
            batch = self._take()
            try:
                await record(self._database, self._lane, batch)
            except StoreUnavailable as error:
                log.warning("%d results wait for the store: %s", len(batch), error)
                self._waiting.extendleft(reversed(batch))
                await asyncio.sleep(_RETRY_S)
            except Exception:
                await self._record_singly(batch)
            else:
                self._told(batch)

    async def _record_singly(self, batch: Sequence[Recorded]) -> None:
        """One of them cannot be written; the others can. The reaper ends what is left."""
        for one in batch:
            try:
                await record(self._database, self._lane, [one])
            except StoreUnavailable:
                self._waiting.append(one)
            except Exception:
                log.exception("the result of %s cannot be recorded", _id(one))
        self._told(batch)

    def _told(self, batch: Sequence[Recorded]) -> None:
        self._doorbell.hint_feed()
        due = [r.step.due_at for r in batch if r.step.due_at is not None]
        for moment in {d.replace(microsecond=0) for d in due}:
            self._doorbell.ring_at(moment)

    def _take(self) -> list[Recorded]:
        """The next flush: a delivery's second result waits for the next one."""
        batch: dict[uuid.UUID, Recorded] = {}
        left: list[Recorded] = []
        while self._waiting and len(batch) < FLUSH_RESULTS:
            one = self._waiting.popleft()
            if _id(one) in batch:
                left.append(one)
            else:
                batch[_id(one)] = one
        self._waiting.extendleft(reversed(left))
        return list(batch.values())
