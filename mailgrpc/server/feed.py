"""The feed of this process: one tailer, a ring of recent events, and readers that never lose one.

Promises. A reader that starts at a place gets every event behind it exactly once, each delivery's
in the order of its version, whatever it does in between: read slowly, stop for an hour, move to
another server with its token. A slow reader costs no memory and slows nobody.

How. One tailer a process reads new events of all lanes and appends them to a ring of bounded
length (server/ring.py). A reader whose place is before the ring reads the table, page by page,
until its place covers the one at which the ring begins (or from which on the ring was read with this
reader in mind, see there); then it joins, skipping what it has seen.
One that the ring has left behind goes back to the table. Reading the table and reading the ring
may interleave lanes differently, but each is a merge in which causes come before effects
(db/events.py), and a reader only ever goes forward in every lane.

What can go wrong. History can be dropped under a reader, and the database can be another one from
one statement to the next (a standby without the last commits, a restored backup). So every page
is read in one statement with the check that its place is still of this history. A reader for which
it is not is ended with RESUME_TOKEN_EXPIRED; where it is the tailer's own place, every reader is,
rather than go on in a different story.

A hundred streams that are opened at once must not hold up the storing of mail, for which they share the
connections of the process. So where the feed ends is asked once for all who want to know, and readers
look at the table a few at a time.

Without readers the tailer reads no events at all and only keeps the place fresh. Where all of them
name the messages that they wait for, it reads the events of these, and what is told to everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from mailgrpc import failpoints
from mailgrpc.core.event import EVERYTHING, NO_LABELS, Event, Filter, Labels
from mailgrpc.core.message import MailMessage
from mailgrpc.core.place import Place, Position, advance
from mailgrpc.db.engine import FEED_S, Database
from mailgrpc.db.events import Page, check_place, read_events, read_page_about, read_place
from mailgrpc.db.messages import read_labels
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import Reason, StoreUnavailable, TokenExpired, Unavailable
from mailgrpc.server.batch import Entry
from mailgrpc.server.ring import Reader, Ring

log = logging.getLogger(__name__)

PAGE_EVENTS = 1000
LABELS_KEPT = 8192
_POLL_HINTED_S = 1.0
_POLL_UNHINTED_S = 0.1
_IDLE_S = 1.0
_RECONNECT_S = 0.5
LISTENS_ON_S = 5.0
"""How long hints are listened for after the last reader: the next one need not subscribe anew."""
_LOOKS_AT_ONCE = 2
_TURN_S = FEED_S + 5.0  # longer than a slow statement of whoever has it
# After a look that found nothing for anybody, so many times as long as it took.
_REST, _LONGEST_REST_S = 8, 0.04
_BUSY_REST, _LONGEST_BUSY_REST_S = 20, 0.1


class Feed:
    """The feed of one process. `start` it, hand out readers, `stop` it."""

    def __init__(self, database: Database, doorbell: Doorbell) -> None:
        self._database = database
        self._doorbell = doorbell
        self.ring = Ring()
        self._labels: OrderedDict[uuid.UUID, Labels] = OrderedDict()
        self._expected: OrderedDict[uuid.UUID, Labels] = OrderedDict()
        self.is_busy: Callable[[], bool] = _never
        """Whether this process has more to do than it can: looks are made less often then."""
        self._rest_until = 0.0
        self._looks = asyncio.Semaphore(_LOOKS_AT_ONCE)
        self._now: asyncio.Task[dict[int, Position]] | None = None  # begun last
        self._next_now: asyncio.Task[dict[int, Position]] | None = None
        self._wake = asyncio.Event()
        self._reader_came = asyncio.Event()
        self._is_read = asyncio.Event()
        self._left_at = 0.0  # when the last reader went
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def place(self) -> Place:
        """A place no later than now: whoever starts there misses nothing that comes."""
        return self.ring.place

    async def start(self) -> None:
        """Learn where the feed ends and begin to follow it. Raises StoreUnavailable."""
        self.ring.begin(await read_place(self._database))
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._listen())]

    async def stop(self) -> None:
        """Stop following; readers find nothing new any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def wake(self) -> None:
        """Events may be new: this process wrote some."""
        self._wake.set()

    def expect(self, message_id: uuid.UUID, message: MailMessage) -> None:
        """This process is about to store this one: its labels need not be asked for.

        Whoever names messages waits for what was stored before: its labels are asked for once.
        """
        if self.ring.reader_count and not self.ring.is_named:
            self._expected[message_id] = Labels(
                message.correlation_id, message.tags, message.custom_args
            )
            if len(self._expected) > LABELS_KEPT:
                self._expected.popitem(last=False)

    @contextlib.contextmanager
    def reader(
        self, project_id: int, place: Place, wanted: Filter = EVERYTHING
    ) -> Iterator[Reader]:
        """A reader from `place` on. What it is handed is a project's and may fit the filter."""
        reader = self.ring.add(project_id, place, wanted)
        self._reader_came.set()
        self._is_read.set()
        try:
            yield reader
        finally:
            self.ring.remove(reader)
            self._left_at = asyncio.get_running_loop().time()

    async def now(self) -> dict[int, Position]:
        """The end of the feed at this moment, asked of the database. Raises StoreUnavailable.

        One that is being asked for may be of a moment ago: who comes meanwhile shares the next.
        """
        if self._next_now is None or self._next_now.done():
            asked = self._ask_now(self._now)
            self._next_now = asyncio.get_running_loop().create_task(asked)
            self._next_now.add_done_callback(_look_at_it)  # all who asked may have gone
        return await asyncio.shield(self._next_now)

    async def _ask_now(self, before: asyncio.Task[Any] | None) -> dict[int, Position]:
        if before is not None:
            await asyncio.wait([before])
        self._now, self._next_now = self._next_now, None
        return await read_place(self._database)

    async def check(self, place: Place) -> None:
        """Raise TokenExpired unless everything behind this place can still be read."""
        async with self.look():
            await check_place(self._database, place)

    @contextlib.asynccontextmanager
    async def look(self) -> AsyncIterator[None]:
        """A reader's turn at the table. Raises StoreUnavailable where none comes."""
        try:
            async with asyncio.timeout(_TURN_S if self._looks.locked() else None):
                await self._looks.acquire()
        except TimeoutError as error:
            raise StoreUnavailable("no reader's turn came in time") from error
        try:
            yield
        finally:
            self._looks.release()

    def end_streams(self) -> None:
        """This process is going away: every reader is told at its next read."""
        self._ending = True
        self.ring.wake_all()

    def check_open(self) -> None:
        """Raise Unavailable when this process is going away."""
        if self._ending:
            raise Unavailable(
                Reason.SHUTTING_DOWN,
                "this server is going away; the resume token goes on elsewhere",
                retry_after=timedelta(0),
            )

    async def read(self, reader: Reader) -> tuple[Sequence[Entry], bool]:
        """The reader's next entries, and whether there may be more at once. Moves the reader.

        Nothing and False: it is up to date, see `wait_for_news`. Raises TokenExpired,
        StoreUnavailable, and Unavailable when this process is going away.
        """
        if (at_hand := self.read_at_hand(reader)) is not None:
            return at_hand
        async with self.look():
            events = await read_events(self._database, reader.place, PAGE_EVENTS)
        mine = await self._labelled([e for e in events if e.project_id == reader.project_id])
        reader.place = advance(reader.place, events)
        self.ring.try_join(reader)
        if not events and not self.ring.has(reader):
            # The page that is being read was asked for without it: it joins behind that one.
            await self.ring.page_read()
            self.ring.try_join(reader)
        more = len(events) == PAGE_EVENTS or not self.ring.is_at_end(reader)
        return [Entry(e) for e in mine], more

    def read_at_hand(self, reader: Reader) -> tuple[Sequence[Entry], bool] | None:
        """What `read` would return, where that takes no look at the table; else None."""
        self.check_open()
        self.ring.check_history(reader)
        return self.ring.read(reader) if self.ring.has(reader) else None

    async def wait_for_news(
        self, reader: Reader, timeout_s: float, *, lightly: bool = False
    ) -> bool:
        """Wait until there may be more to read. False: nothing came in this time.

        `lightly`: the feed having moved is news, even if nothing in it is for the reader.
        """
        if self._ending:
            return True
        return await self.ring.sleep(reader, timeout_s, lightly=lightly)

    async def _follow(self) -> None:
        """Read what is new, for ever; survive the database."""
        connected = True
        while True:
            try:
                more = await self._read_on() if self.ring.reader_count else await self._idle()
                connected = True
            except StoreUnavailable as error:
                if connected:
                    log.warning("the feed waits for the store: %s", error)
                connected = False
                await asyncio.sleep(_RECONNECT_S)
                continue
            except Exception:
                log.exception("the feed failed; it goes on")
                await asyncio.sleep(_RECONNECT_S)
                continue
            if not more:
                poll = _POLL_HINTED_S if self._doorbell.exists else _POLL_UNHINTED_S
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(poll):
                        await self._wake.wait()
                self._wake.clear()

    async def _read_on(self) -> bool:
        """Read a page into the ring; whether there may be another."""
        clock = asyncio.get_running_loop().time
        # Before the page is asked for: who comes meanwhile is in mind then.
        if (rest_s := self._rest_until - clock()) > 0:
            await asyncio.sleep(rest_s)
        begun_at = clock()
        place = self.ring.place
        with self.ring.asking() as messages:
            try:
                if messages is None:
                    events = await read_events(self._database, place, PAGE_EVENTS)
                    page = Page(events, advance(place, events), len(events))
                else:
                    page = await read_page_about(self._database, place, PAGE_EVENTS, messages)
                failpoints.reach("feed.read")
            except TokenExpired:
                log.error("the database has another history; all streams are told to begin anew")
                self.ring.begin_anew(await read_place(self._database))
                return True
            if page.size:
                self.ring.append(await self._labelled(page.events), page.behind)
        if messages is not None and not page.events:
            # A look costs much, and on a busy server most find nothing for those who named what they
            # wait for: the others are left several times as long as it took.
            rest, longest_s = _REST, _LONGEST_REST_S
            if self.is_busy():
                rest, longest_s = _BUSY_REST, _LONGEST_BUSY_REST_S
            self._rest_until = clock() + min((clock() - begun_at) * rest, longest_s)
        return page.size == PAGE_EVENTS

    async def _idle(self) -> bool:
        """Nobody reads: forget the ring and step to the end, now and then."""
        place = await read_place(self._database)
        if self.ring.reader_count:
            return True  # who came meanwhile must not be overtaken
        self.ring.begin(place)
        self._reader_came.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_IDLE_S):
                await self._reader_came.wait()
        return True

    async def _listen(self) -> None:
        """Listen for hints while somebody reads: one that nobody hears costs its sender less."""
        clock = asyncio.get_running_loop().time
        while True:
            await self._is_read.wait()
            try:
                async with contextlib.aclosing(self._doorbell.feed_hints()) as hints:
                    async for _ in hints:
                        self._wake.set()
                        if not self.ring.reader_count and clock() - self._left_at > LISTENS_ON_S:
                            self._is_read.clear()
                            break
            except Exception:
                log.exception("listening for hints failed; it goes on")
                await asyncio.sleep(_RECONNECT_S)

    async def _labelled(self, events: Sequence[Event]) -> list[Event]:
        """The events with what their messages are found by, asked once a message."""
        known: dict[uuid.UUID, Labels] = {}
        for e in events if self._expected else ():
            is_first = e.delivery is not None and e.old_state is None  # as old as its message
            if e.message_id and is_first and (labels := self._expected.pop(e.message_id, None)):
                self._labels[e.message_id] = replace(labels, created_at=e.occurred_at)
        for message_id in {e.message_id for e in events if e.message_id is not None}:
            if (labels := self._labels.get(message_id)) is not None:
                known[message_id] = labels
                self._labels.move_to_end(message_id)
        missing = [e.message_id for e in events if e.message_id and e.message_id not in known]
        if missing:
            found = await read_labels(self._database, list(dict.fromkeys(missing)))
            known |= found
            # One that is not found was cleared; it is not remembered, a reader may be far behind.
            self._labels |= found
        while len(self._labels) > LABELS_KEPT:
            self._labels.popitem(last=False)
        return [
            replace(e, labels=known.get(e.message_id, NO_LABELS)) if e.message_id else e
            for e in events
        ]


def _look_at_it(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


def _never() -> bool:
    return False
