"""Who holds which leases, and what becomes of them when a worker is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mailgrpc.core.delivery import Cause, Mode, Outcome, State
from mailgrpc.db.deliveries import claim_due
from mailgrpc.db.engine import Database, SessionEnded
from mailgrpc.db.workers import beat, end_session, open_session, read_sessions
from mailgrpc.worker.sweep import Reaper
from tests.gateway import until
from tests.worker.rig import (
    ACCEPTED,
    LEASE_S,
    Clock,
    Gate,
    LossyDatabase,
    Part,
    Store,
    outlive_lease,
)


async def _start_and_hang(part: Part) -> None:
    provider = part.provider
    assert isinstance(provider, Gate)
    await part.drain.drain_once()
    await until(lambda: len(provider.held) == 1)


async def test_send_once_is_outcome_unknown_when_the_worker_dies_after_the_start(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    async with Part(db, clock, Gate()) as dead, Part(db, clock) as other:
        await _start_and_hang(dead)
        await _outlive_all_but(other, clock)

        delivery = await store.delivery(message)
        assert delivery.state is State.OUTCOME_UNKNOWN and delivery.possibly_sent
        [attempt] = await store.attempts(message)
        assert attempt.result is not None
        assert attempt.result.outcome is Outcome.UNKNOWN
        assert attempt.result.cause is Cause.WORKER_LOST
        await other.work()
        assert other.outbox == []


async def test_retrying_is_deferred_and_possibly_sent_when_the_worker_dies_after_the_start(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put(mode=Mode.RETRYING)
    async with Part(db, clock, Gate()) as dead, Part(db, clock) as other:
        await _start_and_hang(dead)
        await _outlive_all_but(other, clock)
        delivery = await store.delivery(message)
        assert delivery.state is State.DEFERRED and delivery.possibly_sent

        await store.make_due()
        await other.work()
        assert await store.state(message) is State.SENT
        assert (await store.delivery(message)).attempt_count == 2


async def test_a_claim_without_start_goes_back_when_the_worker_dies(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put()
    async with Part(db, clock) as dead, Part(db, clock) as other:
        await claim_due(db, dead.session.session_id, "default", 10, 0)
        await other.work()
        assert other.outbox == []  # it is leased

        await _outlive_all_but(other, clock)
        assert await store.state(message) is State.QUEUED
        assert (await store.delivery(message)).version == 1
        assert await store.value("SELECT claims FROM due") == 1
        await other.work()
        assert await store.state(message) is State.SENT


async def _outlive_all_but(alive: Part, clock: Clock) -> None:
    """A lease passes in which only `alive` beats."""
    await alive.reaper.reap()
    for _ in range(6):
        clock.now += LEASE_S / 6
        await alive.session._beat_until_heard()
        await alive.reaper.reap()


async def test_a_beat_seen_starts_the_lease_anew(db: Database, clock: Clock) -> None:
    async with Part(db, clock) as part:
        session_id = await open_session(db, "quiet", [])
        await part.reaper.reap()
        for _ in range(20):
            clock.now += LEASE_S / 3
            await beat(db, session_id)
            await beat(db, part.session.session_id)
            await part.reaper.reap()
        assert await beat(db, session_id)
        await outlive_lease(part.reaper, clock)
        assert not await beat(db, session_id)


async def test_the_reaper_compares_no_wall_clocks(db: Database, clock: Clock) -> None:
    async with Part(db, clock) as part:
        session_id = await open_session(db, "of a machine whose clock is wrong", [])
        await db.write("UPDATE workers SET beat_at = beat_at - interval '1 day'")
        for _ in range(10):
            await part.reaper.reap()
        assert await beat(db, session_id)


async def test_the_reaper_ends_nobody_for_the_time_postgres_was_away(
    db: Database, clock: Clock
) -> None:
    async with Part(db, clock) as part:
        session_id = await open_session(db, "could not beat either", [])
        await part.reaper.reap()
        clock.now += LEASE_S / 2
        await part.reaper.reap()
        part.reaper.forget()  # what the sweeper does when it meets StoreUnavailable
        clock.now += LEASE_S * 0.6
        await part.reaper.reap()
        assert await beat(db, session_id)


async def test_a_reaper_that_slept_watches_anew(db: Database, clock: Clock) -> None:
    async with Part(db, clock) as part:
        session_id = await open_session(db, "quiet", [])
        await part.reaper.reap()
        clock.now += LEASE_S * 100  # nobody looked: PostgreSQL may have been away all the time
        await part.reaper.reap()
        assert await beat(db, session_id)


async def test_an_ended_session_claims_and_starts_nothing_and_a_new_one_is_taken(
    db: Database, store: Store, clock: Clock
) -> None:
    async with Part(db, clock) as part:
        ended = part.session.session_id
        await end_session(db, ended)
        message = await store.put()
        with pytest.raises(SessionEnded):
            await part.drain.drain_once()
        assert await store.state(message) is State.QUEUED

        running = asyncio.create_task(part.drain.run())
        await until(lambda: part.outbox == ["ada@example.com"])
        assert part.session.session_id != ended
        part.drain.stop_claiming()
        await running


async def test_loops_that_learn_of_the_end_together_open_one_session(
    db: Database, clock: Clock
) -> None:
    async with Part(db, clock) as part:
        ended = part.session.session_id
        await end_session(db, ended)
        await asyncio.gather(*(part.session.renew(ended) for _ in range(5)))
        alive = [s for s in await read_sessions(db) if s.ended_at is None]
        assert [s.session_id for s in alive] == [part.session.session_id]


async def test_the_last_look_forbids_what_a_lost_session_started(
    db: Database, store: Store, clock: Clock
) -> None:
    async with Part(db, clock) as part:
        first = part.session.session_id
        assert part.session.may_send(first)
        clock.now += LEASE_S
        assert not part.session.may_send(first)
        await end_session(db, first)
        await part.session.renew(first)
        assert part.session.may_send(part.session.session_id)
        assert not part.session.may_send(first)  # a reaper may have given it to somebody else


async def test_a_session_that_ends_in_peace_leaves_nothing_and_counts_nothing(
    db: Database, store: Store, clock: Clock
) -> None:
    await store.put()
    async with Part(db, clock) as part:
        await claim_due(db, part.session.session_id, "default", 10, 0)
    assert await store.value("SELECT session_id FROM due") is None
    assert await store.value("SELECT claims FROM due") == 0
    assert await read_sessions(db) == []


async def test_a_session_that_ends_with_something_on_the_wire_is_left_to_a_reaper(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    async with Part(db, clock, Gate()) as part:
        await _start_and_hang(part)
    assert await store.state(message) is State.SENDING
    assert len(await read_sessions(db)) == 1

    async with Part(db, clock) as other:
        await other.reaper.reap()
    assert await store.state(message) is State.OUTCOME_UNKNOWN
    assert await read_sessions(db) == []


async def test_one_message_does_not_keep_the_reaper_from_all_others(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put(mode=Mode.RETRYING)
    async with Part(db, clock, Gate()) as part:
        await _start_and_hang(part)
    await db.write("""UPDATE messages SET content = '\\x00', options = '{"retry": {"x": 1}}'""")
    async with Part(db, clock) as other:
        await other.reaper.reap()
    assert await store.state(message) is State.DEFERRED


@pytest.mark.parametrize("mode", list(Mode))
async def test_what_was_on_the_wire_when_the_session_ended_is_still_recorded(
    db: Database, store: Store, clock: Clock, mode: Mode
) -> None:
    message = await store.put(mode=mode)
    provider = Gate(lambda call: [ACCEPTED] * len(call.addressees))
    async with Part(db, clock, provider) as paused, Part(db, clock) as other:
        await _start_and_hang(paused)
        await _outlive_all_but(other, clock)
        await paused.session.renew(paused.session.session_id)
        provider.open()
        await paused.recorded()
        assert await store.state(message) is State.SENT
        await store.make_due()
        await other.work()
        assert other.outbox == []  # the retry is gone


async def test_what_had_not_begun_to_leave_when_the_session_ended_is_not_sent(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    provider = Gate()
    async with Part(db, clock, provider) as paused, Part(db, clock) as other:
        await _start_and_hang(paused)
        await _outlive_all_but(other, clock)
        await paused.session.renew(paused.session.session_id)
        provider.open()
        await paused.recorded()
        assert paused.outbox == []
    # The reaper could not know; this worker does, and tells it: late proof that nothing was sent.
    assert await store.state(message) is State.FAILED
    [attempt] = await store.attempts(message)
    assert attempt.result is not None
    assert attempt.result.outcome is Outcome.DEFERRED


async def test_a_reaper_that_looks_in_the_midst_of_a_stop_counts_no_death(
    lossy: LossyDatabase, db: Database, store: Store, clock: Clock
) -> None:
    await store.put()
    async with Part(lossy, clock) as part:
        await claim_due(lossy, part.session.session_id, "default", 10, 0)
        real = lossy.write

        async def looked_at(sql: str, *args: Any) -> Any:
            rows = await real(sql, *args)
            await Reaper(db, lane=0, clock=clock).reap()
            return rows

        lossy.write = looked_at  # type: ignore[method-assign]
    assert await store.value("SELECT claims FROM due") == 0
