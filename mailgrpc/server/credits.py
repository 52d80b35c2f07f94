"""Credits: what a server holds of what workers gave (mailgrpc/handover.py), and takes for a flush.

A flush takes the credits of one worker, for one channel: the messages beside them are queued.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mailgrpc import failpoints
from mailgrpc.core.delivery import Mode
from mailgrpc.core.ids import delivery_id
from mailgrpc.db.messages import Inserted, NewMessage, Start
from mailgrpc.handover import HELD_S, MAIL_COMES_S, Grant, Handover, Notice

log = logging.getLogger(__name__)

ENOUGH = 256
"""Of a channel; more are not taken."""
MOST_CHARACTERS = 32 * 1024
"""Of the bodies of what is handed over: a worker reads hundreds of them at once."""
_TELL_S = 1.0
_RETRY_S = 1.0


@dataclass(slots=True)
class _Held:
    grant: Grant
    left: list[uuid.UUID]
    since: float


class Credits:
    """The credits of one server process. `start` it, `stop` it."""

    def __init__(
        self,
        handover: Handover,
        channels: Sequence[str],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handover = handover
        self._held: dict[str, deque[_Held]] = {channel: deque() for channel in channels}
        self._clock = clock
        self._mail_at = float("-inf")
        self._wanted = asyncio.Event()  # mail has come, or credits have gone
        self._kept = asyncio.Event()  # some are held
        self._loops: list[asyncio.Task[None]] = []
        self._telling: set[asyncio.Task[None]] = set()

    def start(self, installation: uuid.UUID) -> None:
        """Take credits while mail comes in."""
        self._handover.installation = installation
        if self._handover.exists and self._held:
            self._loops = [asyncio.create_task(self._fill()), asyncio.create_task(self._let_go())]

    async def stop(self) -> None:
        """Give back what is held."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._give_back_before(float("inf"))
        if self._telling:
            await asyncio.wait(self._telling, timeout=_TELL_S)

    def take_for(self, new: Sequence[NewMessage]) -> Start | None:
        """Credits for what of a flush may be handed over; None where there is nothing, or are none."""
        self._mail_at = self._clock()
        self._wanted.set()
        channel = next((m.channel for m in new if _may_be_handed_over(m)), "")
        if not (held := self._held.get(channel)):
            return None
        first = held[0].grant
        attempts = [
            _next_of(held, first) if m.channel == channel and _may_be_handed_over(m) else None
            for m in new
        ]
        return Start(first.session_id, first.epoch, channel, attempts)

    def note_stored(self, start: Start, new: Sequence[NewMessage], inserted: Inserted) -> bool:
        """The flush is stored: tells the worker what it is to send. Whether that is all of it."""
        if inserted.unstarted:
            self._forget(start)
            return False
        left_out = inserted.known | inserted.with_suppressed
        started, unused = [], []
        for message, attempt in zip(new, start.attempts, strict=True):
            if attempt is not None and message.message_id in left_out:
                unused.append(attempt)
            elif attempt is not None:
                started.append((attempt, delivery_id(message.message_id, 1)))
        if started:
            failpoints.reach("credits.stored")
        self._tell(start.session_id, Notice(start.channel, start.epoch, started, unused))
        return None not in start.attempts

    def give_back(self, start: Start) -> None:
        """Nothing was stored, for certain."""
        unused = [attempt for attempt in start.attempts if attempt is not None]
        self._tell(start.session_id, Notice(start.channel, start.epoch, (), unused))

    def _forget(self, start: Start) -> None:
        """What is of no use any more; its worker knows that."""
        held = self._held[start.channel]
        kept = [
            h for h in held if h.grant.session_id != start.session_id or h.grant.epoch > start.epoch
        ]
        held.clear()
        held.extend(kept)

    def _low(self) -> list[str]:
        """The channels of which more credits are wanted."""
        if self._clock() - self._mail_at > MAIL_COMES_S:
            return []
        return [c for c, held in self._held.items() if sum(len(h.left) for h in held) < ENOUGH]

    async def _fill(self) -> None:
        while True:
            self._wanted.clear()
            if not (low := self._low()):
                await self._wanted.wait()
                continue
            try:
                grant = await self._handover.take(low)
            except Exception:
                log.exception("taking credits failed; it goes on")
                await asyncio.sleep(_RETRY_S)
                continue
            if grant is not None and grant.channel in self._held:
                held = _Held(grant, list(grant.attempts), self._clock())
                self._held[grant.channel].append(held)
                self._kept.set()

    async def _let_go(self) -> None:
        while True:
            self._kept.clear()
            if not any(self._held.values()):
                await self._kept.wait()
            await asyncio.sleep(HELD_S / 4)
            self._give_back_before(self._clock() - HELD_S)

    def _give_back_before(self, moment: float) -> None:
        for channel, held in self._held.items():
            while held and held[0].since <= moment:
                old = held.popleft()
                self._tell(
                    old.grant.session_id, Notice(channel, old.grant.epoch, (), tuple(old.left))
                )
                self._wanted.set()

    def _tell(self, session_id: int, notice: Notice) -> None:
        if notice.started or notice.unused:
            telling = asyncio.get_running_loop().create_task(
                self._handover.tell(session_id, notice)
            )
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)


def _may_be_handed_over(new: NewMessage) -> bool:
    """Small, for one recipient, due now, and to be sent again rather than not at all."""
    message, options = new.submission.message, new.submission.options
    return (
        len(message.recipients) == 1
        and not message.attachments
        and options.send_at is None
        and options.effective_mode is Mode.RETRYING
        and len(message.text) + len(message.html) <= MOST_CHARACTERS
    )


def _next_of(held: deque[_Held], first: Grant) -> uuid.UUID | None:
    """A credit of the same worker and epoch as `first`, if there is one left."""
    if not held or (held[0].grant.session_id, held[0].grant.epoch) != (
        first.session_id,
        first.epoch,
    ):
        return None
    attempt = held[0].left.pop()  # a grant without any is not held
    if not held[0].left:
        held.popleft()
    return attempt
