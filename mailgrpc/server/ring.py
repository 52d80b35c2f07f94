"""The recent end of the feed in memory, and the readers that wait at it.

Events come in batches, each as one page was read (server/batch.py); a page without anything wanted
makes no batch and only moves the place.

A reader is at a place, which says what it has seen. Reading the table and reading the batches may
interleave lanes differently, so a reader that comes from the table may be ahead of the batches in
some lanes: it then leaves out what it has seen, until a batch ends where it stands. From there on
it is `settled`: its place is always the end of the batch it read last, shared and not computed.

A settled reader that sleeps is moved by the ring: a batch without anything for it changes nothing,
and when it wakes, by time or by a batch that has something for it, it stands just before that. So
sleepers are never overtaken by the ring, and waking costs nothing for those who are not woken.

Where all readers wait for messages that they name, only events of these need be read at all
(`asking`). Such a page may lack what a reader wants that came after it was asked for. So readers are
counted as they come, each stretch of pages knows how many had come when it was asked for, and a reader
joins only where all that follows was asked for with it in mind.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
import uuid
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

from mailgrpc.core.event import Event, Filter
from mailgrpc.core.place import HISTORY_GONE, ORIGIN, Place, advance, covers, join
from mailgrpc.errors import TokenExpired
from mailgrpc.server.batch import Batch, Entry, Key, is_of_all, keys_of_filter

RING_EVENTS = 8192
"""Events kept in memory; who is further behind reads the table."""
RING_BYTES = 32 * 1024 * 1024
"""The same in bytes, roughly: the event of a Clear carries its whole filter."""
NAMED_MESSAGES = 2000
"""Up to so many different messages are asked for by name: each page takes the list along."""

_STRETCHES = 64
_OF_ALL = sys.maxsize


class _Stretch(NamedTuple):
    """From here to the end every page lacks nothing for so many readers, the first that came.

    `number` is the batch before which it begins.
    """

    readers_known: int
    place: Place
    number: int


class Reader:
    """Where one subscriber is. `number` is its next batch while it reads from the ring."""

    __slots__ = (
        "epoch",
        "is_keyed",
        "keys",
        "names",
        "number",
        "ordinal",
        "place",
        "project_id",
        "settled",
        "waiter",
    )

    def __init__(
        self, project_id: int, place: Place, wanted: Filter, epoch: int, ordinal: int
    ) -> None:
        self.project_id = project_id
        self.ordinal = ordinal
        self.names = wanted.message_ids
        self.place: Place = place
        self.keys = keys_of_filter(project_id, wanted)
        # Whether its filter names what a batch can be searched for.
        self.is_keyed = not is_of_all(self.keys)
        self.epoch = epoch
        self.number: int | None = None
        self.settled = False
        self.waiter: asyncio.Future[bool] | None = None

    @property
    def is_asleep(self) -> bool:
        """Whether it waits for news and none was announced yet."""
        return self.waiter is not None and not self.waiter.done()


class Ring:
    """Batches of at most RING_EVENTS events and RING_BYTES, and every reader of this process."""

    def __init__(self) -> None:
        self._batches: deque[Batch] = deque()
        self._events = 0
        self._bytes = 0
        self._first = 0  # number of the first batch, counted since the start
        self._start: Place = {}  # just before it
        self._place: Place = {}  # just behind the last one
        self._epoch = 0
        self._readers: dict[Key, set[Reader]] = {}
        self._of_project: dict[int, set[Reader]] = {}
        self._keyed = 0
        self._named: Counter[uuid.UUID] = Counter()  # messages, by how many readers
        self._without_names = 0
        self._readers_ever = 0
        self._readers_known: int | None = None  # when the page that is being read was asked for
        self._page: asyncio.Future[None] | None = None  # done when that was read
        self._stretches: deque[_Stretch] = deque()
        self._light_sleepers: set[Reader] = set()

    @property
    def place(self) -> Place:
        """The place behind everything in here."""
        return self._place

    @property
    def reader_count(self) -> int:
        """How many readers there are."""
        return sum(len(readers) for readers in self._of_project.values())

    @property
    def event_count(self) -> int:
        """How many events are held."""
        return self._events

    def add(self, project_id: int, place: Place, wanted: Filter) -> Reader:
        """A new reader at a place; `remove` it."""
        self._readers_ever += 1
        reader = Reader(project_id, place, wanted, self._epoch, self._readers_ever)
        self._named.update(reader.names)
        self._without_names += not reader.names
        for key in reader.keys:
            self._readers.setdefault(key, set()).add(reader)
        self._of_project.setdefault(project_id, set()).add(reader)
        self._keyed += reader.is_keyed
        return reader

    def remove(self, reader: Reader) -> None:
        """Forget a reader."""
        for key in reader.keys:
            _discard(self._readers, key, reader)
        _discard(self._of_project, reader.project_id, reader)
        self._keyed -= reader.is_keyed
        self._light_sleepers.discard(reader)
        self._without_names -= not reader.names
        for message_id in reader.names:
            self._named[message_id] -= 1
            if not self._named[message_id]:
                del self._named[message_id]

    @property
    def is_named(self) -> bool:
        """Whether every reader names the messages that it waits for, and they are few enough."""
        return not self._without_names and len(self._named) <= NAMED_MESSAGES

    @contextlib.contextmanager
    def asking(self) -> Iterator[Sequence[uuid.UUID] | None]:
        """While the next page is asked for and appended: of which messages; None: of all."""
        is_named = self.is_named
        self._readers_known = self._readers_ever if is_named else _OF_ALL
        page = self._page = asyncio.get_running_loop().create_future()
        try:
            yield list(self._named) if is_named else None
        finally:
            self._readers_known = self._page = None
            page.set_result(None)

    def begin(self, place: Place) -> None:
        """Forget all batches and go on at a place that readers need not have seen.

        Only while there are no readers, else they would miss what lies between.
        """
        assert not self.reader_count
        self._restart(place)

    def begin_anew(self, place: Place) -> None:
        """The same in another history: what readers are at means nothing any more."""
        self._epoch += 1
        self._restart(place)
        self.wake_all()

    def _restart(self, place: Place) -> None:
        self._first += len(self._batches) + 1
        self._batches.clear()
        self._events = 0
        self._bytes = 0
        self._start = self._place = place
        self._stretches.clear()

    def check_history(self, reader: Reader) -> None:
        """Raise TokenExpired unless the history is still the one in which the reader began."""
        if reader.epoch != self._epoch:
            raise TokenExpired(HISTORY_GONE)

    def append(self, events: Sequence[Event], behind: Place | None = None) -> None:
        """The next page of the feed, up to `behind` (None: its last event); wakes whom it is for.

        Within `asking` it need hold no more than what that named.
        """
        before, number = self._place, self._next
        self._note_stretch(_OF_ALL if self._readers_known is None else self._readers_known)
        self._place = advance(before, events) if behind is None else behind
        if events:
            self._add(Batch(events, self._place), before, number)
        for reader in self._light_sleepers:
            _wake(reader)
        self._light_sleepers.clear()

    def _note_stretch(self, readers_known: int) -> None:
        """A page lowers the count of all stretches that it continues; equal ones become one."""
        begin = _Stretch(readers_known, self._place, self._next)
        while self._stretches and self._stretches[-1].readers_known >= readers_known:
            begin = self._stretches.pop()._replace(readers_known=readers_known)
        self._stretches.append(begin)
        if len(self._stretches) > _STRETCHES:
            self._stretches.popleft()

    def _add(self, batch: Batch, before: Place, number: int) -> None:
        self._batches.append(batch)
        self._events += batch.size
        self._bytes += batch.bytes
        while self._events > RING_EVENTS or self._bytes > RING_BYTES:
            dropped = self._batches.popleft()
            self._events -= dropped.size
            self._bytes -= dropped.bytes
            self._start = dropped.behind
            self._first += 1
        for reader in self._told_by(batch):
            if reader.is_asleep and reader.settled:
                reader.number, reader.place = number, before
                _wake(reader)

    def _told_by(self, batch: Batch) -> Iterator[Reader]:
        for project_id in batch.projects():
            yield from self._readers.get((project_id,), ())
        if not self._keyed:
            return
        for key in batch.index():
            yield from self._readers.get(key, ())
        for project_id in batch.projects_told():
            yield from self._of_project.get(project_id, ())

    @property
    def _next(self) -> int:
        return self._first + len(self._batches)

    def try_join(self, reader: Reader) -> None:
        """Let a reader go on in the ring, if it has seen all that came before."""
        meant = self._meant_for(reader)
        if meant is None or not covers(reader.place, meant[0]):
            return
        number = meant[1]
        for batch in itertools.islice(self._batches, number - self._first, None):
            if not covers(reader.place, batch.behind):
                break
            number += 1
        reader.number = number
        reader.settled = False
        if number == self._next:
            self._to_end(reader)

    def _to_end(self, reader: Reader) -> None:
        """Its next batch is still to come: pages that made none were asked for with it in mind."""
        if not reader.settled:
            reader.place = join(reader.place, self._place)
            reader.settled = covers(self._place, reader.place)
        if reader.settled:
            reader.place = self._place

    def _meant_for(self, reader: Reader) -> tuple[Place, int] | None:
        """Place and batch where begins what was asked for with this reader in mind; None: not yet."""
        for readers_known, place, number in self._stretches:
            if readers_known >= reader.ordinal:
                is_here = number >= self._first
                return (place, number) if is_here else (self._start, self._first)
        if self._readers_known is None or self._readers_known >= reader.ordinal:
            return self._place, self._next
        return None

    async def page_read(self) -> None:
        """Return when no page is being read that was asked for before now."""
        if self._page is not None:
            await asyncio.shield(self._page)

    def is_at_end(self, reader: Reader) -> bool:
        """Whether the reader's next batch has still to come."""
        return reader.number == self._next

    def has(self, reader: Reader) -> bool:
        """Whether the reader's next batch is here, or will be the next to come."""
        return reader.number is not None and reader.number >= self._first

    def read(self, reader: Reader) -> tuple[Sequence[Entry], bool]:
        """The reader's next batch, as far as it may want it, and whether there is another."""
        assert reader.number is not None
        if reader.number == self._next:
            self._to_end(reader)
            return (), False
        batch = self._batches[reader.number - self._first]
        reader.number += 1
        entries = batch.entries_for(reader.project_id, reader.keys)
        if reader.settled:
            reader.place = batch.behind
        else:
            seen = reader.place
            entries = [e for e in entries if e.event.seq > seen.get(e.event.lane, ORIGIN).seq]
            reader.place = join(seen, batch.behind)
            reader.settled = covers(batch.behind, reader.place)
        if reader.number == self._next:
            self._to_end(reader)
        return entries, reader.number < self._next

    async def sleep(self, reader: Reader, timeout_s: float, *, lightly: bool = False) -> bool:
        """Wait until there may be something for the reader. False: nothing came in this time.

        Returns at once where something came since it last read. Who sleeps `lightly` is woken by
        any page: for one that waits to be somewhere, not only for what it wants.
        """
        if not self.is_at_end(reader) or reader.epoch != self._epoch:
            return True
        loop = asyncio.get_running_loop()
        reader.waiter = loop.create_future()
        if lightly or not reader.settled:
            self._light_sleepers.add(reader)
        timer = loop.call_later(timeout_s, self._time_is_up, reader)
        try:
            return await reader.waiter
        finally:
            timer.cancel()
            reader.waiter = None
            self._light_sleepers.discard(reader)

    def _time_is_up(self, reader: Reader) -> None:
        if reader.is_asleep:
            if reader.settled:  # nothing up to here was for it
                reader.number, reader.place = self._next, self._place
            assert reader.waiter is not None
            reader.waiter.set_result(False)

    def wake_all(self) -> None:
        """Every reader that sleeps looks again."""
        for readers in self._of_project.values():
            for reader in readers:
                _wake(reader)


def _wake(reader: Reader) -> None:
    if reader.waiter is not None and not reader.waiter.done():
        reader.waiter.set_result(True)


def _discard(sets: dict[Any, set[Reader]], key: Hashable, reader: Reader) -> None:
    readers = sets[key]
    readers.discard(reader)
    if not readers:
        del sets[key]
