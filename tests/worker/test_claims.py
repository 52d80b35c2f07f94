"""Whose turn it is, and what shares a call."""

from __future__ import annotations

import asyncio
import math
from collections import Counter

import pytest

from mailgrpc.core.delivery import Mode, Outcome, State
from mailgrpc.core.ids import delivery_id
from mailgrpc.core.message import Priority
from mailgrpc.db.deliveries import claim_due, release_claims
from mailgrpc.db.engine import Database
from mailgrpc.db.workers import end_session, open_session
from mailgrpc.providers.capture import CaptureProvider
from tests.gateway import until
from tests.worker.rig import Clock, Gate, LossyDatabase, Part, Store


async def test_a_small_project_is_in_the_first_batch_beside_a_large_one(
    db: Database, store: Store
) -> None:
    other = await store.project("other")
    await store.put_many([[f"a{i}@example.com"] for i in range(1000)])
    await store.put_many([["b@example.com"]], project_id=other)
    session = await open_session(db, "test", [])
    first = await claim_due(db, session, "default", 200, 0)
    assert Counter(c.project_id for c in first.claimed) == {1: 100, other: 1}
    second = await claim_due(db, session, "default", 200, first.claimed[-1].project_id)
    assert Counter(c.project_id for c in second.claimed) == {1: 200}


async def test_projects_take_turns_in_being_first(db: Database, store: Store) -> None:
    projects = [1, *[await store.project(f"p{i}") for i in range(4)]]
    for project in projects:
        await store.put_many([["a@example.com"]] * 3, project_id=project)
    session, after, firsts = await open_session(db, "test", []), 0, []
    for _ in projects:
        claimed = (await claim_due(db, session, "default", 1, after)).claimed
        after = claimed[-1].project_id
        firsts.append(after)
    assert firsts == projects


async def test_projects_with_nothing_due_yet_keep_nobody_from_its_turn(
    db: Database, store: Store
) -> None:
    for i in range(70):
        await store.put_many([["a@example.com"]], project_id=await store.project(f"later{i}"))
    await db.write("UPDATE due SET due_at = now() + interval '5 minutes'")
    last = await store.project("last")
    await store.put_many([["b@example.com"]], project_id=last)
    session = await open_session(db, "test", [])
    claims = await claim_due(db, session, "default", 200, 0)
    assert [c.project_id for c in claims.claimed] == [last]


async def test_the_urgent_goes_before_the_bulk(db: Database, store: Store, clock: Clock) -> None:
    for name, priority in (("bulk", Priority.BULK), ("high", Priority.HIGH)):
        await store.put(f"{name}@example.com", priority=priority)
    await store.put("normal@example.com")
    await store.put("urgent@example.com", priority=Priority.URGENT)
    async with Part(db, clock, concurrency=1) as part:
        await part.work()
        assert part.outbox == [f"{n}@example.com" for n in ("urgent", "high", "normal", "bulk")]


async def test_two_workers_never_claim_the_same(db: Database, store: Store) -> None:
    await store.put_many([["a@example.com"]] * 300)
    sessions = [await open_session(db, "test", []) for _ in range(3)]
    claims = await asyncio.gather(*(claim_due(db, s, "default", 100, 0) for s in sessions))
    ids = [c.delivery_id for batch in claims for c in batch.claimed]
    assert len(ids) == len(set(ids)) == 300


async def test_a_claim_that_finds_nothing_says_when_to_come_again(
    db: Database, store: Store
) -> None:
    session = await open_session(db, "test", [])
    assert (await claim_due(db, session, "default", 10, 0)).next_due_in_s is None
    await store.put()
    await db.write("UPDATE due SET due_at = now() + interval '90 seconds'")
    in_s = (await claim_due(db, session, "default", 10, 0)).next_due_in_s
    assert in_s is not None
    assert math.isclose(in_s, 90, abs_tol=5)


async def test_a_slow_channel_does_not_hold_another(
    db: Database, store: Store, clock: Clock
) -> None:
    slow_mail = await store.put("slow@example.com", channel="slow")
    await store.put("fast@example.com", channel="fast")
    slow_provider = Gate()
    async with (
        Part(db, clock, slow_provider, channel="slow", concurrency=1) as slow,
        Part(db, clock, channel="fast") as fast,
    ):
        await slow.drain.drain_once()
        await until(lambda: len(slow_provider.held) == 1)
        await fast.work()
        assert fast.outbox == ["fast@example.com"]
        assert await store.state(slow_mail) is State.SENDING
        slow_provider.open()
        await slow.recorded()
    assert await store.state(slow_mail) is State.SENT


async def test_recipients_of_one_message_share_a_call(
    db: Database, store: Store, clock: Clock
) -> None:
    names = [f"r{i}@example.com" for i in range(5)]
    message = await store.put(*names)
    async with Part(db, clock) as part:
        await part.work()
        assert isinstance(part.provider, CaptureProvider)
        [captured] = part.provider.outbox
    assert [a.recipient.address for a in captured.call.addressees] == names
    assert {a.call_id for a in await store.attempts(message)} == {captured.call.call_id}


