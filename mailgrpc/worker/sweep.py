"""The sweeper: what makes everything come right when nobody rang. Runs in every worker.

Every second it wakes the drains (so that without Redis mail still flows within two), moves what
was scheduled over when its time is near, adopts the journals of dead neighbours, and reaps
sessions; every minute it expires what no
start came to (expiry.py). Apart from that it drops what has outlived its retention now and then.
It is outside arq, because arq's own worker ends when Redis goes away.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from mailgrpc import failpoints
from mailgrpc.core.delivery import Cause, Outcome, Result, next_step
from mailgrpc.core.ids import message_of
from mailgrpc.core.retry import DEFAULT_POLICY
from mailgrpc.db.days import drop_days, make_days
from mailgrpc.db.deliveries import Recorded, Started, promote_scheduled, record_outcomes
from mailgrpc.db.engine import Database
from mailgrpc.db.events import drop_events
from mailgrpc.db.messages import read_retry_policies
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
from mailgrpc.worker.expiry import Expiry
from mailgrpc.worker.outage import Outage

log = logging.getLogger(__name__)

SWEEP_EVERY_S = 1.0
CHORES_EVERY_S = 300.0
PROMOTED_AT_ONCE = 2000
_RETRY_MAX_S = 30.0
_LOOKS_APART_S = 2.0
_PAUSE_MAX_S = 1.0
_WORKER_LOST = Result(
    Outcome.UNKNOWN, Cause.WORKER_LOST, text="the worker ended before it could tell"
)


class Reaper:
    """Ends sessions that no longer beat, and settles what they leave. See sessions.py.

    What it saw counts while it goes on looking. After a gap (PostgreSQL was away, this process
    slept) beats may be missing for that very reason, and it watches anew for a whole lease. A gap
    is half a lease: a session that could beat all the while has done so in it.
    """

    def __init__(
        self,
        database: Database,
        *,
        lane: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._lane = lane
        self._clock = clock
        self._seen: dict[int, tuple[int, float]] = {}  # session -> beat, since when
        self._looked_at = float("-inf")
        self._unsettled: set[int] = set()
        self._rng = random.Random()
        self.sees_others = True
        """Whether another worker may be there; so until the first look."""

    def forget(self) -> None:
        """PostgreSQL did not answer: beats may be missing for that reason."""
        self._seen.clear()

    async def reap(self) -> int:
        """Look once; how many sessions were settled. Raises StoreUnavailable."""
        sessions = await read_sessions(self._database)
        self.sees_others = sum(session.ended_at is None for session in sessions) > 1
        now = self._clock()
        gap_s, self._looked_at = now - self._looked_at, now
        settled = 0
        for session in sessions:
            if gap_s > max(session.lease_s / 2, _LOOKS_APART_S):
                self._seen.pop(session.session_id, None)
            if session.ended_at is None:
                if not await self._end_if_silent(session, now):
                    continue
            elif not session.is_over:
                continue
            try:
                await self._settle(session)
            except StoreUnavailable:
                raise
            except Exception:
                if session.session_id not in self._unsettled:
                    log.exception("session %d cannot be settled yet", session.session_id)
                self._unsettled.add(session.session_id)
            else:
                settled += 1
        alive = {s.session_id for s in sessions}
        self._seen = {i: seen for i, seen in self._seen.items() if i in alive}
        self._unsettled &= alive
        return settled

    async def _end_if_silent(self, session: SessionRow, now: float) -> bool:
        beat, since = self._seen.get(session.session_id, (-1, now))
        if beat != session.beat:
            self._seen[session.session_id] = (session.beat, now)
            return False
        if now - since < session.lease_s:
            return False
        ended = await end_session(self._database, session.session_id, seen_beat=session.beat)
        if ended:
            log.warning("worker session %d (%s) is gone", session.session_id, session.name)
            failpoints.reach("reaper.ended")
        return ended

    async def _settle(self, session: SessionRow) -> None:
        released = await release_unstarted(self._database, session.session_id, lost=True)
        failpoints.reach("reaper.released")
        lost = 0
        while started := await read_started(self._database, session.session_id):
            await record_outcomes(self._database, self._lane, await self._lost(started))
            lost += len(started)
        failpoints.reach("reaper.settled")
        await mark_reaped(self._database, session.session_id)
        if released or lost:
            log.warning(
                "session %d left %d claimed and %d started deliveries",
                session.session_id,
                released,
                lost,
            )

    async def _lost(self, started: Sequence[Started]) -> list[Recorded]:
        policies = await read_retry_policies(
            self._database, {message_of(s.delivery.delivery_id) for s in started}
        )
        now = datetime.now(UTC)
        recorded = []
        for s in started:
            policy = policies.get(message_of(s.delivery.delivery_id), DEFAULT_POLICY)
            step = next_step(s.delivery, _WORKER_LOST, now, policy, self._rng)
            recorded.append(Recorded.of(s, "", now, _WORKER_LOST, step))
        return recorded


class Sweeper:
    """The loop around it."""

    def __init__(
        self,
        database: Database,
        reaper: Reaper,
        expiry: Expiry,
        wake: Callable[[], Any],
        adopt: Callable[[], Awaitable[None]],
        *,
        event_retention_s: float,
        retention_days: int | None = None,
        lane: int = 0,
        outage: Outage | None = None,
        swift: Database | None = None,
    ) -> None:
        self._database = database
        self._swift = swift or database
        self._reaper = reaper
        self._expiry = expiry
        self._wake = wake
        self._adopt = adopt
        self._event_retention_s = event_retention_s
        self._retention_days = retention_days
        self._lane = lane
        self._outage = outage or Outage()
        self._retry_s = SWEEP_EVERY_S

    async def run(self) -> None:
        """Sweep for ever."""
        while True:
            wait_s = SWEEP_EVERY_S
            try:
                await self.sweep()
            except StoreUnavailable as error:
                self._outage.met(error)
                self._reaper.forget()
            except Exception:
                log.exception("the sweeper failed; it goes on")
                wait_s = self._retry_s = min(self._retry_s * 2, _RETRY_MAX_S)
            else:
                self._retry_s = SWEEP_EVERY_S
            await asyncio.sleep(wait_s)

    async def sweep(self) -> None:
        """One round. Raises StoreUnavailable."""
        self._wake()
        # Before the reaper: what a dead neighbour wrote down is known, and not to be called lost.
        await self._adopt()
        await self._reaper.reap()
        while await promote_scheduled(self._swift, PROMOTED_AT_ONCE) == PROMOTED_AT_ONCE:
            self._wake()
        await self._expiry.walk()

    async def run_chores(self) -> None:
        """Forget for ever, apart from the sweeping: it may take long, and nobody waits for it."""
        while True:
            await asyncio.sleep(CHORES_EVERY_S * random.uniform(0.5, 1.5))
            try:
                await self.do_chores()
            except StoreUnavailable as error:
                self._outage.met(error)
            except Exception:
                log.exception("the chores failed; they are tried again")

    async def do_chores(self) -> None:
        """Make room for the days to come; drop what has outlived its retention, bit by bit."""
        if made := await make_days(self._database, self._retention_days):
            log.info("made %d ranges of days ahead", made)
        if self._retention_days is not None:
            for name in await drop_days(self._database, self._lane, self._retention_days):
                log.info("dropped the messages of %s and all that belonged to them", name)
        await _bit_by_bit(lambda: drop_events(self._database, self._event_retention_s))
        await _bit_by_bit(lambda: forget_old_requests(self._database))
        await forget_old_rest(self._database)


async def _bit_by_bit(once: Callable[[], Awaitable[int]]) -> None:
    """Call it until nothing is left to do, and leave as much time to the others as it takes."""
    began = time.monotonic()
    while await once():
        await asyncio.sleep(min(time.monotonic() - began, _PAUSE_MAX_S))
        began = time.monotonic()
