"""The feed of this process: one tailer, a ring of recent events, and readers that never lose one.

Promises. A reader that starts at a place gets every event behind it exactly once, each delivery's
in the order of its version, whatever it does in between: read slowly, stop for an hour, move to
another server with its token. A slow reader costs no memory and slows nobody.

How. One tailer a process reads new events of all lanes and appends them to a ring of bounded
length. A reader holds a place and, while it is up to date, an index into the ring. When the ring
has moved past its index it goes back to the table, page by page, until its place covers the place
at which the ring begins; then it joins, skipping what it has seen. Reading the table and reading
the ring may interleave lanes differently, but each is a merge in which causes come before effects
(db/events.py), and a reader only ever goes forward in every lane.

What can go wrong. History can be dropped under a reader: the horizon moves before the drop, so a
page is checked after it was read. The database can be another one after the tailer reconnects (a
standby without the last commits, a restored backup): the tailer then compares the fingerprint of
its place, and ends every reader with RESUME_TOKEN_EXPIRED rather than go on in a different story.

Without subscribers the tailer reads no events at all and only keeps the place fresh.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from mailgrpc.core.event import NO_LABELS, Event, Labels
from mailgrpc.core.place import ORIGIN, Place, Position, advance, covers
from mailgrpc.db.engine import Database
from mailgrpc.db.events import find_strangers, read_events, read_place
from mailgrpc.db.messages import read_labels
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import Reason, StoreUnavailable, TokenExpired, Unavailable
from mailgrpc.server import convert

log = logging.getLogger(__name__)

RING_EVENTS = 8192
PAGE_EVENTS = 1000
LABELS_KEPT = 8192
_POLL_HINTED_S = 1.0
_POLL_UNHINTED_S = 0.1
_IDLE_S = 1.0
_RECONNECT_S = 0.5
_HISTORY_GONE = "this place in the history no longer exists; take a snapshot and go on from there"


class Entry:
    """An event in memory, with its protobuf form once somebody needed it: made once for all."""

    __slots__ = ("_shown", "event")

    def __init__(self, event: Event) -> None:
        self.event = event
        self._shown: Any = None

    @property
    def shown(self) -> Any:
        """The event as callers see it."""
        if self._shown is None:
            self._shown = convert.event(self.event)
        return self._shown


class Reader:
    """Where one subscriber is. `index` is its next entry of the ring while it is up to date."""

    __slots__ = ("epoch", "index", "place", "project_id")

    def __init__(self, project_id: int, place: Place, epoch: int) -> None:
        self.project_id = project_id
        self.place: Place = place
        self.index: int | None = None
        self.epoch = epoch


class Feed:
    """The feed of one process. `start` it, hand out readers, `stop` it."""

    def __init__(self, database: Database, doorbell: Doorbell) -> None:
        self._database = database
        self._doorbell = doorbell
        self._ring: deque[Entry] = deque()
        self._first = 0  # index of the ring's first entry, counted since the start
        self._ring_place: dict[int, Position] = {}  # just before that entry
        self._place: dict[int, Position] = {}  # just behind the last one
        self._epoch = 0  # + 1 when the history turned out to be another one
        self._labels: OrderedDict[uuid.UUID, Labels] = OrderedDict()
        self._readers = 0
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._reader_came = asyncio.Event()
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def place(self) -> Place:
        """A place no later than now: whoever starts there misses nothing that comes."""
        return self._place

    async def start(self) -> None:
        """Learn where the feed ends and begin to follow it. Raises StoreUnavailable."""
        self._place = await read_place(self._database)
        self._ring_place = dict(self._place)
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._listen())]

    async def stop(self) -> None:
        """Stop following; readers find nothing new any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def wake(self) -> None:
        """Events may be new: this process wrote some."""
        self._wake.set()

    @contextlib.contextmanager
    def reader(self, project_id: int, place: Place) -> Iterator[Reader]:
        """A reader from `place` on. Its place must have been checked with `check`."""
        self._readers += 1
        self._reader_came.set()
        try:
            yield Reader(project_id, place, self._epoch)
        finally:
            self._readers -= 1

    async def now(self) -> dict[int, Position]:
        """The end of the feed at this moment, asked of the database."""
        return await read_place(self._database)

    async def check(self, place: Place) -> None:
        """Raise TokenExpired unless everything behind this place can still be read."""
        if await find_strangers(self._database, place):
            raise TokenExpired(_HISTORY_GONE)

    def end_streams(self) -> None:
        """This process is going away: every reader is told at its next read."""
        self._ending = True
        self._tell()

    async def read(self, reader: Reader) -> tuple[Sequence[Entry], bool]:
        """The reader's next entries of its project, and whether it may be more at once.

        Moves the reader. Nothing and False: it is up to date, see `wait_for_news`. Raises
        TokenExpired, StoreUnavailable, and Unavailable when this process is going away.
        """
        if self._ending:
            raise Unavailable(
                Reason.SHUTTING_DOWN,
                "this server is going away; the resume token goes on elsewhere",
                retry_after=timedelta(0),
            )
        if reader.epoch != self._epoch:
            raise TokenExpired(_HISTORY_GONE)
        if reader.index is None or reader.index < self._first:
            return await self._read_table(reader)
        offset = reader.index - self._first
        taken = [self._ring[i] for i in range(offset, min(offset + PAGE_EVENTS, len(self._ring)))]
        if not taken:
            return (), False
        reader.index += len(taken)
        seen = reader.place
        reader.place = advance(seen, [e.event for e in taken if not _is_seen(e.event, seen)])
        wanted = [
            e
            for e in taken
            if e.event.project_id == reader.project_id and not _is_seen(e.event, seen)
        ]
        return wanted, reader.index < self._first + len(self._ring)

    async def wait_for_news(self, timeout_s: float) -> bool:
        """Wait until there may be more to read. False: nothing came in this time."""
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def _read_table(self, reader: Reader) -> tuple[Sequence[Entry], bool]:
        """A page from the table, and the way back into the ring."""
        events = await read_events(self._database, reader.place, PAGE_EVENTS)
        await self.check(reader.place)
        reader.place = advance(reader.place, events)
        if covers(reader.place, self._ring_place):
            reader.index = self._first
        mine = [e for e in events if e.project_id == reader.project_id]
        return [Entry(e) for e in await self._labelled(mine)], True

    async def _follow(self) -> None:
        """Read what is new, for ever; survive the database."""
        connected = True
        while True:
            try:
                if not connected and await find_strangers(self._database, self._place):
                    await self._begin_anew()
                more = await self._read_on() if self._readers else await self._keep_place()
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
                    await asyncio.wait_for(self._wake.wait(), poll)
                self._wake.clear()

    async def _read_on(self) -> bool:
        events = await read_events(self._database, self._place, PAGE_EVENTS)
        if not events:
            return False
        for event in await self._labelled(events):
            self._ring.append(Entry(event))
        self._place = advance(self._place, events)
        while len(self._ring) > RING_EVENTS:
            dropped = self._ring.popleft().event
            self._ring_place[dropped.lane] = Position(dropped.seq, dropped.fingerprint)
            self._first += 1
        self._tell()
        return True

    async def _keep_place(self) -> bool:
        """Nobody reads: forget the ring and step to the end, now and then."""
        self._place = await read_place(self._database)
        self._first += len(self._ring)
        self._ring.clear()
        self._ring_place = dict(self._place)
        self._reader_came.clear()
        if not self._readers:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reader_came.wait(), _IDLE_S)
        return True

    async def _begin_anew(self) -> None:
        log.error("the database has another history; all streams are told to begin anew")
        self._epoch += 1
        self._ring.clear()
        self._place = await read_place(self._database)
        self._ring_place = dict(self._place)
        self._first += 1
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _listen(self) -> None:
        async for _ in self._doorbell.feed_hints():
            self._wake.set()

    async def _labelled(self, events: Sequence[Event]) -> list[Event]:
        """The events with what their messages are found by, asked once a message."""
        missing = {e.message_id for e in events if e.message_id is not None} - self._labels.keys()
        if missing:
            found = await read_labels(self._database, [m for m in missing if m is not None])
            # One that is not found was cleared; it is not remembered, a reader may be far behind.
            self._labels.update(found)
        labelled = [
            replace(e, labels=self._labels.get(e.message_id, NO_LABELS)) if e.message_id else e
            for e in events
        ]
        while len(self._labels) > LABELS_KEPT:
            self._labels.popitem(last=False)
        return labelled


def _is_seen(event: Event, place: Place) -> bool:
    return event.seq <= place.get(event.lane, ORIGIN).seq
