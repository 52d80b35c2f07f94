"""A channel that fails as a whole: it pauses, is probed by one mail, and costs nobody an attempt."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from mailgrpc.core.delivery import Cause, Mode, Outcome, Result, State, WaitReason, resend_step
from mailgrpc.core.message import RetryWishes
from mailgrpc.db.deliveries import Move, move_deliveries
from mailgrpc.db.engine import Database
from mailgrpc.providers.capture import CaptureProvider
from mailgrpc.providers.provider import SendCall
from mailgrpc.worker.breaker import FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker
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
    asked_at = clock.now
    clock.now += 1
    breaker.note(ACCEPTED, asked_at)
    breaker.note(REFUSED, asked_at)
    assert breaker.is_closed
    assert breaker.pause.total_seconds() == FIRST_PAUSE_S  # that delivery waits all the same
    breaker.note(REFUSED, clock.now + 1)
    assert not breaker.is_closed


def test_what_fails_while_it_pauses_makes_it_no_longer_unless_it_asks_for_that(
    breaker: Breaker, clock: Clock
) -> None:
    for _ in range(70):
        breaker.note(REFUSED, clock.now)
    assert breaker.wait_s == FIRST_PAUSE_S
    breaker.note(replace(REFUSED, retry_after=timedelta(seconds=90)), clock.now)
    assert breaker.wait_s == 90
    breaker.note(replace(REFUSED, retry_after=timedelta(days=30)), clock.now)
    assert breaker.wait_s == LONGEST_PAUSE_S  # the delivery itself waits as long as asked


@pytest.mark.parametrize(
    "result",
    [
        Result(Outcome.UNKNOWN, Cause.TIMEOUT),
        Result(Outcome.REJECTED, Cause.INTERNAL),
        Result(Outcome.DEFERRED, Cause.WORKER_LOST),
    ],
)
def test_what_no_server_has_said_proves_nothing(
    breaker: Breaker, clock: Clock, result: Result
) -> None:
    breaker.note(result, clock.now)
    assert breaker.is_closed
    breaker.note(REFUSED, clock.now)
    breaker.note(result, clock.now)
    assert not breaker.is_closed


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
        assert asked <= 3  # what was on its way when the first came back
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
