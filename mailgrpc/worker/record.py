"""Recording: what came back from providers becomes rows, many in one round trip.

Promises. A result that was handed in is written, whatever PostgreSQL does meanwhile: it is asked
again until it answers, and asking again moves nothing twice. What PostgreSQL refuses is written
without its words, and refused even so it is kept and tried again, its outcome alone and less and
less often, while the others go on; `close` tells how many are left. A result always reaches its
attempt; it changes the delivery when that attempt is running, or by the rule on late results:

    the attempt is the last one started, and the state rests on no proof    SENT or FAILED, by proof
    a newer attempt has been started                                        the attempt alone; but
        what is then known to be accepted is SENT once no attempt runs, and not tried again

All of it happens in the one statement that stores the result (`record_outcomes`). `possibly_sent`
needs nothing here: an attempt is overtaken only after the reaper has ended it as UNKNOWN, which set
it.

Each result is handed to the journal as well (journal.py), side by side with the recording, so that
what a killed worker had in memory is found by the next one on this machine. `close` leaves there
what is not recorded. What the journal brings back takes the same way (`take_over`).

What runs in this process is expected here from its start until it is recorded: so it is known of a
delivery that runs in our name whether we know of it (credits.py).
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from mailgrpc import failpoints
from mailgrpc.core.delivery import Result
from mailgrpc.db.deliveries import Recorded, record_outcomes
from mailgrpc.db.engine import Database
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import StoreUnavailable
from mailgrpc.handover import Running
from mailgrpc.worker.journal import Journal
from mailgrpc.worker.outage import Outage

log = logging.getLogger(__name__)

FLUSH_RESULTS = 500
_REST = 3  # times as long as the last flush took: what comes meanwhile shares the next one
_LONGEST_REST_S = 0.02
_RETRY_S = 0.5
_INSIST_MAX_S = 60.0


class Recorder:
    """The queue of results of one worker.

    A flush costs much and a result in it little, so that one is not begun at once after the last:
    under load each then carries what a few milliseconds brought, and a result that comes alone
    waits for nothing. Nor does a flush that is full already: recording must not be slower than sending.
    """

    def __init__(
        self,
        database: Database,
        doorbell: Doorbell,
        outage: Outage,
        journal: Journal,
        *,
        lane: int,
    ) -> None:
        self._journal = journal
        self._database = database
        self._doorbell = doorbell
        self._outage = outage
        self._lane = lane
        self._expected: set[Running] = set()
        self._waiting: deque[Recorded] = deque()
        self._taken = 0  # results that ever came in
        self._settled = 0  # of these, those that were recorded or refused
        self._progress = asyncio.Event()
        self._rest_until = 0.0
        self._flusher: asyncio.Task[None] | None = None
        self._refused: deque[Recorded] = deque()
        self._insister: asyncio.Task[None] | None = None
        self.on_settled: list[Callable[[], None]] = []
        """Called when there is room again for what comes back: fewer are waiting to be recorded."""

    def expect(self, running: Iterable[Running]) -> None:
        """These run here, and their results will come; until they are recorded they are expected."""
        self._expected.update(running)

    def give_up(self, running: Iterable[Running]) -> None:
        """No results of these will come."""
        self._expected.difference_update(running)

    @property
    def expected(self) -> frozenset[Running]:
        """Whatever runs here, and what has ended and is not recorded."""
        return frozenset(self._expected)

    def __len__(self) -> int:
        """Results that are not recorded yet."""
        return self._taken - self._settled + len(self._refused)

    def put(self, results: Sequence[Recorded]) -> None:
        """Hand results in. Returns at once."""
        self._journal.append(results)
        self.take_over(results)

    def take_over(self, results: Sequence[Recorded]) -> None:
        """Hand in results that are in a journal already. Returns at once."""
        self._waiting.extend(results)
        self._taken += len(results)
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.get_running_loop().create_task(self._flush_all())

    async def drain(self) -> None:
        """Return once everything that was handed in is recorded, or refused by PostgreSQL."""
        while self._flusher is not None and not self._flusher.done():
            await asyncio.shield(self._flusher)

    async def flushed(self) -> None:
        """Return once what has been handed in by now is recorded, or refused by PostgreSQL.

        Unlike `drain` it does not wait for what comes meanwhile.
        """
        awaited = self._taken
        while self._settled < awaited:
            self._progress.clear()
            await self._progress.wait()

    async def close(self) -> None:
        """Stop; what is not recorded by now is left in the journal."""
        tasks = [task for task in (self._flusher, self._insister) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if len(self):
            log.warning(
                "%d results are not recorded; they are left in the journal for the next worker",
                len(self),
            )

    async def _flush_all(self) -> None:
        clock = asyncio.get_running_loop().time
        while self._waiting:
            rest_s = self._rest_until - clock()
            if rest_s > 0 and len(self._waiting) < FLUSH_RESULTS:
                await asyncio.sleep(rest_s)
            batch = self._take()
            failpoints.reach("recorder.record")
            began_at = clock()
            try:
                await record_outcomes(self._database, self._lane, batch)
            except StoreUnavailable as error:
                self._outage.met(error)
                self._waiting.extendleft(reversed(batch))
                await asyncio.sleep(_RETRY_S)
            except Exception:  # noqa: BLE001  told where it is found
                await self._record_singly(batch)
            else:
                self._settle(len(batch))
                self._told(batch)
                took_s = clock() - began_at
                self._rest_until = clock() + min(took_s * _REST, _LONGEST_REST_S)

    def _settle(self, results: int) -> None:
        self._settled += results
        self._progress.set()
        self._tell_settled()

    def _tell_settled(self) -> None:
        for tell in self.on_settled:
            tell()

    async def _record_singly(self, batch: Sequence[Recorded]) -> None:
        """One of them cannot be written; the others can."""
        unasked: list[Recorded] = []
        for one in batch:
            try:
                await self._record_somehow(one)
            except StoreUnavailable:
                unasked.append(one)
            except Exception:
                log.exception("the result of %s cannot be recorded yet", one.delivery_id)
                self._keep(one)
                self._settle(1)
            else:
                self._settle(1)
                self._told([one])
        self._waiting.extendleft(reversed(unasked))  # first again: `flushed` counts on the order

    async def _record_somehow(self, one: Recorded) -> None:
        """With its words, or without: what came of a mail matters more than how it was put."""
        try:
            await record_outcomes(self._database, self._lane, [one])
        except StoreUnavailable:
            raise
        except Exception as error:  # noqa: BLE001  data that this database refuses
            log.warning("the result of %s is recorded without words: %s", one.delivery_id, error)
            plain = replace(
                one.result, enhanced_code="", text="", provider_message_id="", status_code=0
            )
            await record_outcomes(self._database, self._lane, [replace(one, result=plain)])

    def _keep(self, one: Recorded) -> None:
        bare = Result(one.result.outcome, one.result.cause)
        self._refused.append(replace(one, provider="", result=bare))
        if self._insister is None or self._insister.done():
            self._insister = asyncio.get_running_loop().create_task(self._insist())

    async def _insist(self) -> None:
        """Try what was refused again, one by one, until nothing is left of it."""
        wait_s = _RETRY_S
        while self._refused:
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, _INSIST_MAX_S)
            refusal: Exception | None = None
            for _ in range(len(self._refused)):
                one = self._refused[0]
                try:
                    await record_outcomes(self._database, self._lane, [one])
                except StoreUnavailable as error:
                    self._outage.met(error)
                    break
                except Exception as error:  # noqa: BLE001  told below, once for all of them
                    refusal = error
                    self._refused.rotate(-1)
                else:
                    self._refused.popleft()
                    self._tell_settled()
                    self._told([one])
            if refusal is not None:
                log.warning(
                    "%d results are refused and kept, one of them: %s", len(self._refused), refusal
                )

    def _told(self, batch: Sequence[Recorded]) -> None:
        failpoints.reach("recorder.recorded")
        self._expected.difference_update((r.attempt_id, r.delivery_id) for r in batch)
        self._journal.recorded(batch)
        self._doorbell.hint_feed()
        due = [r.step.due_at for r in batch if r.step.due_at is not None]
        for moment in {d.replace(microsecond=0) for d in due}:
            self._doorbell.ring_at(moment)

    def _take(self) -> list[Recorded]:
        """The next flush: a delivery's second result waits for the one after it."""
        batch: dict[uuid.UUID, Recorded] = {}
        left: list[Recorded] = []
        while self._waiting and len(batch) < FLUSH_RESULTS:
            one = self._waiting.popleft()
            if one.delivery_id in batch:
                left.append(one)
            else:
                batch[one.delivery_id] = one
        self._waiting.extendleft(reversed(left))
        return list(batch.values())
