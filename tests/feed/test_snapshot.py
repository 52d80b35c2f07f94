"""A snapshot and what follows it are together what is in the table, whoever writes meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from mailgrpc.core.delivery import UNENDED, State
from mailgrpc.core.ids import MESSAGE, to_text
from mailgrpc.db import snapshot as pages
from mailgrpc.db.engine import Database
from mailgrpc.v1 import delivery_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.feed.reading import Stream, feed_of, nudge, states, watching
from tests.feed.writing import LingeringDatabase, Sender, enqueue, live, message
from tests.gateway import Gateway, until

EVERYTHING = delivery_pb2.MessageFilter(created_after=Timestamp(seconds=1))


class Model:
    """What a reader knows: it takes the snapshot, and then only what is newer."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[int, int]] = {}

    def take(self, response: Any) -> None:
        for status in response.snapshot:
            for d in status.deliveries:
                assert d.delivery_id not in self.known, "shown twice"
                self.known[d.delivery_id] = (d.state, d.version)
        for event in response.events:
            d = event.state_changed.delivery
            _, version = self.known.get(d.delivery_id, (0, 0))
            assert d.version > version, "told again what was shown"
            self.known[d.delivery_id] = (d.state, d.version)


@pytest.fixture
async def writers(database_url: str, redis_url: str) -> AsyncIterator[list[Database]]:
    databases: list[Database] = [
        LingeringDatabase(database_url, redis_url, random.Random(seed)) for seed in range(3)
    ]
    yield databases
    for database in databases:
        await database.close()


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [(pb.SNAPSHOT_UNENDED, delivery_pb2.MessageFilter()), (pb.SNAPSHOT_ALL, EVERYTHING)],
    ids=["unended", "all"],
)
async def test_a_snapshot_under_load_and_what_follows_is_the_table(
    server: Gateway,
    db: Database,
    writers: list[Database],
    kind: Any,
    wanted: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pages, "SNAPSHOT_PAGE", 10)  # many pages, each at its own moment
    await enqueue(db, *(message(f"{n}@example.test") for n in range(300)))
    at_work = [
        asyncio.create_task(live(w, lane, 700, random.Random(lane)))
        for lane, w in enumerate(writers)
    ]
    model = Model()
    stream = Stream(server.stub, snapshot=kind, filter=wanted)
    while not stream.caught_up:
        response = await stream.read()
        assert bool(response.resume_token) == response.caught_up
        model.take(response)
    assert len(stream.snapshot) > 100
    assert stream.events, "nothing changed meanwhile: the test shows nothing"

    await asyncio.gather(*at_work)
    await enqueue(db, last := message("last@example.test"))
    nudge(server)
    told = to_text(MESSAGE, last.message_id)
    while all(e.message_id != told for e in stream.events[-1:]):
        model.take(await stream.read())
    stream.call.cancel()

    table = await states(db)
    if kind == pb.SNAPSHOT_UNENDED:
        assert {i for i, (state, _) in table.items() if State(state) in UNENDED} <= set(model.known)
        table = {i: known for i, known in table.items() if i in model.known}
    assert model.known == table


async def test_a_snapshot_that_breaks_off_leaves_no_token_and_starts_again(
    server: Gateway, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "SNAPSHOT_PAGE", 5)
    await enqueue(db, *(message(custom_args={"n": "x" * 250}) for _ in range(500)))
    broken = Stream(server.stub, snapshot=pb.SNAPSHOT_UNENDED)
    await broken.until(lambda s: len(s.snapshot) > 10)
    broken.call.cancel()
    assert not broken.token and not broken.caught_up
    await until(lambda: feed_of(server).ring.reader_count == 0)

    async with watching(server.stub, snapshot=pb.SNAPSHOT_UNENDED) as again:
        assert len(again.snapshot) == 500
        assert again.token


async def test_a_snapshot_shows_what_fits_the_filter_and_nobody_elses(
    server: Gateway, db: Database
) -> None:
    mine = message("ada@example.test", "bob@example.test", tags=("invoice",))
    await enqueue(db, mine, message("eve@example.test"), message(project_id=2, tags=("invoice",)))
    wanted = delivery_pb2.MessageFilter(tags=["invoice"])
    async with watching(server.stub, snapshot=pb.SNAPSHOT_UNENDED, filter=wanted) as stream:
        [status] = stream.snapshot
        assert status.message_id == to_text(MESSAGE, mine.message_id)
        assert [d.recipient for d in status.deliveries] == ["ada@example.test", "bob@example.test"]


async def test_what_has_ended_is_in_a_snapshot_of_all_only(server: Gateway, db: Database) -> None:
    await enqueue(db, message())
    sender = await Sender.open(db)
    await sender.record(await sender.start())
    async with watching(server.stub, snapshot=pb.SNAPSHOT_UNENDED) as unended:
        assert not unended.snapshot
    async with watching(server.stub, snapshot=pb.SNAPSHOT_ALL, filter=EVERYTHING) as everything:
        [status] = everything.snapshot
        assert status.state == delivery_pb2.DELIVERY_STATE_SENT


async def test_a_snapshot_with_nothing_in_it_is_caught_up_at_once(server: Gateway) -> None:
    stream = Stream(server.stub, snapshot=pb.SNAPSHOT_UNENDED)
    response = await stream.read()
    assert response.caught_up and response.resume_token
    stream.call.cancel()
