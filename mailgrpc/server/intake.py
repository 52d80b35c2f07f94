"""Intake: joins the calls that wait into one flush, and answers each when its commit is in.

Promises. A call is answered after its rows are committed, never before. The same request_id makes
one message, over any number of calls at once and any number of servers. What a call asked for is
stored whole or not at all, and one that cannot be stored fails alone.

How. Two flushes may be under way, so that the server reads and answers calls while PostgreSQL
stores others; what comes meanwhile shares the next one. No timer: without load a call waits for
nothing. Beside siblings there is one at a time, and a rest after it (`Intake`). A flush is bounded; a
large message goes in one of its own, beside the others, so that it does not hold them. What a worker has given credit for is started in the same commit
(mailgrpc/handover.py), and the others are rung for.

What can go wrong.
- Two calls with one request_id race. Decided by the key inside the insert's transaction; who lost
  is looked up in a second statement, on a fresh snapshot.
- The answer of the commit is lost. The same insert runs again with the same ids, and starts nothing:
  it waits on the keys of the first and then finds its own rows; what that one has started is looked
  for by its worker. Never decided by a SELECT, which may come too
  early. What is found was not written by this commit, and is not told before the store has
  confirmed it: a standby that is cut off may not have it (db/engine.py).
- A value that PostgreSQL refuses. The flush is halved until the one that carries it stands alone.
- A caller gives up. Before its flush it is dropped; after that nobody cancels it.
- The store falls silent. A statement of a flush has a patience of its own, much shorter than that
  of others, because all who wait stand behind it.
- Too many wait, or too many bytes. RESOURCE_EXHAUSTED with when to come back: the queue here is memory, not a promise.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from mailgrpc import failpoints
from mailgrpc.core.fingerprint import fingerprint
from mailgrpc.core.message import Submission
from mailgrpc.core.value import value
from mailgrpc.db.engine import AmbiguousCommit, Database
from mailgrpc.db.messages import (
    Inserted,
    KnownRequest,
    NewMessage,
    Start,
    insert_messages,
    read_known_requests,
)
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import (
    Exhausted,
    Reason,
    RequestIdMismatch,
    StoreUnavailable,
    Unavailable,
)
from mailgrpc.server.credits import Credits
from mailgrpc.server.feed import Feed

log = logging.getLogger(__name__)

FLUSH_MESSAGES = 500
FLUSH_DELIVERIES = 2000
FLUSH_BYTES = 1024 * 1024
FLUSH_TIMEOUT_S = 10.0
FLUSHES_AT_ONCE = 2
"""Of a process that serves alone, so that one is made while PostgreSQL has the other. Those that share a
port make one each: PostgreSQL has the others', and half-full ones cost more than they bring."""
_WORTH_A_FLUSH = 32
_LONGEST_REST_S = 0.02
"""Between two flushes of a sibling, unless so many wait (docs/decisions/0020)."""
ALONE_BYTES = 256 * 1024
QUEUE_BYTES = 64 * 1024 * 1024
"""What may wait in memory, whatever the number of calls."""
_LARGE_AT_ONCE = 2
_AMBIGUOUS_TRIES = 6
_AMBIGUOUS_WAIT_S = 0.5
_COME_BACK = timedelta(seconds=1)


@value
class Accepted:
    """The message is in. `message_id` is an earlier one's when the request was `replayed`."""

    message_id: uuid.UUID
    replayed: bool = False
    has_suppressed: bool = False  # a delivery was not queued


@dataclass(slots=True, eq=False)
class _Waiting:
    new: NewMessage
    size: int  # bytes, roughly
    answer: asyncio.Future[Any] = field(repr=False)

    @property
    def deliveries(self) -> int:
        return len(self.new.submission.message.recipients)


