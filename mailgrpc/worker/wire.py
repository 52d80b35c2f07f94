"""The wire of one channel: what was started is sent here, and what came of it goes to the recorder.

Promises. Whatever breaks, what was started has a result: at worst that nobody knows. Each result
has its place in the journal before its delivery is started (`room`). When the channel fails as a
whole, what had been started and not yet sent comes back unsent (breaker.py). What is sent here is
expected by the recorder until it is recorded: whatever else runs in our name is not (credits.py).

How. What was started ahead waits in a line. A slot is a task that goes from one call of the line to
the next and ends when there is none: a task for each call would cost a tenth of what a call does. While
a provider waits for the answer to one call it may ask for the next of this slot, to begin it already
(`SendCall.following`). That is under way then: it is made though the channel begins to pause, and tells no
more about it than what was asked before the pause. Where its turn does not come soon it goes back to the line.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from mailgrpc import failpoints
from mailgrpc.core.delivery import Mode, Outcome, Result, next_step, result_text
from mailgrpc.core.retry import DEFAULT_POLICY, RetryPolicy
from mailgrpc.db.deliveries import Recorded, Started
from mailgrpc.providers.provider import Provider, SendCall, worker_lost
from mailgrpc.worker.breaker import Breaker
from mailgrpc.worker.call import Group, broken, call_of, call_provider
from mailgrpc.worker.journal import Journal
from mailgrpc.worker.pace import Pace
from mailgrpc.worker.record import Recorder

log = logging.getLogger(__name__)

STARTED_AHEAD = 128
"""At the least, of what may wait: until its pace is known, a channel is not kept waiting for starts."""
MAX_UNRECORDED = 2000
_NO_PAUSE = timedelta()
_BOUND_S = 1.0
"""How long a call may be bound to the one before it: no mail is to be held up by another."""
_SMALL = 64 * 1024  # characters of a text or HTML that is rendered while another mail waits
_IN_A_ROW = 2
"""Calls of one slot, after which it waits for a turn. All slots go on in the same one: there are dozens."""


@dataclass(slots=True, eq=False)
class _Call:
    """What was started of a group, its places in the journal reserved."""

    group: Group
    started: Sequence[Started]
    last_look: Callable[[], bool]
    probe: asyncio.Future[None] | None  # done when the call has ended
    asked: SendCall | Result | None = None
    """What the provider is asked, or why it is not: set before its turn where it was asked for."""
    bound_at: float | None = None
    """When that was. It is made then, by whatever slot: the provider keeps a connection for it."""


class _Slot:
    """The call under way on one connection's worth of a line, and that which was asked for behind it."""

    __slots__ = ("_wire", "call", "upcoming")

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.call: _Call | None = None
        self.upcoming: _Call | None = None

    def follow(self) -> SendCall | None:
        """The call that comes next here, for a provider that can begin it already."""
        return self._wire.bind_next(self)


