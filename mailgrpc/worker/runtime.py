"""The worker as a whole: one session, a drain a channel, the recorder, the sweeper, the doorbell."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Mapping

from mailgrpc.config import Settings
from mailgrpc.db.engine import Database
from mailgrpc.db.schema import check_schema
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import SettingsError
from mailgrpc.providers.provider import Provider
from mailgrpc.providers.registry import open_channels
from mailgrpc.worker.drain import Drain
from mailgrpc.worker.expiry import Expiry
from mailgrpc.worker.outage import Outage
from mailgrpc.worker.record import Recorder
from mailgrpc.worker.sessions import Session
from mailgrpc.worker.sweep import Reaper, Sweeper

log = logging.getLogger(__name__)

_RING_WAIT_S = 10.0


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
        lane = secrets.randbelow(settings.feed_lanes)
        name = f"{os.uname().nodename}:{os.getpid()}"
        outage = Outage()
        self._session = Session(database, name, sorted(channels), outage, lease_s=settings.lease_s)
        self._recorder = Recorder(database, self._doorbell, outage, lane=lane)
        self._drains = [
            Drain(
                database,
                self._session,
                self._recorder,
                self._doorbell,
                outage,
                channel=channel,
                provider=provider,
                lane=lane,
                concurrency=settings.send_concurrency,
            )
            for channel, provider in channels.items()
        ]
        self._sweeper = Sweeper(
            database,
            Reaper(database, lane=lane, lease_s=settings.lease_s),
            Expiry(database, lane=lane),
            self.wake,
            event_retention_s=settings.event_retention_s,
            outage=outage,
        )
        self._running: list[asyncio.Task[None]] = []
        self._helping: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Open the session and begin. Raises SchemaError, StoreUnavailable."""
        await check_schema(self._database)
        await self._session.start()
        self._running = [asyncio.create_task(drain.run()) for drain in self._drains]
        self._helping = [
            asyncio.create_task(self._sweeper.run()),
            asyncio.create_task(self._sweeper.run_chores()),
            asyncio.create_task(self._listen()),
        ]

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

        What is still on the wire then is left to the reaper of another worker.
        """
        grace_s = self._settings.grace_s if grace_s is None else grace_s
        self.stop_claiming()
        for task in self._helping:
            task.cancel()
        try:
            async with asyncio.timeout(grace_s):
                await asyncio.gather(*self._running)
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
        await self._session.stop()
        for provider in self._channels.values():
            await provider.close()
        await self._doorbell.close()

    async def burst(self) -> None:
        """Send what is due now, then return; what waits for later is left. Do not `start` it.

        Raises SchemaError, StoreUnavailable, SessionEnded.
        """
        await check_schema(self._database)
        await self._session.start()
        try:
            await self._sweeper.sweep()
            for drain in self._drains:
                await drain.burst()
        finally:
            await self.stop()

    async def _listen(self) -> None:
        while True:
            try:
                if await self._doorbell.heard_ring(_RING_WAIT_S):
                    self.wake()
            except Exception:
                log.exception("listening to the doorbell failed; it goes on")
                await asyncio.sleep(1)
