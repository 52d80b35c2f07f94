"""The wire of one channel: what was started is sent here, and what came of it goes to the recorder.

Promises. Whatever breaks, what was started has a result: at worst that nobody knows. Each result
has its place in the journal before its delivery is started (`room`). When the channel fails as a
whole, what had been started and not yet sent comes back unsent (breaker.py).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from mailgrpc import failpoints
from mailgrpc.core.delivery import Mode, Outcome, Result, next_step, result_text
from mailgrpc.core.retry import DEFAULT_POLICY, RetryPolicy
from mailgrpc.db.deliveries import Recorded, Started
from mailgrpc.providers.provider import Provider, worker_lost
from mailgrpc.worker.breaker import Breaker
from mailgrpc.worker.call import Group, broken, call_provider
from mailgrpc.worker.journal import Journal
from mailgrpc.worker.record import Recorder

log = logging.getLogger(__name__)

STARTED_AHEAD = 128
MAX_UNRECORDED = 2000


class Wire:
    """The provider calls of one channel in one worker process, `concurrency` at once."""

    def __init__(
        self,
        provider: Provider,
        recorder: Recorder,
        journal: Journal,
        breaker: Breaker,
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
        self._concurrency = concurrency
        self._rng = rng
        self._slots = asyncio.Semaphore(concurrency)
        self._calls: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.Task[None]] = set()  # of these, those with a slot
        self.freed = asyncio.Event()
        """Set when a call has ended: there may be room."""

    def room(self, mode: Mode) -> int:
        """How many groups of this mode may be started now; 0 until it is worth a start.

        SEND_ONCE no more than there are free slots, so that a crash leaves few in doubt.
        """
        ahead = 0 if mode is Mode.SEND_ONCE else STARTED_AHEAD
        room = self._concurrency + ahead - len(self._calls)
        if room <= ahead // 2 or len(self._recorder) >= MAX_UNRECORDED:
            return 0
        return room

    def send(
        self,
        group: Group,
        started: Sequence[Started],
        last_look: Callable[[], bool],
        *,
        is_probe: bool = False,
    ) -> asyncio.Task[None]:
        """Send what was started of a group, its places in the journal reserved. Returns at once."""
        call = self._send(group, started, last_look, is_probe)
        task = asyncio.get_running_loop().create_task(call)
        self._calls.add(task)
        task.add_done_callback(functools.partial(self._ended, len(started)))
        return task

    async def settle(self) -> None:
        """Return when nothing of this channel is on the wire."""
        while self._calls:
            await asyncio.wait(self._calls)

    async def abandon(self) -> None:
        """End what is on the wire, unheard; the reaper settles it. What has no slot is not sent."""
        for task in self._calls:
            task.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _ended(self, places: int, task: asyncio.Task[None]) -> None:
        self._journal.unreserve(places)  # what came back has taken them
        self._calls.discard(task)
        self.freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a call on channel %s came to nothing", self._channel, exc_info=error)

    async def _send(
        self,
        group: Group,
        started: Sequence[Started],
        last_look: Callable[[], bool],
        is_probe: bool,
    ) -> None:
        """One call to the provider, and its results to the recorder."""
        try:
            await self._slots.acquire()
        except asyncio.CancelledError:
            # Abandoned before its turn: proof that it was not sent, and the reaper has none.
            self._recorder.put([self._end(s, worker_lost(), DEFAULT_POLICY) for s in started])
            raise
        try:
            reason = self._breaker.reason
            if reason is not None and not is_probe:
                results = [_not_asked(reason)] * len(started)
            else:
                asked_at = self._breaker.now()
                results = await self._ask(group, started, last_look)
                failpoints.reach("drain.sent")
                others = sum(task is not asyncio.current_task() for task in self._asking)
                self._breaker.note(_telling(results), asked_at, others)
        finally:
            self._slots.release()
        try:
            policy = group.policy
        except Exception:
            log.exception("the policy of %s cannot be read", started[0].delivery.delivery_id)
            policy = DEFAULT_POLICY
        self._recorder.put([self._end(s, r, policy) for s, r in zip(started, results, strict=True)])

    async def _ask(
        self, group: Group, started: Sequence[Started], last_look: Callable[[], bool]
    ) -> list[Result]:
        task = asyncio.current_task()
        assert task is not None
        self._asking.add(task)
        try:
            return await call_provider(self._provider, group, started, last_look)
        finally:
            self._asking.discard(task)

    def _end(self, started: Started, result: Result, policy: RetryPolicy) -> Recorded:
        """What a result means, whatever breaks: else its delivery stayed in SENDING."""
        now = datetime.now(UTC)
        try:
            step = next_step(started.delivery, result, now, policy, self._rng, self._breaker.pause)
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
