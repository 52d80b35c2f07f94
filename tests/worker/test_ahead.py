"""What is claimed ahead: it is started next, or put back."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from mailgrpc.core.delivery import Cause, Outcome, Result, State
from mailgrpc.db.engine import Database, SessionEnded
from tests.worker.rig import Clock, Gate, LossyDatabase, Part, Store

CLAIM = 4
CLAIMED = "SELECT count(*) FROM due WHERE session_id IS NOT NULL"
STARTED = "SELECT count(*) FROM deliveries WHERE state = 2"


@pytest.fixture(autouse=True)
def small_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mailgrpc.worker.claimer.CLAIM_DELIVERIES", CLAIM)


async def put(store: Store, count: int) -> None:
    await store.put_many([[f"a{n}@example.com"] for n in range(count)])


async def claimed_ahead(part: Part, store: Store) -> None:
    """Of ten deliveries one claim is started, and the one after it made."""
    await put(store, 10)
    await part.drain.drain_once()
    assert await store.value(STARTED) == CLAIM
    await store.until(f"SELECT ({CLAIMED}) = {2 * CLAIM}")


async def test_the_next_claim_is_made_while_the_last_is_started(
    db: Database, store: Store, clock: Clock
) -> None:
    provider = Gate()
    async with Part(db, clock, provider) as part:
        await claimed_ahead(part, store)
        provider.open()
        await part.work()
        assert Counter(part.outbox) == Counter(f"a{n}@example.com" for n in range(10))
    assert await store.due_rows() == 0


async def test_the_next_claim_is_made_when_half_of_the_last_is_started(
    db: Database, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailgrpc.worker.wire.STARTED_AHEAD", CLAIM // 2 - 1)
    provider = Gate()
    async with Part(db, clock, provider, concurrency=1) as part:
        await put(store, 10)
        draining = asyncio.create_task(part.drain.drain_once())
        await store.until(f"SELECT ({STARTED}) = {CLAIM // 2}")
        await store.until(f"SELECT ({CLAIMED}) = {2 * CLAIM}")
        assert await store.value(STARTED) == CLAIM // 2
        provider.open()
        await draining
        await part.work()
        assert Counter(part.outbox) == Counter(f"a{n}@example.com" for n in range(10))


async def test_a_channel_that_pauses_puts_back_what_was_claimed_ahead(
    db: Database, store: Store, clock: Clock
) -> None:
    async with Part(db, clock, Gate()) as part:
        await claimed_ahead(part, store)
        refused = Result(Outcome.DEFERRED, Cause.CONNECTION, text="refused", of_channel=True)
        part.drain.breaker.note(refused, part.drain.breaker.now())
        assert await part.drain.drain_once()
        assert await store.value(CLAIMED) == CLAIM  # those that are on the wire


async def test_a_worker_that_stops_puts_back_what_it_claimed_ahead(
    db: Database, store: Store, clock: Clock
) -> None:
    provider = Gate()
    async with Part(db, clock, provider) as part:
        await claimed_ahead(part, store)
        part.drain.stop_claiming()
        await part.drain.run()
        assert await store.value(CLAIMED) == CLAIM
        provider.open()
        await part.recorded()
        assert len(part.outbox) == CLAIM


async def test_a_claim_ahead_whose_answer_is_lost_keeps_nothing(
    lossy: LossyDatabase, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(store, 10)
    write = lossy.write

    async def lossy_ahead(sql: str, *args: Any) -> Any:
        if "claim_due" in sql and lossy.count("claim_due") == 1:
            lossy.lose_answer("claim_due")
        return await write(sql, *args)

    monkeypatch.setattr(lossy, "write", lossy_ahead)
    async with Part(lossy, clock) as part:
        draining = asyncio.create_task(part.drain.run())
        await store.until("SELECT count(*) = 10 FROM deliveries WHERE state = 4", part.drain.wake)
        part.drain.stop_claiming()
        await draining
        assert part.drain._claimer.epoch == 1  # all that was claimed and not started was given back
        assert Counter(part.outbox) == Counter(f"a{n}@example.com" for n in range(10))


async def test_what_becomes_due_after_a_claim_ahead_found_nothing_is_claimed_at_once(
    db: Database, store: Store, clock: Clock
) -> None:
    await put(store, CLAIM)
    provider = Gate()
    async with Part(db, clock, provider) as part:
        await part.drain.drain_once()
        await part.drain._claimer._ahead[1]  # it finds nothing
        late = await store.put("late@example.com")
        await part.drain.drain_once()
        assert await store.state(late) is State.SENDING
        provider.open()
        await part.recorded()


async def test_what_a_claim_of_an_ended_session_met_is_not_of_the_next(
    db: Database, store: Store, clock: Clock
) -> None:
    async def ended() -> Any:
        raise SessionEnded

    async with Part(db, clock, Gate()) as part:
        session_id = part.session.session_id
        part.drain._claimer._ahead = (session_id - 1, asyncio.create_task(ended()))
        await part.drain._guarded_pass()
        await part.drain._guarded_pass()
        assert part.session.session_id == session_id