async def test_a_call_carries_no_more_than_the_provider_takes(
    db: Database, store: Store, clock: Clock
) -> None:
    provider = CaptureProvider()
    provider.group_max = 2
    await store.put(*[f"r{i}@example.com" for i in range(5)])
    async with Part(db, clock, provider) as part:
        await part.work()
        assert sorted(len(c.recipients) for c in provider.outbox) == [1, 2, 2]


async def test_in_a_call_each_recipient_has_a_result_of_its_own(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put("ada@example.com", "permerror@example.test", "temperror@example.test")
    async with Part(db, clock) as part:
        await part.work()
    states = [await store.state(message, n) for n in (1, 2, 3)]
    assert states == [State.SENT, State.FAILED, State.DEFERRED]
    outcomes = [a.result.outcome for a in await store.attempts(message) if a.result]
    assert outcomes == [Outcome.ACCEPTED, Outcome.REJECTED, Outcome.DEFERRED]
    assert len({a.call_id for a in await store.attempts(message)}) == 1


async def test_a_batch_takes_no_more_content_into_memory_than_it_may(
    lossy: LossyDatabase, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = await store.put_many([["a@example.com"]] * 5)
    await lossy.write("INSERT INTO attachments SELECT id, 0, $1 FROM messages", b"x" * 4000)
    monkeypatch.setattr("mailgrpc.worker.call.CONTENT_BYTES", 8000)
    async with Part(lossy, clock, Gate()) as part:
        await part.drain.drain_once()
        assert [await store.state(m) for m in messages] == [State.SENDING] * 2 + [State.QUEUED] * 3
        assert await store.value("SELECT count(*) FROM due WHERE session_id IS NULL") == 3
        assert isinstance(part.provider, Gate)
        part.provider.open()
        await part.work()
        assert len(part.outbox) == 5


async def test_send_once_is_started_only_into_free_slots(
    db: Database, store: Store, clock: Clock
) -> None:
    await store.put_many([["a@example.com"]] * 10, mode=Mode.SEND_ONCE)
    provider = Gate()
    async with Part(db, clock, provider, concurrency=3) as part:
        draining = asyncio.create_task(part.drain.drain_once())
        await until(lambda: len(provider.held) == 3)
        # Until a slot is free no more than these can be in doubt after a crash.
        assert await store.value("SELECT count(*) FROM deliveries WHERE state = 2") == 3
        assert await store.value("SELECT count(*) FROM due WHERE session_id IS NOT NULL") == 10
        provider.open()
        await draining
        await part.recorded()
    assert await store.value("SELECT count(*) FROM deliveries WHERE state = 4") == 10


async def test_claims_that_were_not_started_go_back_at_a_stop(
    db: Database, store: Store, clock: Clock
) -> None:
    await store.put_many([["a@example.com"]] * 10, mode=Mode.SEND_ONCE)
    provider = Gate()
    async with Part(db, clock, provider, concurrency=3) as part:
        running = asyncio.create_task(part.drain.run())
        await until(lambda: len(provider.held) == 3)
        part.drain.stop_claiming()
        await running
        assert await store.value("SELECT count(*) FROM due WHERE session_id IS NULL") == 7
        assert await store.value("SELECT max(claims) FROM due WHERE session_id IS NULL") == 0
        provider.open()
        await part.recorded()
    assert await store.value("SELECT count(*) FROM deliveries WHERE state = 4") == 3


async def test_many_results_are_recorded_in_one_round_trip(
    lossy: LossyDatabase, store: Store, clock: Clock
) -> None:
    await store.put_many([["a@example.com"]] * 60)
    provider = Gate()
    async with Part(lossy, clock, provider, concurrency=60) as part:
        await part.drain.drain_once()
        await until(lambda: len(provider.held) == 60)
        provider.open()
        await part.recorded()
    assert await store.value("SELECT count(*) FROM deliveries WHERE state = 4") == 60
    assert lossy.count("record_outcomes") <= 3


async def test_a_claim_whose_delivery_was_cleared_is_dropped(
    db: Database, store: Store, clock: Clock
) -> None:
    cleared, kept = await store.put_many([["a@example.com"], ["b@example.com"]])
    for table, column in (("messages", "id"), ("deliveries", "message_of(id)")):
        await db.write(f"DELETE FROM {table} WHERE {column} = $1", cleared)
    async with Part(db, clock) as part:
        await part.work()
        assert part.outbox == ["b@example.com"]
    assert await store.due_rows() == 0
    assert await store.state(kept) is State.SENT


async def test_a_session_is_over_although_a_delivery_it_had_claimed_was_cleared(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put()
    session = await open_session(db, "dies", [])
    await claim_due(db, session, "default", 10, 0)
    await db.write("DELETE FROM deliveries WHERE message_of(id) = $1", message)
    await release_claims(db, session, [delivery_id(message, 1)])
    assert await store.value("SELECT session_id FROM due") is None

    await claim_due(db, session, "default", 10, 0)
    await end_session(db, session)
    async with Part(db, clock) as part:
        await part.reaper.reap()
    assert await store.value("SELECT session_id FROM due") is None
    assert await store.value("SELECT reaped_at FROM workers WHERE id = $1", session) is not None
