"""Worker sessions: who holds which leases, and who decides that somebody is gone.

Promises. A delivery is started by one session at a time, and while some worker lives nothing stays
with a session that has ended.

How. A session is a row with a beat counter. It beats by one UPDATE; its leases are the rows of
`due` that carry its id, so renewing them costs nothing. The reaper, which runs in every worker,
judges a silence by no wall clock: it ends a session whose beat it has itself seen unchanged for the whole
lease, by its own monotonic clock, with PostgreSQL answering throughout. An outage of PostgreSQL
stops all beats at once, so whatever the reaper had seen before it counts for nothing after it.

The lease is the session's own and stands in its row: a worker that was started with another
setting is judged by what it promised itself, not by who looks. The beat has a connection of its
own, with a short patience, so that it neither waits behind claims nor lets one silent connection
pass for a whole lease.

A session that was ended claims and starts nothing more: claims and starts take its row, shared, inserts
that start by its credit (credits.py) its number, and the ending waits for them. One that has not been
heard in time starts nothing either (`may_send`), though its row may stand: what it started would be
refused by the last look. What it had on the wire is still recorded, by the rule on late results.

What comes late. A network may deliver a statement after its worker gave it up, on a connection that
is long replaced. An ending would refuse it; a session that lives would not, and what such a claim
leases nobody knows of. So the claims of a channel are counted in epochs: a worker in doubt begins a
new one before it gives everything back, and what belongs to an older one then does nothing
(`claim_due`, `start_deliveries` and `enqueue_messages` in the database).

The last look. Between a worker's last beat and the moment a reaper may act lies the lease. A send
begins its last, irrevocable write only while the worker's own clock says that this time is not
over (CLOCK_BOOTTIME where there is one: it goes on while the machine sleeps). The look counts from
before the beat was sent, and keeps a margin for the write itself. It is bound to the session that
started the attempt: a new one must not speak for what an old one has lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from mailgrpc import failpoints
from mailgrpc.db.engine import Database, SessionEnded
from mailgrpc.db.workers import (
    beat,
    begin_epoch,
    end_session,
    mark_reaped,
    open_session,
    release_unstarted,
)
from mailgrpc.errors import StoreUnavailable
from mailgrpc.worker.outage import Outage

log = logging.getLogger(__name__)

BEATS_A_LEASE = 5
_MARGIN = 0.2  # of the lease, kept for the write after the last look
_RETRY_S = 0.5
_CLOSE_S = 5.0


def boot_clock() -> float:
    """Seconds that also pass while the machine sleeps, where the system can tell."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Session:
    """The session of this process: one at a time, a new one when the reaper ended the last.

    `beats` is the database by the connection of the beat. `state` says with each beat why nothing
    is started (empty: it is) and which channels are paused.
    """

    def __init__(
        self,
        database: Database,
        name: str,
        channels: Sequence[str],
        outage: Outage | None = None,
        *,
        lease_s: float,
        beats: Database | None = None,
        state: Callable[[], tuple[str, Sequence[str]]] = lambda: ("", ()),
        clock: Callable[[], float] = boot_clock,
    ) -> None:
        self._database = database
        self._beats = beats or database
        self._state = state
        self._name = name
        self._channels = channels
        self._outage = outage or Outage()
        self._lease_s = lease_s
        self._clock = clock
        self._beaten_at = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self._opening = asyncio.Lock()
        self._id = 0

    @property
    def session_id(self) -> int:
        """Under which claims and starts are made."""
        return self._id

    async def start(self) -> None:
        """Open a session and keep it alive. Raises StoreUnavailable."""
        await self._open()
        self._task = asyncio.create_task(self._keep_alive())

    async def renew(self, ended_id: int) -> None:
        """Session `ended_id` was told to have ended: go on in a new one. Raises StoreUnavailable.

        Several loops are told at once; one of them opens it.
        """
        async with self._opening:
            if ended_id == self._id:
                log.warning("worker session %d was ended; taking a new one", ended_id)
                await self._open()

    async def give_back(self, session_id: int, channel: str, epoch: int) -> None:
        """Release what this session holds of a channel and has not started, and begin a new epoch.

        Claims whose answer was lost are waited for, so that they are seen, and those that did not
        come to PostgreSQL yet will take nothing. Raises SessionEnded, StoreUnavailable.
        """
        asked_at = self._clock()
        if not await begin_epoch(self._database, session_id, channel, epoch, *self._state()):
            raise SessionEnded(f"worker session {session_id} has ended")
        self._heard(session_id, asked_at)
        await release_unstarted(self._database, session_id, lost=False, channel=channel)

    async def give_up(self, session_id: int) -> None:
        """End a session of ours that has started what it does not know of. Raises StoreUnavailable.

        What is on the wire has a lease to come back.
        """
        await release_unstarted(self._database, session_id, lost=False)
        await end_session(self._database, session_id, settle_after_s=self._lease_s)
        await release_unstarted(self._database, session_id, lost=False)

    def may_send(self, session_id: int) -> bool:
        """The last look: whether nobody can have taken over what `session_id` has started."""
        until = self._beaten_at + self._lease_s * (1 - _MARGIN)
        return session_id == self._id and self._clock() < until

    async def stop(self, within_s: float = _CLOSE_S, *, leaves_results: bool = False) -> None:
        """End the session. What is still SENDING in it is left to the reaper of another worker.

        With `leaves_results`, in a journal, what it has started is settled no earlier than after a
        lease, by PostgreSQL's clock, as it would be after a kill: whoever takes the journal over must
        not come after the reaper.
        """
        session_id, self._id = self._id, 0
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            async with asyncio.timeout(within_s):
                # Before, so that no reaper finds it first and takes it for left by a death; and after,
                # because a claim that was under way came to its end before the session did.
                await release_unstarted(self._database, session_id, lost=False)
                settle_after_s = self._lease_s if leaves_results else 0.0
                await end_session(self._database, session_id, settle_after_s=settle_after_s)
                await release_unstarted(self._database, session_id, lost=False)
                await mark_reaped(self._database, session_id)
        except (StoreUnavailable, TimeoutError) as error:
            log.warning("the session could not be closed, it will be reaped: %s", error)

    async def _open(self) -> None:
        asked_at = self._clock()
        self._id = await open_session(self._database, self._name, self._channels, self._lease_s)
        self._beaten_at = asked_at

    async def _beat(self, database: Database, session_id: int) -> bool:
        """Beat once; whether the session still stands."""
        failpoints.reach("sessions.beat")
        asked_at = self._clock()
        if not await beat(database, session_id, *self._state()):
            return False
        self._heard(session_id, asked_at)
        return True

    def _heard(self, session_id: int, asked_at: float) -> None:
        if session_id == self._id:
            self._beaten_at = max(self._beaten_at, asked_at)

    async def _keep_alive(self) -> None:
        every_s = self._lease_s / BEATS_A_LEASE
        while True:
            await asyncio.sleep(every_s)
            await self._beat_until_heard()

    async def _beat_until_heard(self) -> None:
        while True:
            session_id = self._id
            try:
                if not await self._beat(self._beats, session_id):
                    await self.renew(session_id)
                return
            except StoreUnavailable as error:
                self._outage.met(error)
            except Exception:
                log.exception("the beat failed; it goes on")
            await asyncio.sleep(_RETRY_S)
