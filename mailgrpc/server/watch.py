"""WatchStatus and ListEvents: what one subscriber is shown, in order, whole, once.

A stream begins in one of three ways: from now, from a token, or with a snapshot. In a snapshot the
place is taken before the first page is read, so that nothing that changes meanwhile is missed. A
page may then already show what an event behind that place will tell; so the versions that were
shown are kept, 20 bytes a delivery, and an event that is not newer is left out, until the reader
has passed the place where the feed stood after the last page. Only then are these forgotten,
`caught_up` is said, and the first token is given: a snapshot that breaks begins again.

Once it has begun, a stream outlives a store that fails or falls silent (server/reading.py).

A response is written when the one before it was taken by the transport; meanwhile the subscriber
holds no connection to the database and no more than one page of events.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import uuid
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from mailgrpc import failpoints
from mailgrpc.core.event import EventKind, Filter, MessageStatus
from mailgrpc.core.place import Place, advance, covers, decode_token, encode_token
from mailgrpc.db.engine import Database
from mailgrpc.db.snapshot import read_all_page, read_unended_page
from mailgrpc.errors import Exhausted, InvalidRequest, Reason, Violation
from mailgrpc.server import convert
from mailgrpc.server.batch import Entry
from mailgrpc.server.feed import Feed
from mailgrpc.server.reading import Reading
from mailgrpc.v1 import mail_service_pb2
from mailgrpc.v1.mail_service_pb2 import WatchStatusResponse

DEFAULT_KINDS = frozenset(EventKind)
RESPONSE_BYTES = 256 * 1024
SNAPSHOT_DELIVERIES = 1_000_000
DEFAULT_HEARTBEAT_S = 15.0
MAX_PAGE = 1000
DEFAULT_PAGE = 50
_SEARCH_S = 1.0  # bounds a ListEvents whose filter matches nothing in a long history
_STREAM_RETRY = timedelta(seconds=5)


class _Shown:
    """The versions that a snapshot has shown: ids ascending, 20 bytes a delivery."""

    def __init__(self) -> None:
        self._high: array[int] = array("Q")
        self._low: array[int] = array("Q")
        self._versions: array[int] = array("i")

    def add(self, status: MessageStatus) -> None:
        for d in status.deliveries:
            self._high.append(d.delivery_id.int >> 64)
            self._low.append(d.delivery_id.int & 0xFFFF_FFFF_FFFF_FFFF)
            self._versions.append(d.version)

    def __len__(self) -> int:
        return len(self._versions)

    def has(self, delivery_id: uuid.UUID, version: int) -> bool:
        """Whether this version of the delivery, or a later one, was shown."""
        high, low = delivery_id.int >> 64, delivery_id.int & 0xFFFF_FFFF_FFFF_FFFF
        start = bisect.bisect_left(self._high, high)
        end = bisect.bisect_right(self._high, high, lo=start)
        index = bisect.bisect_left(self._low, low, lo=start, hi=end)
        found = index < end and self._low[index] == low
        return found and version <= self._versions[index]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a subscriber asked for, checked."""

    project_id: int
    filter: Filter
    kinds: frozenset[EventKind]

    def takes(self, entry: Entry) -> bool:
        """Whether an event is for this subscriber."""
        return entry.event.kind in self.kinds and self.filter.matches(entry.event)

    def token(self, place: Place) -> str:
        """The resume token of a place, for this subscriber's project."""
        return encode_token(self.project_id, place)

    def page(
        self, entries: Sequence[Entry], behind: Place, *, more: bool
    ) -> mail_service_pb2.ListEventsResponse:
        """An answer of ListEvents that ends at a place."""
        return mail_service_pb2.ListEventsResponse(
            events=[e.shown for e in entries], resume_token=self.token(behind), more=more
        )


def wanted_kinds(kinds: Sequence[int]) -> frozenset[EventKind]:
    """The kinds asked for; none is all of this version. Kinds of later versions are ignored."""
    if not kinds:
        return DEFAULT_KINDS
    return frozenset(kind for kind in EventKind if kind in kinds)


