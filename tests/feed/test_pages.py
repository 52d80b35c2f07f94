"""A page of what somebody waits for is the page that all would be, with the rest left out."""

from __future__ import annotations

import pytest

from mailgrpc.core.event import EventKind
from mailgrpc.core.place import Position, advance
from mailgrpc.db.engine import Database
from mailgrpc.db.events import read_events, read_page_about
from mailgrpc.errors import TokenExpired
from tests.feed.writing import Sender, enqueue, message


@pytest.mark.parametrize("limit", [1, 7, 20, 1000])
async def test_what_is_about_some_messages_is_the_page_without_the_rest(
    db: Database, limit: int
) -> None:
    new = [message(f"a{n}@example.test") for n in range(12)]
    for n, one in enumerate(new):  # in three lanes, interleaved
        await enqueue(db, one, lane=n % 3)
    sender = await Sender.open(db, lane=4)
    await sender.record(await sender.start())
    await db.write(
        """INSERT INTO events (lane, seq, project_id, kind, occurred_at, payload)
           VALUES (5, nextval('feed_seq'), 1, 18, now(), '{"filter": {}, "count": 1}')"""
    )
    wanted = [one.message_id for one in new[::4]]
    place: dict[int, Position] = {}
    shown = 0
    while events := await read_events(db, place, limit):
        page = await read_page_about(db, place, limit, wanted)
        assert page.size == len(events)
        assert page.behind == advance(place, events)
        assert page.events == [
            e for e in events if e.message_id in wanted or e.kind is not EventKind.STATE_CHANGED
        ]
        shown += len(page.events)
        place = dict(page.behind)
    assert shown == 3 * len(wanted) + 1
    empty = await read_page_about(db, place, limit, wanted)
    assert (empty.size, empty.events, empty.behind) == (0, [], place)


async def test_such_a_page_knows_its_history_too(db: Database) -> None:
    await enqueue(db, message(), message())
    [first, _] = await read_events(db, {}, 10)
    strange = {first.lane: Position(first.seq, first.fingerprint + 1)}
    with pytest.raises(TokenExpired):
        await read_page_about(db, strange, 10, [])
    await db.write("UPDATE feed_horizon SET seq = $1 WHERE lane = $2", first.seq, first.lane)
    with pytest.raises(TokenExpired):
        await read_page_about(db, {}, 10, [])
