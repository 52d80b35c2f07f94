"""Drain: one loop a channel, from due rows to the wire. Claim → start → send (wire.py) → record.

Promises. Only what a committed start or `read_handed` returned is sent: where no more is due than was
claimed, servers are given credit (credits.py), with which they start mail themselves. SEND_ONCE
deliveries are started in groups no larger than the free slots on the wire, so that a crash leaves few
in doubt; RETRYING ones may be started ahead of the wire. A message that breaks the code fails alone
(call.py); one that breaks the process is claimed alone from the third time on, and given up at the
sixth. One slow channel holds no other's slots, because each has its own loop and its own provider.

Nothing is claimed or started by a session that was not heard in time, without a place in the
journal for every result, or while the channel pauses (breaker.py). After that pause one delivery
is claimed, as its probe, and its result awaited.

With a backlog the next claim is made, and its contents are read, once no more than a hundred calls of the
last are left to be started (claimer.py). What was claimed ahead is put back where it cannot be started after
all.

The loop is woken by a flag that is cleared *before* the claim: a ring that comes during the claim
is not lost, it makes one more claim. Rings come from the doorbell, from the sweeper every second,
and from the clock: a claim that finds nothing answers when the next delivery will be due.

When PostgreSQL breaks off. A claim whose answer was lost has leased rows that we do not know of,
and so has a batch that failed between claim and start: before the next claim, everything of this
channel that our session holds without a start is given back, and a new epoch begins, in which
nothing of the old one can come late (sessions.py); and what servers have started with credit of the old
one, and did not tell of, is taken back as not sent. A start whose answer was lost is run again with
the same attempts until it answers, which then says what may be sent; nothing is sent before. Were it
given up, its deliveries would stay in SENDING for as long as our session lives; where PostgreSQL
answers and will not have it, we give up the session.
When PostgreSQL is back, and at the start, the session beats and what is not recorded yet is
recorded before anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence

from mailgrpc import failpoints
from mailgrpc.core.ids import new_id
from mailgrpc.db.deliveries import Started, Starting, start_deliveries
from mailgrpc.db.engine import AmbiguousCommit, Database, SessionEnded, SessionGivenUp
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import StoreUnavailable
from mailgrpc.handover import Handover
from mailgrpc.providers.provider import Provider
from mailgrpc.worker.breaker import Breaker
from mailgrpc.worker.call import Group
from mailgrpc.worker.claimer import Batch, Claimer
from mailgrpc.worker.credits import Credits
from mailgrpc.worker.journal import Journal
from mailgrpc.worker.outage import Outage
from mailgrpc.worker.pace import Pace
from mailgrpc.worker.record import Recorder
from mailgrpc.worker.sessions import Session
from mailgrpc.worker.wire import Wire

log = logging.getLogger(__name__)

_IDLE_S = 60.0  # the sweeper rings long before
_RETRY_S = 0.5
_RETRY_MAX_S = 30.0
_REFUSALS = 20  # of a start in doubt, until its session is left to the reaper


class Drain:
    """The loop of one channel in one worker process."""

    def __init__(
        self,
        database: Database,
        session: Session,
        recorder: Recorder,
        doorbell: Doorbell,
        outage: Outage,
        journal: Journal,
        *,
        channel: str,
        provider: Provider,
        lane: int,
        concurrency: int,
        has_others: Callable[[], bool] = lambda: True,
        handover: Handover | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.channel = channel
        self._database = database
        self._session = session
        self._recorder = recorder
        self._doorbell = doorbell
        self._outage = outage
        self._journal = journal
        self._lane = lane
        self.breaker = Breaker(channel, on_close=self.wake)
        pace = Pace(clock)
        self._wire = Wire(
            provider,
            recorder,
            journal,
            self.breaker,
            pace,
            channel=channel,
            concurrency=concurrency,
            rng=rng or random.Random(),
        )
        self._claimer = Claimer(
            database,
            doorbell,
            outage,
            channel=channel,
            group_max=provider.group_max,
            has_others=has_others,
        )
        self._handover = handover or Handover(doorbell)
        self.credits = Credits(
            database,
            session,
            recorder,
            self._handover,
            journal,
            self._wire,
            pace,
            channel=channel,
            concurrency=concurrency,
            lane=lane,
            on_missing=self._begin_anew,
            clock=clock,
        )
        self._wire.on_freed = self._note_end
        self._wake = asyncio.Event()
        self._ended_id: int | None = None  # a session that was told to have ended
        self._is_behind = True  # there may be results from before that are not recorded
        self._retry_s = _RETRY_S
        self._stopping = False

    def wake(self) -> None:
        """Something may be due."""
        self._wake.set()

    def _note_end(self) -> None:
        """A call has ended, and with it perhaps the channel (breaker.py)."""
        if not self.breaker.is_closed:
            self.credits.forbid()
        self.credits.note_end()

    def _begin_anew(self) -> None:
        """Credits do not come back: what was started with them is found once a new epoch began."""
        self._claimer.lose_track()
        self.wake()

    def stop_claiming(self) -> None:
        """Claim and start nothing more; `run` returns and what is on the wire goes on."""
        self._stopping = True
        self.credits.forbid()
        self._wake.set()
        self._wire.freed.set()

    async def run(self) -> None:
        """Drain until told to stop. Survives PostgreSQL, and the end of its session."""
        self.credits.are_heard = self._handover.exists
        try:
            while not self._stopping:
                self._wake.clear()
                idle_s = await self._guarded_pass()
                if idle_s is not None and not self._stopping:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(min(idle_s, _IDLE_S)):
                            await self._wake.wait()
            with contextlib.suppress(Exception):  # what we hold is given back with our session
                await self._claimer.put_back_ahead(self._session.session_id)
            with contextlib.suppress(Exception):  # what was handed over is left to the reaper
                if self.credits.are_open:
                    await self._handover.leave(self._session.session_id)
                    self._claimer.lose_track()
                    await self._give_back_astray()
        finally:
            self._claimer.abandon()

    async def burst(self) -> None:
        """Send all that is due now, and see it recorded. Raises StoreUnavailable, SessionEnded."""
        while not self._stopping:
            await self._give_back_astray()
            if await self.drain_once() is not None:
                return
            await self.settle()
            await self._recorder.drain()
        await self._claimer.put_back_ahead(self._session.session_id)

    async def settle(self) -> None:
        """Return when nothing of this channel is on the wire."""
        await self.credits.settle()
        await self._wire.settle()

    async def abandon(self) -> None:
        """End what is on the wire, unheard; the reaper settles it."""
        await self.credits.abandon()
        await self._wire.abandon()

    async def _guarded_pass(self) -> float | None:
        session_id = self._session.session_id
        try:
            if self._ended_id is not None:
                await self._claimer.drop_ahead()  # its session is over, and with it the lease
                self.credits.withdraw()
                await self._session.renew(self._ended_id)
                self._ended_id, session_id = None, self._session.session_id
            await self._give_back_astray()
            await self.credits.take_back_strays(session_id)
            if self._is_behind:
                await self._recorder.flushed()
                self._is_behind = False
            idle_s = await self.drain_once()
        except SessionGivenUp as error:
            log.error("worker session %d is given up: %s", session_id, error, exc_info=error)
            self._ended_id = session_id
            with contextlib.suppress(StoreUnavailable):
                await self._session.give_up(session_id)
        except SessionEnded:
            self._ended_id = session_id
        except StoreUnavailable as error:
            self._claimer.lose_track()
            self._is_behind = True
            self._outage.met(error)
            await asyncio.sleep(_RETRY_S)
        except Exception:
            self._claimer.lose_track()
            log.exception("draining channel %s failed; it goes on", self.channel)
            await asyncio.sleep(self._retry_s)
            self._retry_s = min(self._retry_s * 2, _RETRY_MAX_S)
        else:
            self._retry_s = _RETRY_S
            return idle_s
        return None

    async def _give_back_astray(self) -> None:
        if self._claimer.is_astray:
            await self._claimer.drop_ahead()
            self.credits.forbid()
            self.credits.withdraw()
            session_id = self._session.session_id
            epoch = self._claimer.begin_epoch()
            try:
                await self._session.give_back(session_id, self.channel, epoch)
                await self.credits.take_back(session_id)
            except BaseException:
                self._claimer.lose_track()
                raise

    async def drain_once(self) -> float | None:
        """Claim one batch and see all of it started. None: look again at once; else seconds."""
        if (pause_s := self.breaker.wait_s) or self._journal.trouble:
            self.credits.forbid()
            await self._claimer.put_back_ahead(self._session.session_id)
            return pause_s or _RETRY_S
        is_probe = not self.breaker.is_closed
        session_id = self._session.session_id
        self._check_heard(session_id)
        if is_probe:
            await self._claimer.put_back_ahead(session_id)
        batch = await self._claimer.next(session_id, one=is_probe)
        if is_probe or self._stopping or (isinstance(batch, Batch) and batch.is_full):
            self.credits.forbid()
        else:
            self.credits.allow(session_id, self._claimer.epoch)
        if not isinstance(batch, Batch):
            return batch
        waiting = batch.groups
        probes: list[asyncio.Future[None]] = []
        try:
            while waiting and (groups := await self._next_batch(waiting, is_probe)):
                if batch.calls_for_next and not is_probe:
                    self._claimer.claim_ahead(session_id)
                probes += await self._start(session_id, groups, is_probe)
        except asyncio.CancelledError:
            waiting.clear()  # our end must not wait for the store: the session gives all back
            raise
        finally:
            await self._claimer.release(session_id, waiting)
        if probes:
            await asyncio.wait(probes)
        return None

    def _check_heard(self, session_id: int) -> None:
        """Raise StoreUnavailable where the last look would say no to whatever we started."""
        if not self._session.may_send(session_id):
            raise StoreUnavailable("no beat of this worker session was answered in time")

    async def _next_batch(self, waiting: deque[Group], is_probe: bool) -> list[Group]:
        """The next groups to start together, when there is room for them; none: stop."""
        while not (self._stopping or self._claimer.is_astray) and (
            is_probe or self.breaker.is_closed
        ):
            self._wire.freed.clear()
            room = self._wire.room(waiting[0].mode)
            if batch := _take(waiting, room, self._journal.room):
                return batch
            if room == 0:
                self.credits.forbid()  # who waits for a slot is not to be overtaken all the time
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RETRY_S):
                    await self._wire.freed.wait()
        return []

    async def _start(
        self, session_id: int, batch: Sequence[Group], is_probe: bool
    ) -> list[asyncio.Future[None]]:
        """Commit the start of these groups, then send what came back of each; the probes."""
        calls = {new_id(): group for group in batch}
        starting = [
            Starting(delivery_id, new_id(), call_id)
            for call_id, group in calls.items()
            for delivery_id in group.delivery_ids
        ]
        started: list[Started] = []
        self._journal.reserve(len(starting))
        try:
            self._check_heard(session_id)
            started = await self._started(session_id, starting)
        finally:
            self._journal.unreserve(len(starting) - len(started))
        failpoints.reach("drain.started")
        self.credits.note_mail()
        self._doorbell.hint_feed()
        last_look = functools.partial(self._session.may_send, session_id)
        members: dict[uuid.UUID, list[Started]] = {call_id: [] for call_id in calls}
        for s in started:
            members[s.call_id].append(s)
        probes: list[asyncio.Future[None]] = []
        for call_id, group in calls.items():  # in the order of the claim
            if members[call_id]:
                probe = asyncio.get_running_loop().create_future() if is_probe else None
                probes += [probe] if probe else []
                self._wire.send(group, members[call_id], last_look, probe=probe)
        return probes

    async def _started(self, session_id: int, starting: Sequence[Starting]) -> list[Started]:
        """What did start. Once that is in doubt, asks until it is known."""
        in_doubt = False
        refusals = 0
        while True:
            failpoints.reach("drain.start")
            try:
                started = await start_deliveries(
                    self._database, session_id, self._lane, starting, epoch=self._claimer.epoch
                )
                if in_doubt:  # what is found done may not be on the standby yet
                    await self._database.confirm()
            except SessionEnded:
                raise
            except StoreUnavailable as error:
                in_doubt = in_doubt or isinstance(error, AmbiguousCommit)
                if not in_doubt or self._stopping:
                    raise
                self._outage.met(error)
            except Exception as error:
                refusals += 1
                if not in_doubt or self._stopping:
                    raise
                if refusals >= _REFUSALS:
                    raise SessionGivenUp("a start in doubt is refused for good") from error
            else:
                # Its first try may still be on the way, and must not find these rows claimed anew.
                self._claimer.is_astray |= in_doubt
                return started
            await asyncio.sleep(_RETRY_S)


def _take(waiting: deque[Group], groups: int, deliveries: int) -> list[Group]:
    """The next groups to start together: of one mode, at most so many groups and deliveries."""
    batch: list[Group] = []
    while waiting and len(batch) < groups and (not batch or waiting[0].mode is batch[0].mode):
        deliveries -= len(waiting[0].delivery_ids)
        if deliveries < 0:
            break
        batch.append(waiting.popleft())
    return batch
