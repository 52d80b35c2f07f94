"""Places: what a server holds of what workers offer (mailgrpc/handover.py), and gives to a flush.

A flush takes places of one worker and one channel: the messages beside them are queued.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from mailgrpc.core.delivery import Mode
from mailgrpc.db.messages import Inserted, NewMessage, Start
from mailgrpc.handover import HELD_S, Handover, Lot, Word

ENOUGH = 256
"""Of a channel; more are not taken."""
_MAIL_COMES_S = 5.0
"""After the last flush, as long as which more of it is expected."""
_AGAIN_S = 0.5
_TELL_S = 1.0


@dataclass(slots=True)
class _Held:
    lot: Lot
    left: list[uuid.UUID]
    since: float


class Places:
    """The places of one server process. `start` it, `stop` it."""

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
        self._wanted = asyncio.Event()  # mail has come, or places have gone
        self._kept = asyncio.Event()  # places are held
        self._loops: list[asyncio.Task[None]] = []
        self._telling: set[asyncio.Task[None]] = set()

    def start(self, installation: uuid.UUID) -> None:
        """Take places while mail comes in."""
        self._handover.installation = installation
        if self._handover.exists and self._held:
            self._loops = [self._spawn(self._fill()), self._spawn(self._let_go())]

    async def stop(self) -> None:
        """Give back what is held."""
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._give_back(float("inf"))
        if self._telling:
            await asyncio.wait(self._telling, timeout=_TELL_S)

    def start_of(self, new: Sequence[NewMessage]) -> Start | None:
        """Places for what of a flush may be handed over; None where there is nothing, or are none."""
        self._mail_at = self._clock()
        self._wanted.set()
        channel = next((m.channel for m in new if _may_be_handed_over(m)), None)
        held = self._held.get(channel or "")
        if channel is None or not held:
            return None
        first = held[0].lot
        attempts: list[uuid.UUID | None] = []
        for message in new:
            attempt = None
            if message.channel == channel and _may_be_handed_over(message):
                attempt = _next(held, first)
            attempts.append(attempt)
        return Start(first.session_id, first.epoch, channel, attempts)

    def started(self, start: Start, new: Sequence[NewMessage], inserted: Inserted) -> bool:
        """The flush is stored: tells the worker what it is to send. Whether that is all of it."""
        if inserted.unstarted:
            self._drop(start)
            return False
        plain = not inserted.known and not inserted.with_suppressed
        pairs, unused, rest = [], [], 0
        for message, attempt in zip(new, start.attempts, strict=True):
            if attempt is None:
                rest += 1
            elif plain or message.message_id not in inserted.known | inserted.with_suppressed:
                pairs.append((attempt, uuid.UUID(int=message.message_id.int | 1)))
            else:
                unused.append(attempt)
        self._tell(start.session_id, Word(start.channel, pairs, unused))
        return rest == 0

    def unused(self, start: Start) -> None:
        """Nothing was stored, for certain."""
        unused = [attempt for attempt in start.attempts if attempt is not None]
        self._tell(start.session_id, Word(start.channel, (), unused))

    def _drop(self, start: Start) -> None:
        """Forget what is of no use any more: its worker knows that."""
        held = self._held[start.channel]
        kept = [h for h in held if h.lot.session_id != start.session_id]
        held.clear()
        held.extend(kept)

    def _low(self) -> list[str]:
        """The channels of which more places are wanted."""
        if self._clock() - self._mail_at > _MAIL_COMES_S:
            return []
        return [c for c, held in self._held.items() if sum(len(h.left) for h in held) < ENOUGH]

    async def _fill(self) -> None:
        while True:
            self._wanted.clear()
            if not (low := self._low()):
                await self._wanted.wait()
                continue
            asked_at = self._clock()
            lot = await self._handover.taken(low)
            if lot is not None and lot.channel in self._held:
                self._held[lot.channel].append(_Held(lot, list(lot.attempts), self._clock()))
                self._kept.set()
            elif self._clock() - asked_at < _AGAIN_S:
                await asyncio.sleep(_AGAIN_S)  # Redis is away, or only the dead have offered

    async def _let_go(self) -> None:
        while True:
            self._kept.clear()
            if not any(self._held.values()):
                await self._kept.wait()
            await asyncio.sleep(HELD_S / 4)
            self._give_back(self._clock() - HELD_S)

    def _give_back(self, before: float) -> None:
        for channel, held in self._held.items():
            while held and held[0].since <= before:
                old = held.popleft()
                self._tell(old.lot.session_id, Word(channel, (), old.left))
                self._wanted.set()

    def _tell(self, session_id: int, word: Word) -> None:
        if word.started or word.unused:
            telling = self._spawn(self._handover.tell(session_id, word))
            self._telling.add(telling)
            telling.add_done_callback(self._telling.discard)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)


def _may_be_handed_over(new: NewMessage) -> bool:
    """Small, for one recipient, due now, and without harm when it is sent twice."""
    message, options = new.submission.message, new.submission.options
    return (
        len(message.recipients) == 1
        and not message.attachments
        and options.send_at is None
        and options.effective_mode is Mode.RETRYING
    )


def _next(held: deque[_Held], first: Lot) -> uuid.UUID | None:
    """A place of the same worker and epoch as `first`."""
    while held and held[0].lot.session_id == first.session_id and held[0].lot.epoch == first.epoch:
        if held[0].left:
            attempt = held[0].left.pop()
            if not held[0].left:
                held.popleft()
            return attempt
        held.popleft()
    return None
