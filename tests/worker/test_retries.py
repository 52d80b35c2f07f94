"""When a delivery is tried again, and how that ends."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from mailgrpc.core.delivery import Cause, Mode, Outcome, Result, State, Step, WaitReason
from mailgrpc.core.message import RetryWishes
from mailgrpc.db.deliveries import Move, move_deliveries
from mailgrpc.db.engine import Database
from tests.worker.rig import Clock, Part, Scripted, Store

REFUSED = Result(Outcome.DEFERRED, Cause.MAILBOX_FULL, 452, text="mailbox full")
UNKNOWN = Result(Outcome.UNKNOWN, Cause.TIMEOUT, text="no answer")


async def test_what_is_refused_for_now_is_sent_on_the_second_attempt(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put("temperror+1@example.test")
    async with Part(db, clock) as part:
        await part.work()
        delivery = await store.delivery(message)
        assert delivery.state is State.DEFERRED
        assert delivery.wait_reason is WaitReason.BACKOFF
        assert not delivery.possibly_sent
        await part.work()
        assert (await store.delivery(message)).attempt_count == 1  # not due yet

        await store.make_due()
        await part.work()
    assert await store.state(message) is State.SENT
    outcomes = [a.result.outcome for a in await store.attempts(message) if a.result]
    assert outcomes == [Outcome.DEFERRED, Outcome.ACCEPTED]


@pytest.mark.parametrize(
    ("results", "ends"),
    [([REFUSED, REFUSED], State.FAILED), ([UNKNOWN, REFUSED], State.OUTCOME_UNKNOWN)],
)
async def test_attempts_used_up_end_by_whether_one_may_have_been_sent(
    db: Database, store: Store, clock: Clock, results: list[Result], ends: State
) -> None:
    message = await store.put(retry=RetryWishes(max_attempts=2))
    async with Part(db, clock, Scripted(*results)) as part:
        await part.work()
        assert await store.state(message) is State.DEFERRED
        await store.make_due()
        await part.work()
    delivery = await store.delivery(message)
    assert delivery.state is ends
    assert delivery.possibly_sent is (ends is State.OUTCOME_UNKNOWN)
    assert await store.due_rows() == 0


@pytest.mark.parametrize("minutes", [5, 120])
async def test_a_retry_after_is_honoured(
    db: Database, store: Store, clock: Clock, minutes: int
) -> None:
    wait = timedelta(minutes=minutes)
    told = Result(Outcome.DEFERRED, Cause.RATE_LIMITED, 429, retry_after=wait)
    message = await store.put()
    async with Part(db, clock, Scripted(told)) as part:
        await part.work()
    delivery = await store.delivery(message)
    assert delivery.wait_reason is WaitReason.RATE_LIMITED
    assert delivery.due_at is not None
    assert abs(delivery.due_at - datetime.now(UTC) - wait) < timedelta(seconds=5)
    assert await store.due_rows() == (1 if minutes < 10 else 0)
    assert await store.value("SELECT count(*) FROM scheduled") == (0 if minutes < 10 else 1)


async def test_a_wait_ends_at_the_expiry_and_the_start_finds_it(
    db: Database, store: Store, clock: Clock
) -> None:
    expire_at = datetime.now(UTC) + timedelta(seconds=3)
    message = await store.put("temperror+9@example.test", expire_at=expire_at)
    async with Part(db, clock) as part:
        await part.work()
        assert (await store.delivery(message)).due_at == expire_at
        await db.write("UPDATE deliveries SET expire_at = now()")
        await store.make_due()
        await part.work()
    delivery = await store.delivery(message)
    assert delivery.state is State.EXPIRED
    assert delivery.attempt_count == 1
    assert await store.due_rows() == 0


@pytest.mark.parametrize(
    ("to", "ends"),
    [("temperror+9@example.test", State.FAILED), ("timeout@example.test", State.OUTCOME_UNKNOWN)],
)
async def test_a_forced_attempt_is_the_only_one(
    db: Database, store: Store, clock: Clock, to: str, ends: State
) -> None:
    message = await store.put(to)
    await db.write("UPDATE deliveries SET state = 8")
    delivery = await store.delivery(message)
    step = Step(State.QUEUED, False, datetime.now(UTC), WaitReason.DUE)
    await move_deliveries(db, 0, "test", [Move(delivery, step, forced=True)])
    async with Part(db, clock) as part:
        await part.work()
    after = await store.delivery(message)
    assert after.state is ends
    assert not after.forced


async def test_send_once_without_an_answer_is_outcome_unknown_and_never_tried_again(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put("timeout@example.test", mode=Mode.SEND_ONCE)
    async with Part(db, clock) as part:
        await part.work()
        delivery = await store.delivery(message)
        assert delivery.state is State.OUTCOME_UNKNOWN
        assert delivery.possibly_sent
        await store.make_due()
        await part.work()
        assert part.outbox == ["timeout@example.test"]


async def test_send_once_refused_with_proof_is_tried_again(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put("temperror+1@example.test", mode=Mode.SEND_ONCE)
    async with Part(db, clock) as part:
        await part.work()
        assert await store.state(message) is State.DEFERRED
        await store.make_due()
        await part.work()
    assert await store.state(message) is State.SENT


async def test_retrying_without_an_answer_is_tried_again_and_says_possibly_sent(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put("drop@example.test", mode=Mode.RETRYING)
    async with Part(db, clock) as part:
        await part.work()
        delivery = await store.delivery(message)
        assert delivery.state is State.DEFERRED
        assert delivery.possibly_sent
        await store.make_due()
        await part.work()
        assert part.outbox == ["drop@example.test"] * 2
