"""Credits: what the drain of one channel has given to servers, and what came of it.

See mailgrpc/handover.py for what is promised. A credit is open from its grant until it comes back, or
until a new epoch begins, after which nothing is started with it. What runs in our name by then and is
not expected (record.py) was never told of, or was refused: it is taken back as not sent.

So it is with a credit that was used twice, because a Redis that fell back to an older state granted it
again: the second notice is refused, and begins a new epoch. And each minute all is looked through for
what no notice ever told of.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from mailgrpc import failpoints
from mailgrpc.core.delivery import Cause, Outcome, Result, next_step
from mailgrpc.core.ids import new_id
from mailgrpc.core.retry import DEFAULT_POLICY
from mailgrpc.db.deliveries import Recorded, Started, record_outcomes
from mailgrpc.db.engine import Database
from mailgrpc.db.handover import Handed, read_handed, read_running
from mailgrpc.errors import StoreUnavailable
from mailgrpc.handover import MAIL_COMES_S, MISSING_S, RETRACT_S, Grant, Handover, Notice, Running
from mailgrpc.worker.call import Group, broken
from mailgrpc.worker.journal import Journal
from mailgrpc.worker.pace import Pace
from mailgrpc.worker.record import Recorder
from mailgrpc.worker.sessions import Session
from mailgrpc.worker.wire import Wire

log = logging.getLogger(__name__)

CREDITS = 64
"""Of a grant, at the most."""
_GRANTS = 4
"""Into so many what there is is divided, at the least: for several servers."""
STRAY_S = 60.0
"""After which whatever runs and is not expected is taken back; the look for it comes as often."""
_REST_S = 5.0
"""Without grants, after Redis did not take one or credits did not come back."""
REFUSED_S = 1.0
"""Between two epochs that begin because a notice was refused: whoever writes to Redis may send many."""
_TOLD_KEPT = 20_000
_UNTOLD = Result(
    Outcome.DEFERRED, Cause.WORKER_LOST, text="handed over to a worker that was never told of it"
)
_FORGOTTEN = Result(
    Outcome.UNKNOWN, Cause.WORKER_LOST, text="handed over, and what came of it is lost"
)


@dataclass(slots=True, eq=False)
class _Given:
    grant: Grant
    at: float
    was_asked_back: bool = False


class Credits:
    """The credits of one drain; `on_missing` is told when a new epoch is needed."""

    def __init__(
        self,
        database: Database,
        session: Session,
        recorder: Recorder,
        handover: Handover,
        journal: Journal,
        wire: Wire,
        pace: Pace,
        *,
        channel: str,
        lane: int,
        concurrency: int,
        on_missing: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._session = session
        self._recorder = recorder
        self._handover = handover
        self._journal = journal
        self._wire = wire
        self._pace = pace
        self._channel = channel
        self._lane = lane
        self._concurrency = concurrency
        self._on_missing = on_missing
        self._clock = clock
        self.are_heard = False
        """Whether somebody hears what servers tell. Nothing is given else."""
        self._open: dict[uuid.UUID, _Given] = {}
        self._gives = False
        self._session_id = self._epoch = 0
        self._mail_at = self._rest_until = float("-inf")
        self._strays_at = clock() + STRAY_S
        self._has_given = False  # in this session
        self._has_refused = False
        self._missed_at = clock()
        self._told_of: OrderedDict[uuid.UUID, None] = OrderedDict()  # what may have been sent
        self._told_before: uuid.UUID | None = None  # the last that was forgotten of these
        self._told: list[Running] = []
        self._unread = 0  # of what was told of
        self._reader: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def are_open(self) -> bool:
        """Whether any may come back."""
        return bool(self._open)

    @property
    def are_idle(self) -> bool:
        """Whether a look would find nothing to do, until more are given or calls end."""
        return not (self._open or self._has_refused or self._pace.ahead)

    def allow(self, session_id: int, epoch: int) -> None:
        """All that is due is claimed: give as many as there is room for, from now on."""
        if session_id != self._session_id:
            self.withdraw()
            self._drop(self._told)  # of a session that is over, which the reaper settles
            self._told, self._has_given = [], False
        self._gives, self._session_id, self._epoch = self.are_heard, session_id, epoch
        self.give()

    def forbid(self) -> None:
        """Give no more. What is open stays so until it comes back."""
        self._gives = False

    def note_mail(self) -> None:
        """Something was sent: more may come."""
        self._mail_at = self._clock()

    def note_end(self) -> None:
        """A call has ended: there may be room."""
        self.give()

    def give(self) -> None:
        """Give as many as there is room for, if that is allowed and mail comes in."""
        if not self._gives or self._clock() < self._rest_until:
            return
        most = self._concurrency + self._pace.ahead
        size = min(CREDITS, -(-most // _GRANTS))
        room = min(
            most - self._wire.calls - self._unread - len(self._open),
            # The other half is for what is claimed, on this channel and on others.
            self._journal.room - self._journal.slots // 2,
        )
        if room < size or self._clock() - self._mail_at > MAIL_COMES_S:
            return
        self._has_given = True
        for _ in range(room // size):
            attempts = tuple(new_id() for _ in range(size))
            grant = Grant(self._session_id, self._epoch, self._channel, attempts)
            self._open.update(dict.fromkeys(attempts, _Given(grant, self._clock())))
            self._journal.reserve(size)
            self._spawn(self._lay_out(grant))

    async def _lay_out(self, grant: Grant) -> None:
        if not await self._handover.give(grant):
            self._rest_until = self._clock() + _REST_S  # it may lie there nevertheless

    def note(self, notice: Notice) -> None:
        """A server says what came of credits. What was said before, or too late, is refused."""
        if notice.epoch < self._epoch:
            return  # it started nothing, or what it started was taken back when this epoch began
        mine = [running for running in notice.started if self._close(running[0])]
        self._journal.unreserve(sum(self._close(attempt_id) for attempt_id in notice.unused))
        self._has_refused = self._has_refused or len(mine) < len(notice.started)
        if mine:
            self.note_mail()
            self._recorder.expect(mine)
            self._remember(mine)
            self._told += mine
            self._unread += len(mine)
            if self._reader is None or self._reader.done():
                self._reader = self._spawn(self._read_all())
        self.give()

    async def settle(self) -> None:
        """Return when what was told of is on the wire."""
        while self._reader is not None and not self._reader.done():
            await asyncio.wait({self._reader})

    def look(self) -> None:
        """Take back what no server took; say so when something does not come back. Now and then."""
        now = self._clock()
        self._pace.look()
        given = set(self._open.values())
        refused = self._has_refused and now - self._missed_at > REFUSED_S
        if refused or any(now - each.at > MISSING_S for each in given):
            self._has_refused, self._missed_at = False, now
            self._on_missing()
            return
        for each in given:
            if not each.was_asked_back and now - each.at > RETRACT_S:
                each.was_asked_back = True
                self._spawn(self._retract(each.grant))
        self.give()

    async def _retract(self, grant: Grant) -> None:
        if await self._handover.retract(grant):
            self._journal.unreserve(sum(self._close(attempt) for attempt in grant.attempts))
            self.give()

    def withdraw(self) -> None:
        """Refuse from now on all that is open; no insert uses it once a new epoch has begun."""
        if self._open:
            self._rest_until = self._clock() + _REST_S
        self._journal.unreserve(len(self._open))
        self._open.clear()

    async def take_back(self, session_id: int, running_s: float = 0.0) -> None:
        """Record as not sent what runs in this session, for so long, and is not expected to end.

        After a new epoch has begun, or longer than any notice may take. What we were told of before may
        have been sent, and its result lost with a primary: nobody knows. Raises StoreUnavailable.
        """
        if not self._has_given:
            return
        # Also what is recorded, and not expected any more, while we read.
        expected = self._recorder.expected
        running = await read_running(self._database, session_id, self._channel, running_s)
        expected |= self._recorder.expected
        strays = [
            s
            for s in running
            if (s.attempt_id, s.delivery.delivery_id) not in expected
            and s.attempt_id not in self._open
        ]
        if strays:
            log.warning("%d deliveries were started here and not told of, taken back", len(strays))
            # Not by the recorder: its journal goes by attempts, and one of these may run elsewhere too.
            ended = [_ended(s, _FORGOTTEN if self._knows(s) else _UNTOLD) for s in strays]
            await record_outcomes(self._database, self._lane, ended)

    async def take_back_strays(self, session_id: int) -> None:
        """`take_back` of what no notice told of, once in a while."""
        if self.are_heard and self._clock() >= self._strays_at:
            self._strays_at = self._clock() + STRAY_S
            await self.take_back(session_id, STRAY_S)

    async def abandon(self) -> None:
        """Read nothing more of what was told; the reaper settles it."""
        self.forbid()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def _remember(self, told: Iterable[Running]) -> None:
        self._told_of.update((delivery_id, None) for _, delivery_id in told)
        while len(self._told_of) > _TOLD_KEPT:
            forgotten, _ = self._told_of.popitem(last=False)
            self._told_before = max(forgotten, self._told_before or forgotten)

    def _knows(self, started: Started) -> bool:
        """Whether we may have been told of it: for certain lately, and else as far as ids tell."""
        delivery_id = started.delivery.delivery_id
        is_old = self._told_before is not None and delivery_id <= self._told_before
        return is_old or delivery_id in self._told_of

    def _close(self, attempt_id: uuid.UUID) -> bool:
        """Whether a credit was open; it is not any more."""
        return self._open.pop(attempt_id, None) is not None

    async def _read_all(self) -> None:
        while self._told:
            told, self._told = self._told, []
            session_id = self._session_id
            failpoints.reach("credits.told")
            try:
                handed = await read_handed(self._database, session_id, told)
            except StoreUnavailable:
                self._give_up(told)
            except Exception:
                log.exception("what was handed over cannot be read")
                self._give_up(told)
            else:
                found = {(h.started.attempt_id, h.started.delivery.delivery_id) for h in handed}
                self._drop([running for running in told if running not in found])
                self._unread -= len(handed)
                last_look = functools.partial(self._session.may_send, session_id)
                for each in handed:
                    self._wire.send(_group(each), [each.started], last_look)

    def _give_up(self, told: list[Running]) -> None:
        """It was started and is not sent: to be taken back."""
        for _, delivery_id in told:
            self._told_of.pop(delivery_id, None)
        self._drop(told)
        self._on_missing()

    def _drop(self, told: list[Running]) -> None:
        self._recorder.give_up(told)
        self._journal.unreserve(len(told))
        self._unread -= len(told)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _ended(started: Started, result: Result) -> Recorded:
    """What was not sent is due at once: it has waited, and nothing speaks against it."""
    now = datetime.now(UTC)
    step = next_step(started.delivery, result, now, DEFAULT_POLICY, random.Random())
    if result is _UNTOLD:
        step = replace(step, due_at=now)
    return Recorded.of(started, "", now, result, step)


def _group(handed: Handed) -> Group:
    delivery_id = handed.started.delivery.delivery_id
    try:
        return Group((delivery_id,), handed.content())
    except Exception as error:
        log.exception("the message of %s cannot be read", delivery_id)
        return Group((delivery_id,), None, broken(Outcome.REJECTED, error))
