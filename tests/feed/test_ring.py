"""The ring alone: whoever joins, sleeps, is woken or left behind sees each event once, in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mailgrpc.core.event import EVERYTHING, Event, EventKind, Filter, Labels
from mailgrpc.core.ids import new_message_id
from mailgrpc.core.place import ORIGIN, Place, Position, advance
from mailgrpc.errors import TokenExpired
from mailgrpc.server import ring as ring_module
from mailgrpc.server.batch import Entry
from mailgrpc.server.ring import Reader, Ring

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def event(seq: int, lane: int = 0, project_id: int = 1, label: str = "", **fields: Any) -> Event:
    return Event(
        lane=lane,
        seq=seq,
        fingerprint=seq,
        project_id=project_id,
        kind=fields.pop("kind", EventKind.STATE_CHANGED),
        occurred_at=NOW,
        message_id=fields.pop("message_id", None) or new_message_id(),
        payload=fields.pop("payload", None),
        labels=Labels(correlation_id=label),
    )


def joined(ring: Ring, wanted: Filter = EVERYTHING, place: Place | None = None) -> Reader:
    reader = ring.add(1, ring.place if place is None else place, wanted)
    ring.try_join(reader)
    return reader


def seqs(entries: Sequence[Entry]) -> list[int]:
    return [entry.event.seq for entry in entries]


async def asleep(ring: Ring, reader: Reader, for_s: float = 30.0) -> asyncio.Task[bool]:
    task = asyncio.create_task(ring.sleep(reader, for_s))
    while not reader.is_asleep:
        await asyncio.sleep(0)
    return task


async def test_news_that_came_while_a_response_was_taken_are_not_slept_over() -> None:
    """Else they would wait for the next ones, or for the heartbeat."""
    ring = Ring()
    reader = joined(ring)
    assert ring.read(reader) == ((), False)
    ring.append([event(1)])
    assert await ring.sleep(reader, 30.0)
    assert seqs(ring.read(reader)[0]) == [1]


async def test_who_sleeps_is_woken_by_what_is_for_it_and_stands_just_before() -> None:
    ring = Ring()
    reader = joined(ring, Filter(correlation_ids=frozenset("a")))
    task = await asleep(ring, reader)
    ring.append([event(1, label="b"), event(2)])
    ring.append([event(3, label="c")])
    assert reader.is_asleep
    ring.append([event(4, label="b"), event(5, label="a"), event(6, label="a")])
    assert await task
    assert reader.place == {0: Position(3, 3)}
    assert seqs(ring.read(reader)[0]) == [5, 6]
    assert reader.place == ring.place == {0: Position(6, 6)}


async def test_who_sleeps_is_not_overtaken_by_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "RING_EVENTS", 3)
    ring = Ring()
    reader = joined(ring, Filter(correlation_ids=frozenset("a")))
    task = await asleep(ring, reader)
    for seq in range(1, 50):
        ring.append([event(seq)])
    ring.append([event(50, label="a")])
    assert await task
    assert ring.has(reader)
    assert seqs(ring.read(reader)[0]) == [50]


async def test_who_sleeps_lightly_is_woken_by_what_is_for_others() -> None:
    ring = Ring()
    reader = joined(ring, Filter(correlation_ids=frozenset("a")))
    task = asyncio.create_task(ring.sleep(reader, 30.0, lightly=True))
    while not reader.is_asleep:
        await asyncio.sleep(0)
    ring.append([event(1, label="b")])
    assert await task
    ring.read(reader)
    assert reader.place == {0: Position(1, 1)}


def test_the_ring_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module, "RING_BYTES", 100_000)
    ring = Ring()
    large = {"count": 1, "filter": {"recipients": ["x" * 30_000]}}
    for seq in range(1, 10):
        ring.append([event(seq, kind=EventKind.MESSAGES_CLEARED, payload=large)])
    assert ring.event_count == 3
    assert ring.place == {0: Position(9, 9)}
    ring.append([event(10, kind=EventKind.MESSAGES_CLEARED, payload={"filter": "x" * 200_000})])
    assert ring.event_count == 0
    ring.append([event(11)])
    assert seqs(ring.read(joined(ring, place={0: Position(10, 10)}))[0]) == [11]


async def test_whose_time_is_up_stands_at_the_end() -> None:
    ring = Ring()
    reader = joined(ring, Filter(correlation_ids=frozenset("a")))
    task = await asleep(ring, reader, 0.01)
    ring.append([event(1)])
    assert not await task
    assert reader.place is ring.place
    assert ring.read(reader) == ((), False)


async def test_what_comes_between_the_end_of_time_and_the_waking_is_read() -> None:
    ring = Ring()
    reader = joined(ring)
    task = await asleep(ring, reader)
    ring._time_is_up(reader)
    ring.append([event(1)])  # before the reader's task runs
    assert not await task
    assert seqs(ring.read(reader)[0]) == [1]


async def test_a_removal_wakes_every_filter_of_its_project() -> None:
    ring = Ring()
    wanted = Filter(recipients=frozenset(["nobody@example.test"]))
    reader = joined(ring, wanted)
    stranger = ring.add(2, ring.place, wanted)
    ring.try_join(stranger)
    mine, other = await asleep(ring, reader), await asleep(ring, stranger)
    ring.append([event(1), event(2, kind=EventKind.MESSAGES_CLEARED)])
    assert await mine
    assert seqs(ring.read(reader)[0]) == [2]
    assert stranger.is_asleep
    other.cancel()


async def test_a_reader_ahead_of_the_ring_in_a_lane_leaves_out_what_it_has_seen() -> None:
    ring = Ring()
    ring.append([event(1, lane=0)])
    reader = joined(ring, place={0: Position(1, 1), 1: Position(4, 4)})
    assert not reader.settled
    task = await asleep(ring, reader)
    ring.append([event(2, lane=0), event(3, lane=1)])
    assert await task
    assert seqs(ring.read(reader)[0]) == [2]
    assert reader.place == {0: Position(2, 2), 1: Position(4, 4)}
    ring.append([event(4, lane=1), event(5, lane=1)])
    assert seqs(ring.read(reader)[0]) == [5]
    assert reader.settled
    assert reader.place == ring.place


def test_who_has_not_seen_what_came_before_the_ring_cannot_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ring_module, "RING_EVENTS", 2)
    ring = Ring()
    for seq in range(1, 6):
        ring.append([event(seq)])
    assert not ring.has(joined(ring, place={0: Position(2, 2)}))
    assert seqs(ring.read(joined(ring, place={0: Position(3, 3)}))[0]) == [4]


async def test_another_history_ends_every_reader_and_those_who_sleep_are_woken() -> None:
    ring = Ring()
    reader, sleeper = joined(ring), joined(ring)
    task = await asleep(ring, sleeper)
    ring.begin_anew({0: Position(7, 7)})
    assert await task
    for old in (reader, sleeper):
        assert await ring.sleep(old, 30.0)
        with pytest.raises(TokenExpired):
            ring.check_history(old)
    ring.check_history(joined(ring))


async def test_a_reader_that_goes_leaves_nothing_behind() -> None:
    ring = Ring()
    readers = [
        joined(ring),
        joined(ring, Filter(recipients=frozenset("abc"))),
        joined(ring, place={3: Position(9)}),
    ]
    tasks = [await asleep(ring, reader) for reader in readers]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for reader in readers:
        ring.remove(reader)
    assert ring.reader_count == 0
    assert not ring._readers
    assert not ring._light_sleepers
    assert not ring._keyed


_ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 2), min_size=1, max_size=6)),
        st.tuples(st.just("read"), st.integers(0, 3)),
        st.tuples(st.just("sleep"), st.integers(0, 3)),
        st.tuples(st.just("time"), st.integers(0, 3)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(actions=_ACTIONS, ahead=st.dictionaries(st.integers(0, 2), st.integers(1, 30)))
def test_any_order_of_appending_reading_and_sleeping_shows_each_event_once(
    actions: list[tuple[str, Any]], ahead: dict[int, int]
) -> None:
    asyncio.run(_carry_out(actions, {lane: Position(seq, seq) for lane, seq in ahead.items()}))


async def _carry_out(actions: list[tuple[str, Any]], ahead: Place) -> None:
    ring = Ring()
    keyed = Filter(correlation_ids=frozenset(["0"]))
    readers = [
        joined(ring),
        joined(ring, keyed),
        joined(ring, place=ahead),  # it read the table further than the ring has come
        joined(ring, keyed, place=ahead),
    ]
    shown: list[list[int]] = [[] for _ in readers]
    sleeping: dict[int, asyncio.Task[bool]] = {}
    appended: list[Event] = []

    def read(n: int) -> bool:
        entries, more = ring.read(readers[n])
        shown[n] += [
            e.event.seq for e in entries if n % 2 == 0 or e.event.labels.correlation_id == "0"
        ]
        return more

    async def rouse(n: int) -> None:
        if (task := sleeping.pop(n, None)) is not None:
            if readers[n].is_asleep:
                ring._time_is_up(readers[n])
            await task

    for what, which in actions:
        if what == "append":
            page = [
                event(len(appended) + n + 1, lane, label=str(lane % 2))
                for n, lane in enumerate(which)
            ]
            ring.append(page)
            appended += page
        elif what == "sleep":
            if which not in sleeping and ring.is_at_end(readers[which]):
                sleeping[which] = await asleep(ring, readers[which])
        elif what == "time":
            await rouse(which)
        elif which not in sleeping or not readers[which].is_asleep:
            await rouse(which)
            read(which)
    for n, reader in enumerate(readers):
        await rouse(n)
        while read(n):
            pass
        start: Place = ahead if n >= 2 else {}
        new = [e for e in appended if e.seq > start.get(e.lane, ORIGIN).seq]
        assert shown[n] == [e.seq for e in new if n % 2 == 0 or e.labels.correlation_id == "0"]
        end = advance(start, new)
        assert all(reader.place.get(lane, ORIGIN) == position for lane, position in end.items())


IDS = [new_message_id() for _ in range(3)]
_NAMED_ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.lists(st.integers(0, 2), min_size=2, max_size=6)),
        st.tuples(st.just("come"), st.sets(st.integers(0, 2), max_size=2)),  # none: of all
        st.tuples(st.just("go"), st.integers(0, 3)),
        st.tuples(st.just("ask"), st.just(0)),
        st.tuples(st.just("append"), st.just(0)),
        st.tuples(st.just("read"), st.integers(0, 3)),
        st.tuples(st.just("time"), st.integers(0, 3)),
    ),
    min_size=10,
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(actions=_NAMED_ACTIONS, back=st.integers(0, 12))
@example(  # who comes while a page is read that leaves out what it waits for
    actions=[
        ("come", {0}),
        ("write", [2, 1]),
        ("ask", 0),
        ("come", {1}),
        ("read", 1),
        ("append", 0),
    ],
    back=2,
)
def test_readers_that_come_while_only_what_is_named_is_read_miss_nothing(
    actions: list[tuple[str, Any]], back: int
) -> None:
    asyncio.run(_follow_what_is_named(actions, back))


async def _follow_what_is_named(actions: list[tuple[str, Any]], back: int) -> None:
    """A tailer over a table of events; readers come at places that were, and go."""
    ring, table = Ring(), [event(1)]
    ring.begin({0: Position(1, 1)})
    readers: list[tuple[Reader, frozenset[Any], int, list[int]]] = []
    asking = contextlib.ExitStack()
    asked: tuple[list[Event], Place] | None = None

    def behind(place: Place) -> list[Event]:
        return [e for e in table if e.seq > place[0].seq]

    def read(n: int) -> bool:
        reader, names, _, shown = readers[n]
        if ring.has(reader):
            entries, more = ring.read(reader)
            events = [e.event for e in entries]
        else:
            events = behind(reader.place)[:1]
            reader.place = advance(reader.place, events)
            ring.try_join(reader)
            more = len(events) == 1 or not ring.is_at_end(reader)
        shown += [e.seq for e in events if not names or e.message_id in names]
        return more

    def ask() -> None:
        nonlocal asked
        messages = asking.enter_context(ring.asking())
        page = behind(ring.place)[:4]
        wanted = [e for e in page if messages is None or e.message_id in messages]
        asked = wanted, advance(ring.place, page)

    def append() -> None:
        nonlocal asked
        assert asked is not None
        ring.append(*asked)
        asking.close()
        asked = None

    for what, which in actions:
        if what == "write":
            for number in which:
                message_id = IDS[number] if number < len(IDS) else None
                table.append(event(len(table) + 1, message_id=message_id))
        elif what == "come":
            start = max(1, len(table) - back)
            names = frozenset(IDS[n] for n in which)
            reader = ring.add(1, {0: Position(start, start)}, Filter(message_ids=names))
            readers.append((reader, names, start, []))
        elif what == "go" and which < len(readers) > 1:
            ring.remove(readers.pop(which)[0])
        elif what == "ask" and asked is None and readers:
            ask()
        elif what == "append" and asked is not None:
            append()
        elif what == "read" and which < len(readers):
            read(which)
        elif what == "time" and which < len(readers) and ring.is_at_end(readers[which][0]):
            sleeping = await asleep(ring, readers[which][0])
            if readers[which][0].is_asleep:
                ring._time_is_up(readers[which][0])
            await sleeping
    if asked is not None:
        append()
    while readers and behind(ring.place):
        ask()
        append()
    for n, (_, names, start, shown) in enumerate(readers):
        while read(n) or not ring.has(readers[n][0]):
            pass
        assert shown == [
            e.seq for e in table if e.seq > start and (not names or e.message_id in names)
        ]
        assert readers[n][0].place == ring.place  # so that its token says so


async def test_a_page_without_anything_for_anybody_takes_everybody_along() -> None:
    """Who waits for something that does not come goes on with a new place, and so can be resumed."""
    ring = Ring()
    reader = joined(ring, Filter(message_ids=frozenset(IDS[:1])))
    with ring.asking() as messages:
        assert messages == IDS[:1]
        ring.append([], {0: Position(5, 5)})
    assert ring.read(reader) == ((), False)
    assert reader.place == ring.place == {0: Position(5, 5)}
    everything = ring.add(1, {0: Position(3, 3)}, EVERYTHING)
    ring.try_join(everything)
    assert not ring.has(everything)  # what lies between was not read
    with ring.asking() as messages:
        assert messages is None
