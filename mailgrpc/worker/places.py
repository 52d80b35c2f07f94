"""Places: what the drain of one channel has offered to servers, and what came of it.

See mailgrpc/handover.py for what is promised. A place is open from its offer until it comes back, or
until a new epoch begins, after which nothing is started with it. What runs in our name by then and is
not expected here was never told of, or was refused: it is taken back as not sent.

So it is with a place that was used twice, because a Redis that fell back to an older state offered it
again: the second word is refused, and begins a new epoch. And each minute all is looked through for what
no word ever told of.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from mailgrpc import failpoints
from mailgrpc.core.delivery import Cause, Outcome, Result, next_step
from mailgrpc.core.ids import new_id
from mailgrpc.core.retry import DEFAULT_POLICY
from mailgrpc.db.deliveries import Recorded, Started
from mailgrpc.db.engine import Database
from mailgrpc.db.handover import Handed, read_handed, read_running
from mailgrpc.errors import StoreUnavailable
from mailgrpc.handover import MISSING_S, RETRACT_S, Handover, Lot, Word
from mailgrpc.worker.call import Group, broken
from mailgrpc.worker.journal import Journal
from mailgrpc.worker.record import Attempt, Recorder
from mailgrpc.worker.sessions import Session
from mailgrpc.worker.wire import Wire

log = logging.getLogger(__name__)

LOT = 64
AHEAD = 448
"""Places beside those of the slots: a server that takes much mail in has to have some at hand."""
_MAIL_COMES_S = 5.0
_REST_S = 5.0
"""Without offers, after Redis did not take one or places did not come back."""
STRAY_S = 60.0
"""After which whatever runs and is not expected is taken back; the look for it comes as often."""
_UNTOLD = Result(
    Outcome.DEFERRED, Cause.WORKER_LOST, text="handed over to a worker that was never told of it"
)


@dataclass(slots=True, eq=False)
class _Offered:
    lot: Lot
    at: float
    left: int
    has_been_looked_for: bool = False


class Places:
    """The places of one drain.

    `opened` is set when some are offered; `is_missing` is told that a new epoch is needed.
    """

    def __init__(
        self,
        database: Database,
        session: Session,
        recorder: Recorder,
        handover: Handover,
        journal: Journal,
        wire: Wire,
        *,
        channel: str,
        concurrency: int,
        opened: asyncio.Event,
        is_missing: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._session = session
        self._recorder = recorder
        self._handover = handover
        self._journal = journal
        self._wire = wire
        self._channel = channel
        self._most = concurrency + AHEAD
        self.opened = opened
        self._is_missing = is_missing
        self._clock = clock
        self._rng = random.Random()
        self.are_heard = False
        """Whether somebody hears what servers tell. Nothing is offered else."""
        self._open: dict[uuid.UUID, _Offered] = {}
        self._offers = False
        self._session_id = self._epoch = 0
        self._mail_at = self._rest_until = float("-inf")
        self._strays_at = clock() + STRAY_S
        self._told: list[Attempt] = []
        self._reader: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def is_open(self) -> bool:
        """Whether anything may come back."""
        return bool(self._open)

    def allow(self, session_id: int, epoch: int) -> None:
        """All that is due is claimed: offer what there is room for, from now on."""
        if session_id != self._session_id:
            self.withdraw()
        self._offers, self._session_id, self._epoch = self.are_heard, session_id, epoch
        self.offer()

    def forbid(self) -> None:
        """Offer nothing more. What is open stays so until it comes back."""
        self._offers = False

    def note_mail(self) -> None:
        """Something was sent: more may come."""
        self._mail_at = self._clock()

    def offer(self) -> None:
        """Offer what there is room for, if that is allowed and mail comes in."""
        if not self._offers or self._clock() < self._rest_until:
            return
        room = min(
            self._most - self._wire.calls - len(self._open),
            # The other half is for what is claimed, on this channel and on others.
            self._journal.room - self._journal.slots // 2,
        )
        if room < LOT or self._clock() - self._mail_at > _MAIL_COMES_S:
            return
        for _ in range(room // LOT):
            attempts = tuple(new_id() for _ in range(LOT))
            lot = Lot(self._session_id, self._epoch, self._channel, attempts)
            offered = _Offered(lot, self._clock(), LOT)
            self._open.update(dict.fromkeys(attempts, offered))
            self._journal.reserve(LOT)
            self._spawn(self._lay_out(lot))
        self.opened.set()

    async def _lay_out(self, lot: Lot) -> None:
        if not await self._handover.offer(lot):
            self._rest_until = self._clock() + _REST_S  # it may lie there nevertheless

    def note(self, word: Word) -> None:
        """A server has said what came of places. What was said before, or too late, is refused."""
        mine = [each for each in word.started if self._close(each[0])]
        self._journal.unreserve(sum(self._close(attempt_id) for attempt_id in word.unused))
        if len(mine) < len(word.started):
            self._is_missing()
        if mine:
            self.note_mail()
            self._recorder.expect(mine)
            self._told += mine
            if self._reader is None or self._reader.done():
                self._reader = self._spawn(self._read_all())
        self.offer()

    async def settle(self) -> None:
        """Return when what was told is on the wire."""
        while self._reader is not None and not self._reader.done():
            await asyncio.wait({self._reader})

    async def look(self) -> None:
        """Take back what no server took; look for what has not come back. Now and then."""
        now = self._clock()
        for offered in set(self._open.values()):
            if not offered.has_been_looked_for and now - offered.at > RETRACT_S:
                offered.has_been_looked_for = True
                if await self._handover.retract(offered.lot):
                    back = sum(self._close(attempt) for attempt in offered.lot.attempts)
                    self._journal.unreserve(back)
            elif now - offered.at > MISSING_S and offered.left:
                self._is_missing()
                return
        self.offer()

    def withdraw(self) -> None:
        """Refuse from now on all that is open; no insert uses it once a new epoch has begun."""
        if self._open:
            self._rest_until = self._clock() + _REST_S
        self._journal.unreserve(len(self._open))
        self._open.clear()

    async def take_back(self, session_id: int, running_s: float = 0.0) -> int:
        """Record as not sent what runs in this session, for so long, and is not expected to end.

        After a new epoch has begun, or longer than any word may take. How many that were. Raises
        StoreUnavailable.
        """
        running = await read_running(self._database, session_id, self._channel, running_s)
        strays = [started for started in running if not self._recorder.expects(started)]
        if strays:
            log.warning("%d deliveries were started here and not told of, taken back", len(strays))
            # Not by the journal, whose entries are attempts: this one may have been used twice.
            self._recorder.take_over([self._not_sent(started) for started in strays])
        return len(strays)

    async def take_back_strays(self, session_id: int) -> int:
        """`take_back` of what no word told of, once in a while."""
        if not self.are_heard or self._clock() < self._strays_at:
            return 0
        self._strays_at = self._clock() + STRAY_S
        return await self.take_back(session_id, STRAY_S)

    def _close(self, attempt_id: uuid.UUID) -> bool:
        """Whether a place was open; it is not any more."""
        offered = self._open.pop(attempt_id, None)
        if offered is not None:
            offered.left -= 1
        return offered is not None

    async def _read_all(self) -> None:
        while self._told:
            told, self._told = self._told, []
            session_id = self._session_id
            failpoints.reach("places.told")
            try:
                handed = await read_handed(self._database, session_id, told)
            except Exception as error:
                if not isinstance(error, StoreUnavailable):
                    log.exception("what was handed over cannot be read")
                self._recorder.give_up(told)
                self._journal.unreserve(len(told))
                self._is_missing()
                continue
            found = {(h.started.attempt_id, h.started.delivery.delivery_id) for h in handed}
            self._recorder.give_up(each for each in told if each not in found)
            self._journal.unreserve(len(told) - len(handed))
            last_look = functools.partial(self._session.may_send, session_id)
            for each in handed:
                self._wire.send(_group(each), [each.started], last_look)

    def _not_sent(self, started: Started) -> Recorded:
        now = datetime.now(UTC)
        step = next_step(started.delivery, _UNTOLD, now, DEFAULT_POLICY, self._rng)
        return Recorded.of(started, "", now, _UNTOLD, replace(step, due_at=now))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _group(handed: Handed) -> Group:
    delivery_id = handed.started.delivery.delivery_id
    try:
        return Group((delivery_id,), handed.content())
    except Exception as error:
        log.exception("the message of %s cannot be read", delivery_id)
        return Group((delivery_id,), None, broken(Outcome.REJECTED, error))
