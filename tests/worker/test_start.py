"""The start: the last moment at which anything can forbid a send."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from mailgrpc.core.delivery import State, SuppressionReason
from mailgrpc.core.ids import delivery_id, new_id
from mailgrpc.db.deliveries import Starting, claim_due, promote_scheduled, start_deliveries
from mailgrpc.db.engine import Database
from mailgrpc.db.workers import open_session
from tests.worker.rig import Clock, Part, Store

FLAGS = 0b10


async def test_a_preference_set_after_enqueue_suppresses_at_the_start(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put("ada@example.com", "bob@example.com", flags=FLAGS)
    await db.write("INSERT INTO preferences VALUES (1, 'ada@example.com', $1, now())", FLAGS)
    async with Part(db, clock) as part:
        await part.work()
        assert part.outbox == ["bob@example.com"]
    delivery = await store.delivery(message, 1)
    assert delivery.state is State.SUPPRESSED
    assert delivery.suppression_reason is SuppressionReason.PREFERENCE
    assert delivery.attempt_count == 0
    assert await store.due_rows() == 0


async def test_a_suppression_made_between_two_attempts_ends_the_retries(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put("temperror+1@example.test")
    async with Part(db, clock) as part:
        await part.work()
        await db.write(
            "INSERT INTO suppressions (project_id, address, reason) VALUES ($1, $2, $3)",
            1,
            "temperror+1@example.test",
            SuppressionReason.COMPLAINT,
        )
        await store.make_due()
        await part.work()
        assert part.outbox == []
    delivery = await store.delivery(message)
    assert delivery.state is State.SUPPRESSED
    assert delivery.suppression_reason is SuppressionReason.COMPLAINT


async def test_the_preference_of_another_project_or_for_other_flags_does_not_count(
    db: Database, store: Store, clock: Clock
) -> None:
    other = await store.project("other")
    await store.put("ada@example.com", flags=FLAGS)
    await db.write("INSERT INTO preferences VALUES (1, 'ada@example.com', 4, now())")
    await db.write("INSERT INTO preferences VALUES ($1, 'ada@example.com', 2, now())", other)
    async with Part(db, clock) as part:
        await part.work()
        assert part.outbox == ["ada@example.com"]


async def test_what_expired_while_it_waited_is_not_sent(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put(expire_at=datetime.now(UTC) - timedelta(seconds=1))
    async with Part(db, clock) as part:
        await part.work()
        assert part.outbox == []
    assert await store.state(message) is State.EXPIRED


async def test_only_what_this_session_has_leased_is_started(db: Database, store: Store) -> None:
    first, second, unclaimed = await store.put_many([["a@b.com"], ["c@d.com"], ["e@f.com"]])
    mine, other = await open_session(db, "mine", []), await open_session(db, "other", [])
    await claim_due(db, mine, "default", 1, 0)
    await claim_due(db, other, "default", 1, 0)
    ids = [delivery_id(m, 1) for m in (first, second, unclaimed)]
    started = await start_deliveries(db, mine, 0, [Starting(i, new_id(), new_id()) for i in ids])
    assert [s.delivery.delivery_id for s in started] == ids[:1]
    assert await store.state(second) is await store.state(unclaimed) is State.QUEUED


async def test_what_a_caller_moved_after_the_claim_is_not_started(
    db: Database, store: Store
) -> None:
    message = await store.put()
    session = await open_session(db, "mine", [])
    await claim_due(db, session, "default", 1, 0)
    await db.write("UPDATE deliveries SET state = 11")  # CANCELLED
    starting = [Starting(delivery_id(message, 1), new_id(), new_id())]
    assert await start_deliveries(db, session, 0, starting) == []
    assert await store.state(message) is State.CANCELLED
    assert await store.due_rows() == 0


@pytest.mark.parametrize("after", [timedelta(minutes=5), timedelta(hours=1)])
async def test_mail_for_later_lies_apart_until_its_time_is_near(
    db: Database, store: Store, clock: Clock, after: timedelta
) -> None:
    message = await store.put(send_at=datetime.now(UTC) + after)
    far = after > timedelta(minutes=10)
    async with Part(db, clock) as part:
        assert await store.due_rows() == (not far)
        assert await promote_scheduled(db) == 0
        await part.work()
        assert part.outbox == []

        if far:
            await db.write("UPDATE scheduled SET due_at = now() + interval '9 minutes'")
            assert await promote_scheduled(db) == 1
        assert await store.due_rows() == 1
        await part.work()
        assert part.outbox == []

        await store.make_due()
        await part.work()
    assert await store.state(message) is State.SENT