class _Pulse:
    """When a stream was last heard: it is silent for no longer than its heartbeat."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._clock = asyncio.get_running_loop().time
        self._beat_at = self._clock()

    def beat(self) -> None:
        """The transport took a response."""
        self._beat_at = self._clock()

    @property
    def left_s(self) -> float:
        """How long the stream may still be silent."""
        return max(0.0, self._beat_at + self._every_s - self._clock())

    @property
    def is_due(self) -> bool:
        """Whether it has been silent for too long."""
        return self._clock() >= self._beat_at + self._every_s


class Watch:
    """Serves the streams of one process."""

    def __init__(self, database: Database, feed: Feed, *, max_streams: int) -> None:
        self._database = database
        self._feed = feed
        self._max_streams = max_streams
        self._streams = 0

    async def stream(
        self, wanted: Wanted, token: str, snapshot: int, heartbeat_s: float
    ) -> AsyncIterator[WatchStatusResponse]:
        """The responses of one WatchStatus call; ends only by an error."""
        if self._streams >= self._max_streams:
            raise Exhausted(
                Reason.TOO_MANY_STREAMS,
                f"this server already serves {self._max_streams} streams",
                retry_after=_STREAM_RETRY,
                quota="streams",
            )
        self._streams += 1
        pulse = _Pulse(heartbeat_s)
        try:
            stream = self._stream(wanted, token, snapshot, pulse)
            async with contextlib.aclosing(stream) as responses:
                async for response in responses:
                    response.server_time.CopyFrom(convert.timestamp(datetime.now(UTC)))
                    yield response
                    failpoints.reach("watch.responded")
                    pulse.beat()
        finally:
            self._streams -= 1

    async def _stream(
        self, wanted: Wanted, token: str, snapshot: int, pulse: _Pulse
    ) -> AsyncGenerator[WatchStatusResponse, None]:
        end = await self._feed.now()
        place = await self._place_of(wanted, token) if token else end
        shown: _Shown | None = None
        with (
            self._feed.reader(wanted.project_id, place, wanted.filter) as reader,
            contextlib.closing(Reading(self._feed, reader)) as reading,
        ):
            if snapshot:
                shown = _Shown()
                async for response in self._snapshot(wanted, snapshot, shown, pulse):
                    yield response
                end = await self._feed.now()
            is_caught_up, more = False, True
            while True:
                if not is_caught_up and covers(reading.place, end):
                    is_caught_up, shown = True, None
                    yield WatchStatusResponse(
                        caught_up=True, resume_token=wanted.token(reading.place)
                    )
                elif not more:
                    # `end` can be ahead of the ring, behind events that are for others.
                    await self._feed.wait_for_news(reader, pulse.left_s, lightly=not is_caught_up)
                if pulse.is_due:
                    yield WatchStatusResponse(
                        resume_token=wanted.token(reading.place) if shown is None else ""
                    )
                before = reading.place
                entries, more = await reading.take(pulse.left_s)
                taken = [e for e in entries if wanted.takes(e) and not _was_shown(shown, e)]
                for chunk in _chunks(taken):
                    whole = chunk[-1] is taken[-1]
                    behind = reading.place if whole else advance_over(before, entries, chunk[-1])
                    yield WatchStatusResponse(
                        events=[e.shown for e in chunk],
                        resume_token=wanted.token(behind) if shown is None else "",
                    )

    async def _place_of(self, wanted: Wanted, token: str) -> Place:
        place = decode_token(wanted.project_id, token)
        await self._feed.check(place)
        return place

    async def _snapshot(
        self, wanted: Wanted, snapshot: int, shown: _Shown, pulse: _Pulse
    ) -> AsyncIterator[WatchStatusResponse]:
        unended = snapshot == mail_service_pb2.SNAPSHOT_UNENDED
        read_page = read_unended_page if unended else read_all_page
        after: uuid.UUID | None = None
        while True:
            self._feed.check_open()
            async with self._feed.look():
                page, after = await read_page(
                    self._database, wanted.project_id, wanted.filter, after
                )
            for status in page:
                shown.add(status)
            if len(shown) > SNAPSHOT_DELIVERIES:
                text = f"the snapshot has more than {SNAPSHOT_DELIVERIES} deliveries"
                raise InvalidRequest(Violation("filter", Reason.FILTER_TOO_WIDE, text))
            for response in _snapshot_responses(page):
                yield response
            if after is None:
                return
            if pulse.is_due:
                yield WatchStatusResponse()

    async def list_events(
        self, wanted: Wanted, token: str, page_size: int, wait_s: float
    ) -> mail_service_pb2.ListEventsResponse:
        """One page of what a stream would show, after at most `wait_s` for the first event."""
        place = await self._place_of(wanted, token) if token else await self._feed.now()
        most = min(page_size or DEFAULT_PAGE, MAX_PAGE)
        clock = asyncio.get_running_loop().time
        begun_at = clock()
        with self._feed.reader(wanted.project_id, place, wanted.filter) as reader:
            while True:
                before = reader.place
                entries, more = await self._feed.read(reader)
                taken = [e for e in entries if wanted.takes(e)]
                if taken:
                    chunk = next(_chunks(taken, most))
                    whole = len(chunk) == len(taken)
                    behind = reader.place if whole else advance_over(before, entries, chunk[-1])
                    return wanted.page(chunk, behind, more=more or not whole)
                if more and clock() >= begun_at + wait_s + _SEARCH_S:
                    return wanted.page((), reader.place, more=True)
                left_s = begun_at + wait_s - clock()
                if not more and (left_s <= 0 or not await self._feed.wait_for_news(reader, left_s)):
                    return wanted.page((), reader.place, more=False)


def advance_over(before: Place, entries: Sequence[Entry], last: Entry) -> Place:
    """The place just behind `last`, one of the entries that were read at `before`.

    Events of other projects in between are read again from there, and left out again.
    """
    until = next(i for i, e in enumerate(entries) if e is last) + 1
    return advance(before, [e.event for e in entries[:until]])


def _chunks(entries: Sequence[Entry], most: int = MAX_PAGE) -> Iterator[Sequence[Entry]]:
    """The entries in runs of at most `most` and, but for one that is larger alone, 256 KiB."""
    start = size = 0
    for index, entry in enumerate(entries):
        more = entry.shown.ByteSize()
        if index > start and (size + more > RESPONSE_BYTES or index - start >= most):
            yield entries[start:index]
            start, size = index, 0
        size += more
    if start < len(entries):
        yield entries[start:]


def _was_shown(shown: _Shown | None, entry: Entry) -> bool:
    delivery = entry.event.delivery
    if shown is None or delivery is None:
        return False
    return shown.has(delivery.delivery_id, delivery.version)


def _snapshot_responses(
    statuses: Sequence[MessageStatus],
) -> list[WatchStatusResponse]:
    """Statuses in responses of a bounded size."""
    responses = []
    current = WatchStatusResponse()
    size = 0
    for status in statuses:
        shown = convert.status(status)
        size += shown.ByteSize()
        if current.snapshot and size > RESPONSE_BYTES:
            responses.append(current)
            current, size = WatchStatusResponse(), shown.ByteSize()
        current.snapshot.append(shown)
    if current.snapshot:
        responses.append(current)
    return responses
