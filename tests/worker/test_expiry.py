"""What no start comes to expires all the same, and nothing else does."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

import pytest

from mailgrpc.core.delivery import Mode, State, resend_step
from mailgrpc.core.ids import delivery_id
from mailgrpc.db.deliveries import Move, claim_due, move_deliveries, read_deliveries
from mailgrpc.db.engine import Database
from mailgrpc.db.workers import open_session
from mailgrpc.worker import expiry
from mailgrpc.worker.expiry import WALK_EVERY_S, Expiry
from mailgrpc.worker.sweep import Reaper, Sweeper
from tests.worker.rig import Clock, Part, Store


async def _nothing() -> None:
    """No neighbour has left a journal."""


def _sweeper(db: Database) -> Sweeper:
    reaper = Reaper(db, lane=0, clock=Clock())
    return Sweeper(db, reaper, Expiry(db, lane=0), lambda: None, _nothing, event_retention_s=60.0)


async def _expired(db: Database, *messages: uuid.UUID, ago: str = "2 minutes") -> None:
    """Their time ran out, and what they waited for came at the same moment."""
    then = "now() - $2::text::interval"
    await db.write(
        f"UPDATE deliveries SET due_at = {then}, expire_at = {then}"
        " WHERE message_of(id) = ANY ($1::uuid[])",
        messages,
        ago,
    )
    for table in ("due", "scheduled"):
        await db.write(
            f"UPDATE {table} SET due_at = {then} WHERE message_of(delivery_id) = ANY ($1::uuid[])",
            messages,
            ago,
        )


async def test_what_no_worker_serves_expires(db: Database, store: Store) -> None:
    queued = await store.put(channel="gone")
    retrying = await store.put(channel="gone", mode=Mode.RETRYING)
    await db.write(
        "UPDATE deliveries SET state = 3, possibly_sent = true WHERE message_of(id) = $1", retrying
    )
    scheduled = await store.put(channel="gone", send_at=datetime.now(UTC) + timedelta(hours=1))
    assert await store.value("SELECT count(*) FROM scheduled") == 1
    await _expired(db, queued, retrying, scheduled)
    expire_at = (await store.delivery(queued)).expire_at

    await _sweeper(db).sweep()
    for message in (queued, retrying, scheduled):
        delivery = await store.delivery(message)
        assert delivery.state is State.EXPIRED
        assert delivery.possibly_sent is (message == retrying)
        assert delivery.due_at is None
    assert (await store.delivery(queued)).expire_at == expire_at
    assert await store.due_rows() == 0
    assert await store.value("SELECT count(*) FROM scheduled") == 0
    told = await db.fetch("SELECT old_state FROM events WHERE state = 12 ORDER BY delivery_id")
    assert [row[0] for row in told] == [State.QUEUED, State.DEFERRED, State.QUEUED]


async def test_what_has_time_or_is_claimed_or_has_just_expired_is_left_to_its_start(
    db: Database, store: Store
) -> None:
    claimed = await store.put(channel="served")
    just_expired, lifted, waiting = await store.put_many([["a@example.com"]] * 3, channel="gone")
    await claim_due(db, await open_session(db, "x", ["served"]), "served", 10, 0)
    await _expired(db, claimed)
    await _expired(db, just_expired, ago="10 seconds")
    await db.write("UPDATE deliveries SET expire_at = NULL WHERE message_of(id) = $1", lifted)

    await _sweeper(db).sweep()
    for message in (claimed, just_expired, lifted, waiting):
        assert await store.state(message) is State.QUEUED
    assert await store.due_rows() == 4


async def test_a_walk_is_bounded_and_the_next_goes_on_where_it_stopped(
    db: Database, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "PAGE_ROWS", 2)
    monkeypatch.setattr(expiry, "PAGES_A_WALK", 2)
    messages = await store.put_many([["a@example.com"]] * 6, channel="gone")
    await _expired(db, *messages[3:])
    walker = Expiry(db, lane=0, clock=clock)
    assert await walker.walk() == 1
    assert await walker.walk() == 0  # it is not time yet
    clock.now += WALK_EVERY_S
    assert await walker.walk() == 2

    await _expired(db, messages[0])
    clock.now += WALK_EVERY_S
    assert await walker.walk() == 1  # from the beginning again
    assert [await store.state(m) for m in messages[1:3]] == [State.QUEUED] * 2


async def test_the_expiry_walk_lets_stand_what_resend_queued_meanwhile(
    db: Database, store: Store, clock: Clock
) -> None:
    past = datetime.now(UTC) - timedelta(minutes=5)
    message = await store.put(expire_at=past)
    wanted = delivery_id(message, 1)
    walk = Expiry(db, lane=0)
    # The walk has read its page: the delivery is QUEUED and over. Before it reads it anew,
    async with Part(db, clock) as part:
        await part.work()  # a start expires it,
        assert await store.state(message) is State.EXPIRED
    delivery = (await read_deliveries(db, [wanted]))[wanted]
    step, forced, expire_at = resend_step(delivery, datetime.now(UTC))  # and somebody resends it.
    assert await move_deliveries(db, 0, "me", [Move(delivery, step, forced, expire_at)]) == 1
    await walk._expire({wanted: past})
    assert await store.state(message) is State.QUEUED
