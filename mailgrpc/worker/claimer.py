"""Claiming for one drain: what it has under its session's lease and has not started.

Promises. What is claimed is started, or put back, or goes with the session. Where that is in doubt,
`is_astray` says so, and the drain gives back everything of the channel that was not started, under a
new epoch (drain.py).

One claim is made at a time. The next may be made ahead, before the last is started: with a backlog the
worker would otherwise wait for PostgreSQL three times a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mailgrpc import failpoints
from mailgrpc.db.deliveries import claim_due, drop_bereft, release_claims
from mailgrpc.db.engine import Database
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import StoreUnavailable
from mailgrpc.worker.call import Group, group_claims
from mailgrpc.worker.outage import Outage

CLAIM_DELIVERIES = 200
_SOON_S = 0.005


@dataclass(slots=True)
class Batch:
    """What one claim has leased, grouped and read. `is_full`: there may be more."""

    session_id: int
    groups: deque[Group]
    is_full: bool

    @property
    def calls_for_next(self) -> bool:
        """Whether the next claim is wanted: there may be more, and what is left is soon started."""
        return self.is_full and len(self.groups) <= CLAIM_DELIVERIES // 2


class Claimer:
    """Makes the claims of one channel in one worker process."""

    def __init__(
        self,
        database: Database,
        doorbell: Doorbell,
        outage: Outage,
        *,
        channel: str,
        group_max: int,
        has_others: Callable[[], bool],
    ) -> None:
        self._database = database
        self._doorbell = doorbell
        self._outage = outage
        self._channel = channel
        self._group_max = group_max
        self._has_others = has_others
        self.epoch = 0
        """Counts what was given back because its fate was not known (sessions.py)."""
        self.is_astray = False
        """Whether rows may stand in our name that we do not know of."""
        self._after_project = 0
        self._suspect: uuid.UUID | None = None  # passed over by the last claim
        self._ahead: tuple[int, asyncio.Task[Batch | float]] | None = (
            None  # session; the next claim
        )

    async def next(self, session_id: int, *, one: bool = False) -> Batch | float:
        """The claim that was made ahead, or else a new one; or when something will be due, in seconds.

        `one` delivery only: nothing must have been claimed ahead. Raises StoreUnavailable, SessionEnded.
        """
        if (ahead := await self._taken_ahead(session_id)) is not None and ahead.groups:
            return ahead
        # One that found nothing says nothing: whoever rang since was heard before this pass.
        return await self._claim(session_id, 1 if one else CLAIM_DELIVERIES)

    def claim_ahead(self, session_id: int) -> None:
        """Begin to make the next claim, unless that was done."""
        if self._ahead is None:
            claim = asyncio.create_task(self._claim(session_id, CLAIM_DELIVERIES))
            claim.add_done_callback(_heard)
            self._ahead = (session_id, claim)

    async def put_back_ahead(self, session_id: int) -> None:
        """Give back what was claimed ahead: it cannot be started now. Raises what its claim met."""
        if (batch := await self._taken_ahead(session_id)) is not None:
            await self.release(session_id, batch.groups)

    async def drop_ahead(self) -> None:
        """Forget what was claimed ahead: whoever calls gives back all that was claimed."""
        if self._ahead is not None:
            (_, claim), self._ahead = self._ahead, None
            with contextlib.suppress(Exception):
                await claim

    def abandon(self) -> None:
        """Our end must not wait for the store: the session gives back what it holds."""
        if self._ahead is not None:
            self._ahead[1].cancel()

    def lose_track(self) -> None:
        """Something was claimed, or started, and nobody here knows what."""
        self.is_astray = True

    def begin_epoch(self) -> int:
        """All that is astray is about to be given back; the epoch in which nothing of it can come."""
        self.is_astray = False
        self.epoch += 1
        return self.epoch

    async def release(self, session_id: int, groups: Iterable[Group]) -> None:
        """Give back what was claimed and not started."""
        await self._release(session_id, _ids(groups))

    async def _claim(self, session_id: int, most: int) -> Batch | float:
        """Claim, group and read; or when something will be due, in seconds."""
        claims = await claim_due(
            self._database,
            session_id,
            self._channel,
            most,
            self._after_project,
            epoch=self.epoch,
            suspect=self._suspect,
        )
        self._suspect = claims.suspect
        self._outage.over()
        failpoints.reach("drain.claimed")
        claimed = claims.claimed
        if not claimed:
            return math.inf if claims.next_due_in_s is None else max(claims.next_due_in_s, _SOON_S)
        self._after_project = claimed[-1].project_id
        is_full = len(claimed) >= CLAIM_DELIVERIES
        if is_full and self._has_others():
            self._doorbell.ring()  # there is more: wakes the next worker
        groups = deque(await group_claims(self._database, claimed, self._group_max))
        grouped = set(_ids(groups))
        await self._leave_out(
            session_id, [c.delivery_id for c in claimed if c.delivery_id not in grouped]
        )
        return Batch(session_id, groups, is_full)

    async def _taken_ahead(self, session_id: int) -> Batch | None:
        """What was claimed ahead, which is nobody's after that. Raises what its claim met.

        Another channel may have met the end of our session, and begun a new one: then the claim is
        that one's affair, and so is what it met.
        """
        if self._ahead is not None and self._ahead[0] != session_id:
            await self.drop_ahead()
        if self._ahead is None:
            return None
        (_, claim), self._ahead = self._ahead, None
        batch = await claim
        return batch if isinstance(batch, Batch) else None

    async def _leave_out(self, session_id: int, delivery_ids: Sequence[uuid.UUID]) -> None:
        """Drop what was cleared, which would be claimed for ever, and give back the others."""
        if not delivery_ids:
            return
        try:
            await drop_bereft(self._database, session_id, delivery_ids)
        except StoreUnavailable:
            self.lose_track()
        await self._release(session_id, delivery_ids)

    async def _release(self, session_id: int, delivery_ids: Sequence[uuid.UUID]) -> None:
        if not delivery_ids:
            return
        try:
            await release_claims(self._database, session_id, delivery_ids)
        except StoreUnavailable:
            self.lose_track()


def _heard(claim: asyncio.Task[Batch | float]) -> None:
    """Who waits for it is told what it met; at our end nobody waits."""
    if not claim.cancelled():
        claim.exception()


def _ids(groups: Iterable[Group]) -> list[uuid.UUID]:
    return [delivery_id for group in groups for delivery_id in group.delivery_ids]
