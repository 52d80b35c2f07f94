"""A channel that fails as a whole: it pauses, is probed by one mail, and costs nobody an attempt."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest

from mailgrpc.core.delivery import Cause, Mode, Outcome, Result, State, WaitReason, resend_step
from mailgrpc.core.message import RetryWishes
from mailgrpc.db.deliveries import Move, move_deliveries
from mailgrpc.db.engine import Database
from mailgrpc.providers.capture import CaptureProvider
from mailgrpc.providers.provider import SendCall
from mailgrpc.worker.breaker import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    Breaker,
)
from tests.worker.rig import ACCEPTED, Clock, Part, Scripted, Store

REFUSED = Result(Outcome.DEFERRED, Cause.CONNECTION, text="connection refused", of_channel=True)
NOT_NOW = Result(Outcome.DEFERRED, Cause.MAILBOX_FULL, 452, text="mailbox full")


class _NoJitter(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return 1.0


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker("default", clock=clock, rng=_NoJitter())


def test_the_pauses_grow_and_end_with_the_first_answer(breaker: Breaker, clock: Clock) -> None:
    pauses = []
    for _ in range(12):
        clock.now += 0.001
        breaker.note(REFUSED, clock.now)
        pauses.append(breaker.wait_s)
        clock.now += breaker.wait_s
        assert breaker.wait_s == 0
        assert not breaker.is_closed  # only a probe may pass
    assert pauses[:4] == [FIRST_PAUSE_S * 2**n for n in range(4)]
    assert pauses[-1] == LONGEST_PAUSE_S
    breaker.note(NOT_NOW, clock.now)
    assert breaker.is_closed
    clock.now += 1
    breaker.note(REFUSED, clock.now)
    assert breaker.wait_s == FIRST_PAUSE_S


def test_one_connection_too_many_does_not_stop_those_that_pass(
    breaker: Breaker, clock: Clock
) -> None:
    for _ in range(100):  # eight at once, of which the server takes five
        for _ in range(3):
            breaker.note(REFUSED, clock.now, others=5)
        assert breaker.is_closed
        assert breaker.pause.total_seconds() == FIRST_PAUSE_S  # those deliveries wait all the same
        breaker.note(ACCEPTED, clock.now, others=4)


def test_where_none_passes_it_opens_after_as_many_as_are_under_way(
    breaker: Breaker, clock: Clock
) -> None:
    for _ in range(7):
        breaker.note(REFUSED, clock.now, others=7)
        assert breaker.is_closed
    breaker.note(REFUSED, clock.now, others=7)
    assert not breaker.is_closed


def test_a_provider_that_says_for_how_long_is_obeyed_at_once(
    breaker: Breaker, clock: Clock
) -> None:
    told = Result(
        Outcome.DEFERRED, Cause.RATE_LIMITED, 429, retry_after=timedelta(seconds=7), of_channel=True
    )
    breaker.note(told, clock.now, others=7)
    assert breaker.wait_s == 7


def test_a_server_that_breaks_down_proves_that_nothing_passes(
    breaker: Breaker, clock: Clock
) -> None:
    breaker.note(REFUSED, clock.now)
    breaker.note(Result(Outcome.UNKNOWN, Cause.PROVIDER, 503), clock.now)
    assert not breaker.is_closed


async def test_a_drain_that_waits_is_woken_when_its_channel_passes_again(
    db: Database, clock: Clock
) -> None:
    async with Part(db, clock) as part:
        part.drain.breaker.note(REFUSED, 0.0)
        part.drain._wake.clear()
        part.drain.breaker.note(ACCEPTED, 0.0)
        assert part.drain._wake.is_set()


class Line(CaptureProvider):
    """A provider that cannot be reached while it is down; knows how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.down = True
        self.asked = 0

    async def send(self, call: SendCall) -> list[Result]:
        self.asked += 1
        if self.down:
            return [REFUSED] * len(call.addressees)
        return await super().send(call)


def _time_passes(part: Part) -> None:
    part.drain.breaker._until = 0.0


@pytest.mark.parametrize("mode", list(Mode))
async def test_deliveries_wait_for_a_channel_without_using_up_attempts(
    db: Database, store: Store, clock: Clock, mode: Mode
) -> None:
    messages = await store.put_many(
        [[f"a{n}@example.com"] for n in range(20)], mode=mode, retry=RetryWishes(max_attempts=1)
    )
    line = Line()
    async with Part(db, clock, line, concurrency=2) as part:
        await part.work()
        asked = line.asked
        assert asked <= 4  # what was on its way when the first came back
        assert await part.drain.drain_once() is not None  # and nothing more is claimed
        for _ in range(5):
            _time_passes(part)
            await store.make_due()
            assert await part.drain.drain_once() is None
            assert part.drain.breaker.wait_s > 0
        await part.recorded()
        assert line.asked == asked + 5  # one probe a pause
        failed = [d for d in [await store.delivery(m) for m in messages] if d.attempt_count]
        assert all(d.spared == d.attempt_count for d in failed)
        assert {(d.state, d.wait_reason) for d in failed} == {
            (State.DEFERRED, WaitReason.CHANNEL_PAUSED)
        }
        line.down = False
        _time_passes(part)
        await store.make_due()
        await part.work()
        assert sorted(part.outbox) == sorted(f"a{n}@example.com" for n in range(20))
    assert {await store.state(m) for m in messages} == {State.SENT}


async def test_an_expiry_ends_the_waiting_for_a_channel(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put(expire_at=datetime.now(UTC) + timedelta(seconds=0.3))
    async with Part(db, clock, Line()) as part:
        await part.work()
        delivery = await store.delivery(message)
        assert delivery.due_at == delivery.expire_at  # not past it
        await db.write("UPDATE deliveries SET expire_at = now() - interval '1 s'")
        _time_passes(part)
        await store.make_due()
        await part.work()
    assert await store.state(message) is State.EXPIRED


async def test_a_forced_attempt_that_the_channel_failed_is_not_used_up(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put()
    rejected = Result(Outcome.REJECTED, Cause.BAD_ADDRESS, 550)
    provider = Scripted(rejected, REFUSED, ACCEPTED)
    async with Part(db, clock, provider) as part:
        await part.work()
        failed = await store.delivery(message)
        step, forced, expire_at = resend_step(failed, datetime.now(UTC))
        await move_deliveries(db, 0, "", [Move(failed, step, forced, expire_at)])
        await part.work()
        delivery = await store.delivery(message)
        assert (delivery.state, delivery.forced) == (State.DEFERRED, True)
        _time_passes(part)
        await store.make_due()
        await part.work()
    assert await store.state(message) is State.SENT


async def test_what_the_lease_ran_out_for_is_tried_again_at_no_cost(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put(retry=RetryWishes(max_attempts=1))
    lost = Result(Outcome.DEFERRED, Cause.WORKER_LOST)
    async with Part(db, clock, Scripted(lost, lost, ACCEPTED)) as part:
        for _ in range(3):
            await part.work()
            await store.make_due()
    delivery = await store.delivery(message)
    assert (delivery.state, delivery.attempt_count, delivery.spared) == (State.SENT, 3, 2)