class Intake:
    """The queue before the flush, of one process. `lane` is where its events go.

    One of siblings, which share the processors, makes one flush at a time. After one that several calls
    shared it lets more come, for as long as this process was busy meanwhile, unless so many wait
    already. Whoever comes alone, or call after call, waits for nothing.
    """

    def __init__(
        self,
        database: Database,
        doorbell: Doorbell,
        feed: Feed,
        credit: Credits,
        *,
        lane: int,
        limit: int,
        is_sibling: bool = False,
    ) -> None:
        self._credits = credit
        self._database = database.with_patience(FLUSH_TIMEOUT_S)
        self._doorbell = doorbell
        self._feed = feed
        self._lane = lane
        self._limit = limit
        self._waiting: deque[_Waiting] = deque()
        self._is_sibling = is_sibling
        self._small = asyncio.Semaphore(1 if is_sibling else FLUSHES_AT_ONCE)
        self._rest_until = 0.0
        self._rests = False
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._large_waiting = 0
        self._bytes = 0
        self._flusher: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def put(self, new: NewMessage, size: int, answer: asyncio.Future[Any]) -> None:
        """Store a message of about `size` bytes; `answer` gets an Accepted when its commit is in.

        Cancelling `answer` before its flush takes the message back out; after that it changes
        nothing. It ends in RequestIdMismatch or StoreUnavailable where the message is not in.
        Raises Exhausted.
        """
        calls = len(self._waiting) + self._large_waiting
        if calls >= self._limit or self._bytes + size > QUEUE_BYTES:
            raise Exhausted(
                Reason.QUEUE_FULL,
                "too many calls wait to be stored",
                retry_after=_COME_BACK,
                quota="queue",
            )
        waiting = _Waiting(new, size, answer)
        self._bytes += size
        if size >= ALONE_BYTES:
            self._large_waiting += 1
            self._spawn(self._flush_large(waiting))
        else:
            self._waiting.append(waiting)
            if self._flusher is None or self._flusher.done():
                self._flusher = self._spawn(self._flush_all())

    @property
    def is_busy(self) -> bool:
        """Whether as much is being stored as may be at once, and more waits."""
        return self._small.locked() and bool(self._waiting) and not self._rests

    async def drain(self) -> None:
        """Return once everything that waits has been answered."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _spawn(self, work: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _flush_all(self) -> None:
        while self._waiting:
            await self._small.acquire()
            if self._is_sibling:
                await self._rest()
            if batch := self._take():
                self._spawn(self._flush_small(batch))
            else:
                self._small.release()

    async def _rest(self) -> None:
        """Let more come to a flush that would be small, right behind the last one."""
        rest_s = self._rest_until - asyncio.get_running_loop().time()
        if rest_s > 0 and len(self._waiting) < _WORTH_A_FLUSH:
            self._rests = True
            await asyncio.sleep(rest_s)
            self._rests = False

    async def _flush_small(self, batch: list[_Waiting]) -> None:
        used_s = time.process_time()
        try:
            await self._flush(batch)
        finally:
            if len(batch) > 1:
                # What was spent waiting, for a disk or a standby, says nothing of full processors.
                rest_s = min(time.process_time() - used_s, _LONGEST_REST_S)
                self._rest_until = asyncio.get_running_loop().time() + rest_s
            self._small.release()

    async def _flush_large(self, waiting: _Waiting) -> None:
        try:
            async with self._large:
                if not waiting.answer.done():
                    await self._flush([waiting])
        finally:
            self._large_waiting -= 1
            self._bytes -= waiting.size

    def _take(self) -> list[_Waiting]:
        """The next flush, within its bounds; who gave up is left out."""
        batch: list[_Waiting] = []
        deliveries = size = 0
        while self._waiting and len(batch) < FLUSH_MESSAGES:
            head = self._waiting[0]
            full = deliveries + head.deliveries > FLUSH_DELIVERIES or size + head.size > FLUSH_BYTES
            if batch and full:
                break
            self._waiting.popleft()
            self._bytes -= head.size
            if not head.answer.done():
                batch.append(head)
                deliveries += head.deliveries
                size += head.size
        return batch

    async def _flush(self, batch: list[_Waiting]) -> None:
        """Store a batch and answer all of it; never raises."""
        for waiting in batch:
            self._feed.expect(waiting.new.message_id, waiting.new.submission.message)
        new = [w.new for w in batch]
        start = self._credits.take_for(new)
        try:
            inserted, all_started = await self._insert(new, start)
            known = await self._look_up(new, inserted)
        except StoreUnavailable as error:
            _fail(batch, error)
            return
        except Exception as error:  # noqa: BLE001  whatever it is, each caller is answered
            if len(batch) == 1:
                _fail(batch, error)
                return
            half = len(batch) // 2
            await self._flush(batch[:half])
            await self._flush(batch[half:])
            return
        if not all_started:
            self._doorbell.ring()
        self._doorbell.hint_feed(lightly=self.is_busy)
        self._feed.wake()
        failpoints.reach("intake.rung")
        for waiting in batch:
            try:
                _answer(waiting, inserted, known)
            except Exception as error:  # noqa: BLE001  as above
                _fail([waiting], error)

    async def _insert(
        self, new: Sequence[NewMessage], start: Start | None
    ) -> tuple[Inserted, bool]:
        """Store them; and whether all of them were started, so that nobody need be rung for."""
        for attempt in range(_AMBIGUOUS_TRIES):
            try:
                failpoints.reach("intake.insert")
                inserted = await self._insert_once(new, start)
                if attempt > 0 or len(inserted.known) == len(new):
                    # Nothing need have been written just now, and so nothing been waited for.
                    await self._database.confirm()
                failpoints.reach("intake.inserted")
                if attempt > 0:
                    # The run in doubt may have made the rows, and told nobody what it did not queue.
                    all_ids = frozenset(n.message_id for n in new)
                    inserted = replace(inserted, with_suppressed=all_ids)
                return inserted, bool(start and self._credits.note_stored(start, new, inserted))
            except AmbiguousCommit as error:
                log.warning("a flush of %d is in doubt, asking again: %s", len(new), error)
                if attempt == _AMBIGUOUS_TRIES - 1:
                    raise
                start = None  # its worker looks for what that run may have started
                await asyncio.sleep(_AMBIGUOUS_WAIT_S * attempt)
            except StoreUnavailable:
                if attempt == 0:
                    raise  # nothing was done
                await asyncio.sleep(_AMBIGUOUS_WAIT_S * attempt)
        raise AmbiguousCommit("the store stayed away while a flush was in doubt")

    async def _insert_once(self, new: Sequence[NewMessage], start: Start | None) -> Inserted:
        try:
            return await insert_messages(self._database, self._lane, new, start)
        except AmbiguousCommit:
            raise
        except Exception:
            if start is not None:
                self._credits.give_back(start)
            raise

    async def _look_up(
        self, new: Sequence[NewMessage], inserted: Inserted
    ) -> dict[tuple[int, str], KnownRequest]:
        if not inserted.known:
            return {}
        keys = [
            (n.project_id, n.submission.request_id) for n in new if n.message_id in inserted.known
        ]
        return await read_known_requests(self._database, keys)


def _answer(
    waiting: _Waiting, inserted: Inserted, known: dict[tuple[int, str], KnownRequest]
) -> None:
    if waiting.answer.done():  # the caller gave up; what is stored stays stored
        return
    new = waiting.new
    if new.message_id not in inserted.known:
        has_suppressed = new.message_id in inserted.with_suppressed
        waiting.answer.set_result(Accepted(new.message_id, has_suppressed=has_suppressed))
        return
    found = known.get((new.project_id, new.submission.request_id))
    if found is None:
        # It expired between the two statements, after its week: the caller may try again.
        waiting.answer.set_exception(StoreUnavailable("the request_id was just forgotten"))
    elif not is_same_request(new.submission, found):
        waiting.answer.set_exception(RequestIdMismatch(new.submission.request_id))
    else:
        # Our own id: the first run of an insert that was in doubt had made it.
        replayed = found.message_id != new.message_id
        waiting.answer.set_result(Accepted(found.message_id, replayed, not replayed))


def is_same_request(submission: Submission, found: KnownRequest) -> bool:
    """Whether an Enqueue says what the one before it said, by the rule of its time.

    Raises Unavailable where only a newer version can tell: while servers are being replaced, one
    of those that are new already answers.
    """
    if not found.is_enqueue:
        return False
    try:
        said = fingerprint(submission, found.rule)
    except ValueError as error:
        raise Unavailable(
            Reason.STORE_UNAVAILABLE,
            "this request_id is known to a newer version of the server; ask again",
            retry_after=_COME_BACK,
        ) from error
    return said == found.fingerprint


def _fail(batch: list[_Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