class Wire:
    """The provider calls of one channel in one worker process, `concurrency` at once."""

    def __init__(
        self,
        provider: Provider,
        recorder: Recorder,
        journal: Journal,
        breaker: Breaker,
        pace: Pace,
        *,
        channel: str,
        concurrency: int,
        rng: random.Random,
    ) -> None:
        self._channel = channel
        self._provider = provider
        self._recorder = recorder
        self._journal = journal
        self._breaker = breaker
        self._pace = pace
        self._concurrency = concurrency
        self._rng = rng
        self._line: deque[_Call] = deque()
        self._slots: set[asyncio.Task[None]] = set()
        self._coming = 0  # slots that have not looked at the line yet
        self._bound: set[_Slot] = set()  # those with an upcoming call
        self._recall_timer: asyncio.TimerHandle | None = None
        self._asking = 0  # calls of the provider that are under way
        self.calls = 0
        """These, and those in the line."""
        self._abandoned = False
        self.freed = asyncio.Event()
        """Set when a call has ended, or results were recorded: there may be room."""
        recorder.on_settled.append(self.freed.set)
        self.on_freed: Callable[[], None] = lambda: None

    def room(self, mode: Mode) -> int:
        """How many groups of this mode may be started now; 0 until it is worth a start.

        SEND_ONCE no more than there are free slots, so that a crash leaves few in doubt.
        """
        ahead = 0 if mode is Mode.SEND_ONCE else max(STARTED_AHEAD, self._pace.ahead)
        room = self._concurrency + ahead - self.calls
        if room <= ahead // 2 or len(self._recorder) >= MAX_UNRECORDED:
            return 0
        return room

    def send(
        self,
        group: Group,
        started: Sequence[Started],
        last_look: Callable[[], bool],
        *,
        probe: asyncio.Future[None] | None = None,
    ) -> None:
        """Send what was started of a group, its places in the journal reserved. Returns at once.

        A `probe` is sent although the channel pauses; the future is done when the call has ended.
        """
        if self._abandoned:
            lost = [self._end(s, worker_lost(), DEFAULT_POLICY) for s in started]
            self._recorder.put(lost)
            self._journal.unreserve(len(started))
            return
        self._recorder.expect((s.attempt_id, s.delivery.delivery_id) for s in started)
        self.calls += 1
        self._line.append(_Call(group, started, last_look, probe))
        self._staff()

    def _staff(self) -> None:
        """See that somebody comes for what was put into the line."""
        if len(self._slots) < self._concurrency:
            task = asyncio.get_running_loop().create_task(self._work())
            self._slots.add(task)
            self._coming += 1
            task.add_done_callback(self._slots.discard)

    async def settle(self) -> None:
        """Return when nothing of this channel is on the wire."""
        while self._slots:
            await asyncio.wait(self._slots)

    async def abandon(self) -> None:
        """End what is on the wire, unheard; the reaper settles it. What has no slot is not sent."""
        self._abandoned = True
        while self._line:
            self._give_up(self._line.popleft())
        for task in self._slots:
            task.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)

    def _give_up(self, call: _Call) -> None:
        """End a call before its turn: proof that it was not sent, and the reaper has none."""
        self._recorder.put([self._end(s, worker_lost(), DEFAULT_POLICY) for s in call.started])
        self._note_end(call)

    async def _work(self) -> None:
        """One slot: call after call of the line."""
        self._coming -= 1
        slot = _Slot(self)
        try:
            calls = 0
            while call := self._next_call(slot):
                calls += 1
                try:
                    await self._send(call, slot)
                except Exception:
                    log.exception("a call on channel %s came to nothing", self._channel)
                finally:
                    self._note_end(call)
                if calls % _IN_A_ROW == 0 and slot.upcoming is None:
                    await self._let_others_on()
        finally:
            if slot.upcoming is not None:
                self._give_up(slot.upcoming)
            self._bound.discard(slot)
            # In the same turn as the last look at the line: what comes next finds the slot free.
            self._slots.discard(asyncio.current_task())

    def _next_call(self, slot: _Slot) -> _Call | None:
        """The call whose turn it is on a slot, if there is one."""
        if slot.call is not None:
            slot.call.asked = None  # which holds the slot, and a mail
        slot.call, slot.upcoming = slot.upcoming, None
        if slot.call is not None:
            self._bound.discard(slot)
        elif self._line:
            slot.call = self._line.popleft()
        return slot.call

    def bind_next(self, slot: _Slot) -> SendCall | None:
        """Bind the next call of the line to a slot, where no other slot would make it now."""
        call = slot.call
        if call is None or slot.upcoming is not None or len(self._line) <= self._coming:
            return None
        if not self._may_follow(call, self._line[0]):
            return None
        slot.upcoming = self._line.popleft()
        slot.upcoming.asked = asked = self._asked(slot.upcoming, slot)
        slot.upcoming.bound_at = self._breaker.now()
        self._bound.add(slot)
        if self._recall_timer is None:
            self._plan_recall()
        return asked if isinstance(asked, SendCall) else None

    def _plan_recall(self) -> None:
        self._recall_timer = asyncio.get_running_loop().call_later(_BOUND_S, self._recall)

    def _recall(self) -> None:
        """Put back into the line what has been bound for long: another slot may be free for it."""
        self._recall_timer = None
        if self._abandoned:
            return
        before = self._breaker.now() - _BOUND_S
        for slot in list(self._bound):
            call = slot.upcoming
            if call is not None and call.bound_at is not None and call.bound_at <= before:
                slot.upcoming = call.asked = None
                self._bound.discard(slot)
                self._line.appendleft(call)
                self._staff()
        if self._bound:
            self._plan_recall()

    def _may_follow(self, call: _Call, upcoming: _Call) -> bool:
        """Whether it may be begun behind this one.

        Behind a SEND_ONCE nothing is: it must not be what makes a server hang up on it. Nor is one put
        behind another, for it was started because a slot was free. Nothing large, whose making would keep the
        one before waiting; and nothing a second time.
        """
        content = upcoming.group.content
        message = content.message if content else None
        return (
            call.group.mode is Mode.RETRYING
            and upcoming.group.mode is Mode.RETRYING
            and upcoming.bound_at is None
            and self._breaker.is_closed
            and message is not None
            and not message.attachments
            and len(message.text) + len(message.html) <= _SMALL
        )

    def _asked(self, call: _Call, slot: _Slot) -> SendCall | Result:
        """What the provider is asked, or what comes of it without."""
        return call_of(call.group, call.started, call.last_look, slot.follow)

    async def _let_others_on(self) -> None:
        """Wait for one turn of the loop.

        A provider that never waits would otherwise be asked for all that was started before the drain
        could ask for the next start: now the store works while it does.
        """
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self._uncancel()  # a cancellation that was meant for the call before

    def _uncancel(self) -> None:
        """Take back a cancellation of this slot that was not ours. Raises CancelledError for ours."""
        if self._abandoned:
            raise asyncio.CancelledError
        slot = asyncio.current_task()
        while slot is not None and slot.cancelling():
            slot.uncancel()

    def _note_end(self, call: _Call) -> None:
        self._journal.unreserve(len(call.started))  # what came back has taken them
        self.calls -= 1
        self._pace.note_end()
        self.freed.set()
        self.on_freed()
        if call.probe is not None and not call.probe.done():
            call.probe.set_result(None)

    async def _send(self, call: _Call, slot: _Slot) -> None:
        """One call to the provider, and its results to the recorder."""
        started = call.started
        reason = self._breaker.reason
        if reason is not None and call.probe is None and call.bound_at is None:
            results = [_not_asked(reason)] * len(started)
        else:
            asked_at = self._breaker.now() if call.bound_at is None else call.bound_at
            results = await self._ask(call, slot)
            failpoints.reach("drain.sent")
            self._breaker.note(_telling(results), asked_at, self._asking)
        try:
            policy = call.group.policy
        except Exception:
            log.exception("the policy of %s cannot be read", started[0].delivery.delivery_id)
            policy = DEFAULT_POLICY
        self._recorder.put([self._end(s, r, policy) for s, r in zip(started, results, strict=True)])

    async def _ask(self, call: _Call, slot: _Slot) -> list[Result]:
        asked = call.asked or self._asked(call, slot)
        if isinstance(asked, Result):
            return [asked] * len(call.started)
        self._asking += 1
        try:
            return await call_provider(self._provider, asked)
        except asyncio.CancelledError as error:
            self._uncancel()
            # Nobody here cancels a slot else: it was meant for a call before, or was let out of one.
            log.error("call %s was cancelled from within", call.started[0].call_id)
            return [broken(Outcome.UNKNOWN, error)] * len(call.started)
        finally:
            self._asking -= 1

    def _end(self, started: Started, result: Result, policy: RetryPolicy) -> Recorded:
        """What a result means, whatever breaks: else its delivery stayed in SENDING."""
        now = datetime.now(UTC)
        try:
            pause = self._breaker.pause if result.of_channel else _NO_PAUSE
            step = next_step(started.delivery, result, now, policy, self._rng, pause)
        except Exception as error:
            log.exception("nobody knows what %r means", result)
            result = broken(Outcome.UNKNOWN, error)
            step = next_step(started.delivery, result, now, DEFAULT_POLICY, self._rng)
        return Recorded.of(started, self._provider.name, now, result, step)


def _telling(results: Sequence[Result]) -> Result:
    """The one of a call's results that tells most about the channel."""
    return next((r for r in results if r.outcome is Outcome.ACCEPTED), results[0])


def _not_asked(reason: Result) -> Result:
    """What a delivery comes to whose channel began to pause before its turn."""
    text = result_text(f"not asked, the channel pauses: {reason.text}")
    return Result(Outcome.DEFERRED, reason.cause, text=text, of_channel=True)
