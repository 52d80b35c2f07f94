"""The worker as a whole: one session, a drain a channel, the recorder, the sweeper, the doorbell."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Mapping, Sequence

from mailgrpc.config import Settings
from mailgrpc.db.deliveries import Recorded
from mailgrpc.db.engine import Database
from mailgrpc.db.schema import check_schema, read_installation
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import SettingsError
from mailgrpc.handover import LOOK_S, Handover
from mailgrpc.providers.provider import Provider
from mailgrpc.providers.registry import open_channels
from mailgrpc.worker.drain import Drain
from mailgrpc.worker.expiry import Expiry
from mailgrpc.worker.journal import Journal
from mailgrpc.worker.outage import Outage
from mailgrpc.worker.pace import AHEAD_S
from mailgrpc.worker.record import Recorder
from mailgrpc.worker.sessions import BEATS_A_LEASE, Session
from mailgrpc.worker.sweep import Reaper, Sweeper

log = logging.getLogger(__name__)

_RING_WAIT_S = 10.0
_IDLE_LOOK_S = AHEAD_S - LOOK_S
"""Longer between two looks while nothing goes out: each wakening costs up to a millisecond on a machine
that sleeps. Not longer, or more than goes out in AHEAD_S could end before the pace is looked at."""
_WIRE_SHARE = 0.7  # of the grace time, for what is on the wire
_SESSION_SHARE = 0.8  # until then the session is over; the rest is for connections that are silent
_BEATS_CLOSE_S = 0.4  # nobody waits for a beat any more
PATIENCE_S = 10.0
"""For a statement of the hot path: none of them takes a tenth of it, and a lease is not much more."""


class Worker:
    """One worker over one database. `start` it, `stop` it; or `burst`: what is due, and no more.

    `channels` replaces those of the settings (tests hand in a capture provider).
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        *,
        channels: Mapping[str, Provider] | None = None,
    ) -> None:
        if channels is None:
            channels = open_channels(
                settings.channels,
                concurrency=settings.send_concurrency,
                attempt_timeout_s=settings.attempt_timeout_s,
            )
        if not channels:
            raise SettingsError("no channel is configured: set MAILGRPC_CHANNEL_URL")
        self._settings = settings
        self._database = database
        self._channels = channels
        self._doorbell = Doorbell(settings.redis_url)
        self._handover = Handover(self._doorbell)
        lane = secrets.randbelow(settings.feed_lanes)
        name = f"{os.uname().nodename}:{os.getpid()}"
        outage = Outage()
        swift = database.with_patience(PATIENCE_S)
        self._journal = Journal(settings.journal_dir or settings.data_dir / "journal")
        # The beat must not wait behind claims, nor a silent connection pass for a whole lease.
        self._beats = Database(settings.database_url, pool_size=1)
        self._session = Session(
            swift,
            name,
            sorted(channels),
            outage,
            lease_s=settings.lease_s,
            beats=self._beats.with_patience(settings.lease_s / BEATS_A_LEASE),
            state=self._state,
        )
        self._recorder = Recorder(swift, self._doorbell, outage, self._journal, lane=lane)
        reaper = Reaper(swift, lane=lane)
        self._drains = [
            Drain(
                swift,
                self._session,
                self._recorder,
                self._doorbell,
                outage,
                self._journal,
                channel=channel,
                provider=provider,
                lane=lane,
                concurrency=settings.send_concurrency,
                has_others=lambda: reaper.sees_others,
                handover=self._handover,
            )
            for channel, provider in channels.items()
        ]
        self._sweeper = Sweeper(
            database,
            reaper,
            Expiry(swift, lane=lane),
            self.wake,
            self._adopt,
            event_retention_s=settings.event_retention_s,
            retention_days=settings.retention_days,
            lane=lane,
            outage=outage,
            swift=swift,
        )
        self._running: list[asyncio.Task[None]] = []
        self._helping: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the session and begin. Raises SchemaError, StoreUnavailable."""
        await self._begin()
        self._running = [asyncio.create_task(drain.run()) for drain in self._drains]
        self._helping = [
            asyncio.create_task(self._sweeper.run()),
            asyncio.create_task(self._sweeper.run_chores()),
            asyncio.create_task(self._listen()),
            asyncio.create_task(self._hear()),
            asyncio.create_task(self._look()),
        ]

    @property
    def held(self) -> str:
        """Why nothing is started; empty: it is."""
        return self._journal.trouble

    def wake(self) -> None:
        """Something may be due, on any channel."""
        for drain in self._drains:
            drain.wake()

    def stop_claiming(self) -> None:
        """Claim and start nothing more; what is on the wire goes on."""
        for drain in self._drains:
            drain.stop_claiming()

    async def stop(self, grace_s: float | None = None) -> None:
        """End: no new claims, what is on the wire is awaited and recorded, within the grace time.

        What is still on the wire then is left to the reaper of another worker, and what is not
        recorded stays in the journal.
        """
        grace_s = self._settings.grace_s if grace_s is None else grace_s
        clock = asyncio.get_running_loop().time
        began_at = clock()
        self.stop_claiming()
        for task in self._helping:
            task.cancel()
        try:
            async with asyncio.timeout_at(began_at + grace_s * _WIRE_SHARE):
                for ended in await asyncio.gather(*self._running, return_exceptions=True):
                    if isinstance(ended, Exception):
                        log.error("a drain had ended", exc_info=ended)
                for drain in self._drains:
                    await drain.settle()
                await self._recorder.drain()
        except TimeoutError:
            log.warning("not all that was on the wire ended within %g s", grace_s)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, *self._helping, return_exceptions=True)
        for drain in self._drains:
            await drain.abandon()
        await self._recorder.close()
        await self._session.stop(
            max(0.0, began_at + grace_s * _SESSION_SHARE - clock()),
            leaves_results=len(self._recorder) > 0,
        )
        await self._journal.close()
        await asyncio.gather(
            *(provider.close() for provider in self._channels.values()),
            self._doorbell.close(),
            self._beats.close(_BEATS_CLOSE_S),
            return_exceptions=True,  # what does not close goes with the process
        )

    async def burst(self) -> None:
        """Send what is due now, then return; what waits for later is left. Do not `start` it.

        Raises SchemaError, StoreUnavailable, SessionEnded.
        """
        await self._begin()
        try:
            if self._journal.trouble:
                raise SettingsError(f"MAILGRPC_JOURNAL_DIR: {self._journal.trouble}")
            await self._recorder.flushed()
            await self._sweeper.sweep()
            for drain in self._drains:
                await drain.burst()
        finally:
            await self.stop()

    async def _begin(self) -> None:
        await check_schema(self._database)
        self._handover.installation = await read_installation(self._database)
        left = await self._journal.open(self._handover.installation)
        await self._session.start()
        self._take_over(left)

    async def _adopt(self) -> None:
        """Record what dead neighbours on this journal's directory left there."""
        try:
            found = await self._journal.adopt()
        except Exception as error:  # noqa: BLE001  the sweeping must go on
            log.warning("the journals of other workers cannot be looked at: %s", error)
            return
        self._take_over(found)
        if found:
            await self._recorder.flushed()

    def _take_over(self, found: Sequence[Recorded]) -> None:
        if found:
            log.warning("%d results of a worker that ended are taken from its journal", len(found))
            self._recorder.take_over(found)

    def _state(self) -> tuple[str, Sequence[str]]:
        """Why nothing is started, and the channels that pause: said with each beat."""
        paused = [drain.channel for drain in self._drains if not drain.breaker.is_closed]
        return self.held, paused

    async def _listen(self) -> None:
        while True:
            try:
                if await self._doorbell.heard_ring(_RING_WAIT_S):
                    self.wake()
            except Exception:
                log.exception("listening to the doorbell failed; it goes on")
                await asyncio.sleep(1)

    async def _hear(self) -> None:
        """Hear what servers tell, while they have any credit."""
        by_channel = {drain.channel: drain.credits for drain in self._drains}
        notice = None
        while True:
            try:
                # What comes too late is read as well: it would be met with the next credit.
                if notice is None and not any(each.are_open for each in by_channel.values()):
                    self._handover.has_given.clear()
                    await self._handover.has_given.wait()
                notice = await self._handover.hear(self._session.session_id)
                if notice is not None and notice.channel in by_channel:
                    by_channel[notice.channel].note(notice)
            except Exception:
                log.exception("hearing what is handed over failed; it goes on")
                await asyncio.sleep(1)

    async def _look(self) -> None:
        """Look after the credits that servers have; seldom where there are none."""
        while True:
            if all(drain.credits.are_idle for drain in self._drains):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_IDLE_LOOK_S):
                        await self._handover.has_given.wait()
            await asyncio.sleep(LOOK_S)
            for drain in self._drains:
                try:
                    drain.credits.look()
                except Exception:
                    log.exception("looking after credits failed; it goes on")
