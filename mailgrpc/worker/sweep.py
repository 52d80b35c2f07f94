"""The sweeper: what makes everything come right when nobody rang. Runs in every worker.

Every second it wakes the drains (so that without Redis mail still flows within two), moves what
was scheduled over when its time is near, and reaps sessions. Now and then it drops what has
outlived its retention. It is outside arq, because arq's own worker ends when Redis goes away.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from mailgrpc.core.delivery import Cause, Outcome, Result, next_step
from mailgrpc.core.ids import message_of
from mailgrpc.core.message import RetryWishes
from mailgrpc.db.deliveries import Recorded, Started, promote_scheduled
from mailgrpc.db.engine import Database
from mailgrpc.db.events import drop_events
from mailgrpc.db.messages import read_contents
from mailgrpc.db.retention import forget_old_requests, forget_old_rest
from mailgrpc.db.workers import (
    SessionRow,
    end_session,
    mark_reaped,
    read_sessions,
    read_started,
    release_unstarted,
)
from mailgrpc.errors import StoreUnavailable
from mailgrpc.worker.record import record

log = logging.getLogger(__name__)

SWEEP_EVERY_S = 1.0
CHORES_EVERY_S = 300.0
_NO_WISHES = RetryWishes()
_WORKER_LOST = Result(
    Outcome.UNKNOWN, Cause.WORKER_LOST, text="the worker ended before it could tell"
)


class Reaper:
    """Ends sessions that no longer beat, and settles what they leave. See sessions.py."""

    def __init__(
        self,
        database: Database,
        *,
        lane: int,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._lane = lane
        self._lease_s = lease_s
        self._clock = clock
        self._seen: dict[int, tuple[int, float]] = {}  # session -> beat, since when
        self._rng = random.Random()

    def forget(self) -> None:
        """PostgreSQL did not answer: beats may be missing for that reason."""
        self._seen.clear()

    async def reap(self) -> int:
        """Look once; how many sessions were settled. Raises StoreUnavailable."""
        sessions = await read_sessions(self._database)
        now = self._clock()
        settled = 0
        for session in sessions:
            if session.ended_at is None and not await self._end_if_silent(session, now):
                continue
            await self._settle(session)
            settled += 1
        alive = {s.session_id for s in sessions}
        self._seen = {i: seen for i, seen in self._seen.items() if i in alive}
        return settled

    async def _end_if_silent(self, session: SessionRow, now: float) -> bool:
        beat, since = self._seen.get(session.session_id, (-1, now))
        if beat != session.beat:
            self._seen[session.session_id] = (session.beat, now)
            return False
        if now - since < self._lease_s:
            return False
        ended = await end_session(self._database, session.session_id, seen_beat=session.beat)
        if ended:
            log.warning("worker session %d (%s) is gone", session.session_id, session.name)
        return ended

    async def _settle(self, session: SessionRow) -> None:
        released = await release_unstarted(self._database, session.session_id)
        lost = 0
        while started := await read_started(self._database, session.session_id):
            await record(self._database, self._lane, await self._lost(started))
            lost += len(started)
        await mark_reaped(self._database, session.session_id)
        if released or lost:
            log.warning(
                "session %d left %d claimed and %d started deliveries",
                session.session_id,
                released,
                lost,
            )

    async def _lost(self, started: Sequence[Started]) -> list[Recorded]:
        messages = {message_of(s.delivery.delivery_id) for s in started}
        contents = await read_contents(self._database, messages, with_files=False)
        now = datetime.now(UTC)
        recorded = []
        for s in started:
            content = contents.get(message_of(s.delivery.delivery_id))
            wishes = (content.options.retry if content else None) or _NO_WISHES
            step = next_step(s.delivery, _WORKER_LOST, now, wishes.policy(), self._rng)
            recorded.append(Recorded(s, "", now, _WORKER_LOST, step))
        return recorded


class Sweeper:
    """The loop around it."""

    def __init__(
        self,
        database: Database,
        reaper: Reaper,
        wake: Callable[[], Any],
        *,
        event_retention_s: float,
    ) -> None:
        self._database = database
        self._reaper = reaper
        self._wake = wake
        self._event_retention_s = event_retention_s
        self._chores_at = time.monotonic() + CHORES_EVERY_S * random.random()

    async def run(self) -> None:
        """Sweep for ever."""
        while True:
            try:
                await self.sweep()
            except StoreUnavailable as error:
                log.debug("the sweeper waits for the store: %s", error)
                self._reaper.forget()
            except Exception:
                log.exception("the sweeper failed; it goes on")
            await asyncio.sleep(SWEEP_EVERY_S)

    async def sweep(self) -> None:
        """One round. Raises StoreUnavailable."""
        await promote_scheduled(self._database)
        await self._reaper.reap()
        self._wake()
        if time.monotonic() >= self._chores_at:
            self._chores_at = time.monotonic() + CHORES_EVERY_S
            await self.do_chores()

    async def do_chores(self) -> None:
        """Drop what has outlived its retention, a bounded amount at a time."""
        while await drop_events(self._database, self._event_retention_s):
            pass
        while await forget_old_requests(self._database):
            pass
        await forget_old_rest(self._database)
