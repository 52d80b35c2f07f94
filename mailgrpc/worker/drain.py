"""Drain: one loop a channel, from due rows to results. Claim → start → send → record.

Promises. Only what a committed start returned is sent. SEND_ONCE deliveries are started in groups
no larger than the free slots on the wire, so that a crash leaves few in doubt; RETRYING ones may be
started ahead of the wire. A message that breaks the code fails alone. One slow channel holds no
other's slots, because each has its own loop and its own provider.

The loop is woken by a flag that is cleared *before* the claim: a ring that comes during the claim
is not lost, it makes one more claim. Rings come from the doorbell, from the sweeper every second,
and from the clock: a claim that finds nothing answers when the next delivery will be due.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby

from mailgrpc.core.delivery import Cause, Mode, Outcome, Result, next_step, result_text
from mailgrpc.core.ids import message_of, new_id, rfc_message_id
from mailgrpc.core.message import RetryWishes
from mailgrpc.db.deliveries import (
    Recorded,
    Started,
    Starting,
    claim_due,
    release_claims,
    start_deliveries,
)
from mailgrpc.db.engine import Database, SessionEnded
from mailgrpc.db.messages import StoredContent, read_contents
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import StoreUnavailable
from mailgrpc.providers.provider import Addressee, Provider, SendCall
from mailgrpc.worker.record import Recorder
from mailgrpc.worker.sessions import Session

log = logging.getLogger(__name__)

CLAIM_DELIVERIES = 200
STARTED_AHEAD = 64
MAX_UNRECORDED = 2000
_IDLE_S = 60.0  # the sweeper rings long before
_RETRY_S = 0.5
_NO_WISHES = RetryWishes()


@dataclass(frozen=True, slots=True)
class Group:
    """Claimed deliveries of one message that will share a call."""

    delivery_ids: tuple[uuid.UUID, ...]
    content: StoredContent

    @property
    def mode(self) -> Mode:
        """SEND_ONCE or RETRYING, as its message asked."""
        return self.content.options.effective_mode


class Drain:
    """The loop of one channel in one worker process."""

    def __init__(
        self,
        database: Database,
        session: Session,
        recorder: Recorder,
        doorbell: Doorbell,
        *,
        channel: str,
        provider: Provider,
        lane: int,
        concurrency: int,
        rng: random.Random | None = None,
    ) -> None:
        self.channel = channel
        self._database = database
        self._session = session
        self._recorder = recorder
        self._doorbell = doorbell
        self._provider = provider
        self._lane = lane
        self._concurrency = concurrency
        self._rng = rng or random.Random()
        self._slots = asyncio.Semaphore(concurrency)
        self._sending: set[asyncio.Task[None]] = set()
        self._slot_freed = asyncio.Event()
        self._wake = asyncio.Event()
        self._after_project = 0
        self._stopping = False

    def wake(self) -> None:
        """Something may be due."""
        self._wake.set()

    def stop_claiming(self) -> None:
        """Claim and start nothing more; `run` returns and what is on the wire goes on."""
        self._stopping = True
        self._wake.set()
        self._slot_freed.set()

    async def run(self) -> None:
        """Drain until told to stop. Survives PostgreSQL, and the end of its session."""
        while not self._stopping:
            self._wake.clear()
            idle_until = await self._guarded_pass()
            if idle_until is not None and not self._stopping:
                wait_s = (idle_until - datetime.now(UTC)).total_seconds()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), min(max(wait_s, 0.0), _IDLE_S))

    async def settle(self) -> None:
        """Return when nothing of this channel is on the wire."""
        while self._sending:
            await asyncio.wait(self._sending)

    async def _guarded_pass(self) -> datetime | None:
        session_id = self._session.session_id
        try:
            return await self.drain_once()
        except SessionEnded:
            with contextlib.suppress(StoreUnavailable):
                await self._session.renew(session_id)
        except StoreUnavailable as error:
            log.warning("channel %s waits for the store: %s", self.channel, error)
            await asyncio.sleep(_RETRY_S)
        except Exception:
            log.exception("draining channel %s failed; it goes on", self.channel)
            await asyncio.sleep(_RETRY_S)
        return None

    async def drain_once(self) -> datetime | None:
        """Claim one batch and see all of it started. When to look again; None for at once."""
        session_id = self._session.session_id
        claims = await claim_due(
            self._database, session_id, self.channel, CLAIM_DELIVERIES, self._after_project
        )
        if not claims.claimed:
            return claims.next_due_at or datetime.max.replace(tzinfo=UTC)
        self._after_project = claims.claimed[-1].project_id
        if len(claims.claimed) >= CLAIM_DELIVERIES:
            self._doorbell.ring()  # there is more: wakes the next worker
        waiting = deque(await self._grouped([c.delivery_id for c in claims.claimed]))
        try:
            while waiting and not self._stopping:
                room = await self._room(waiting[0].mode)
                batch = _take(waiting, room)
                await self._start(session_id, batch)
        finally:
            left = [i for group in waiting for i in group.delivery_ids]
            if left:
                with contextlib.suppress(StoreUnavailable):
                    await release_claims(self._database, session_id, left)
        return None

    async def _grouped(self, delivery_ids: Sequence[uuid.UUID]) -> list[Group]:
        """Claimed deliveries by message, as many in a group as a call may carry, in their order."""
        by_message: OrderedDict[uuid.UUID, list[uuid.UUID]] = OrderedDict()
        for delivery_id in delivery_ids:
            by_message.setdefault(message_of(delivery_id), []).append(delivery_id)
        contents = await read_contents(self._database, by_message, with_files=True)
        groups = []
        for message_id, ids in by_message.items():
            if message_id not in contents:  # cleared since; its rows in `due` went with it
                continue
            ids.sort()
            for first in range(0, len(ids), self._provider.group_max):
                part = tuple(ids[first : first + self._provider.group_max])
                groups.append(Group(part, contents[message_id]))
        return groups

    async def _room(self, mode: Mode) -> int:
        """How many groups may be started now; waits until it is at least one."""
        ahead = 0 if mode is Mode.SEND_ONCE else STARTED_AHEAD
        while not self._stopping:
            self._slot_freed.clear()
            room = self._concurrency + ahead - len(self._sending)
            if room > ahead // 2 and len(self._recorder) < MAX_UNRECORDED:
                return room
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._slot_freed.wait(), _RETRY_S)
        return 0

    async def _start(self, session_id: int, batch: Sequence[Group]) -> None:
        """Commit the start of these groups, then send what came back of each."""
        calls = [new_id() for _ in batch]
        started = await start_deliveries(
            self._database,
            session_id,
            self._lane,
            [
                Starting(delivery_id, new_id(), call_id)
                for group, call_id in zip(batch, calls, strict=True)
                for delivery_id in group.delivery_ids
            ],
        )
        self._doorbell.hint_feed()
        by_call = {
            call_id: list(members)
            for call_id, members in groupby(
                sorted(started, key=lambda s: s.call_id), key=lambda s: s.call_id
            )
        }
        for group, call_id in zip(batch, calls, strict=True):
            if call_id in by_call:
                task = asyncio.create_task(self._send(group.content, call_id, by_call[call_id]))
                self._sending.add(task)
                task.add_done_callback(self._sent)

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        self._slot_freed.set()

    async def _send(
        self, content: StoredContent, call_id: uuid.UUID, started: Sequence[Started]
    ) -> None:
        """One call to the provider, and its results to the recorder."""
        async with self._slots:
            try:
                results = await self._call(content, call_id, started)
                if len(results) != len(started):
                    raise RuntimeError(f"{len(results)} results for {len(started)} deliveries")
            except Exception as error:
                log.exception("sending call %s failed", call_id)
                results = [_broken(error)] * len(started)
        now = datetime.now(UTC)
        policy = (content.options.retry or _NO_WISHES).policy()
        self._recorder.put(
            [
                Recorded(
                    s,
                    self._provider.name,
                    now,
                    result,
                    next_step(s.delivery, result, now, policy, self._rng),
                )
                for s, result in zip(started, results, strict=True)
            ]
        )

    async def _call(
        self, content: StoredContent, call_id: uuid.UUID, started: Sequence[Started]
    ) -> list[Result]:
        message = content.message
        if message is None or message.sender is None:
            gone = Result(Outcome.REJECTED, Cause.CONTENT, text="the content has been erased")
            return [gone] * len(started)
        message_id = message_of(started[0].delivery.delivery_id)
        addressees = [
            Addressee(
                s.delivery.delivery_id,
                message.recipients[(s.delivery.delivery_id.int & 0xFFFF) - 1],
            )
            for s in started
        ]
        return await self._provider.send(
            SendCall(
                call_id=call_id,
                message_id=message_id,
                project=content.project,
                message=message,
                rfc_message_id=rfc_message_id(message_id, message.sender.address),
                created_at=content.created_at,
                addressees=addressees,
                last_look=self._session.may_send,
            )
        )


def _take(waiting: deque[Group], room: int) -> list[Group]:
    """The next groups to start together: of one mode, at most `room`."""
    batch: list[Group] = []
    while waiting and len(batch) < room and (not batch or waiting[0].mode is batch[0].mode):
        batch.append(waiting.popleft())
    return batch


def _broken(error: Exception) -> Result:
    """A provider that raised: a fault of ours, and nobody knows how far it came."""
    text = result_text(f"{type(error).__name__}: {error}")
    return Result(Outcome.UNKNOWN, Cause.INTERNAL, text=text)
