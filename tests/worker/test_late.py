"""Results that come after somebody took the delivery for lost (DESIGN: results, late or not)."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from mailgrpc.core.delivery import (
    UNENDED,
    Cause,
    Mode,
    Outcome,
    Result,
    State,
    Step,
    late_step,
    next_step,
)
from mailgrpc.core.ids import delivery_id, new_id
from mailgrpc.core.message import RetryWishes
from mailgrpc.core.retry import DEFAULT_POLICY
from mailgrpc.db.deliveries import (
    Recorded,
    Started,
    Starting,
    claim_due,
    record_outcomes,
    start_deliveries,
)
from mailgrpc.db.engine import Database
from mailgrpc.db.workers import open_session
from tests.worker.rig import ACCEPTED, LossyDatabase, Store

REJECTED = Result(Outcome.REJECTED, Cause.BAD_ADDRESS, 550, text="no such mailbox")
DEFERRED = Result(Outcome.DEFERRED, Cause.MAILBOX_FULL, 452, text="mailbox full")
UNKNOWN = Result(Outcome.UNKNOWN, Cause.TIMEOUT, text="no answer")
LOST = Result(Outcome.UNKNOWN, Cause.WORKER_LOST)


async def _start(db: Database, message: uuid.UUID) -> Started:
    session = await open_session(db, "test", [])
    await claim_due(db, session, "default", 10, 0)
    [started] = await start_deliveries(
        db, session, 0, [Starting(delivery_id(message, 1), new_id(), new_id())]
    )
    return started


async def _overtaken(db: Database, store: Store, message: uuid.UUID) -> tuple[Started, Started]:
    """An attempt that was taken for lost, and the one after it, which runs."""
    first = await _start(db, message)
    await _record(db, first, LOST)
    await store.make_due()
    return first, await _start(db, message)


async def _record(db: Database, started: Started, result: Result) -> None:
    now = datetime.now(UTC)
    step = next_step(started.delivery, result, now, DEFAULT_POLICY, _NoJitter())
    await record_outcomes(db, 0, [Recorded.of(started, "capture", now, result, step)])


class _NoJitter:
    def uniform(self, low: float, high: float) -> float:
        return 1.0


async def _put_into(store: Store, state: State) -> None:
    """As Resend, cancel, expiry and so on would leave the one delivery."""
    await store.db.write(
        """UPDATE deliveries SET state = $1, version = version + 1,
               due_at = CASE WHEN $2 THEN now() END""",
        state,
        state in UNENDED,
    )
    await store.db.write("SELECT settle_due(now(), array_agg(d)) FROM deliveries d")


async def _outcome(store: Store, message: uuid.UUID, number: int = 1) -> Outcome:
    attempt = (await store.attempts(message))[number - 1]
    assert attempt.result is not None
    return attempt.result.outcome


async def test_acceptance_told_late_makes_an_unknown_outcome_sent(
    db: Database, store: Store
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    started = await _start(db, message)
    await _record(db, started, LOST)
    assert await store.state(message) is State.OUTCOME_UNKNOWN
    await _record(db, started, ACCEPTED)
    assert await store.state(message) is State.SENT
    assert await _outcome(store, message) is Outcome.ACCEPTED
    [event] = await db.fetch("SELECT * FROM events ORDER BY seq DESC LIMIT 1")
    assert (event["old_state"], event["state"]) == (State.OUTCOME_UNKNOWN, State.SENT)
    assert event["outcome"] == Outcome.ACCEPTED


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(hours=1)])
@pytest.mark.parametrize("proof", [ACCEPTED, REJECTED])
async def test_late_proof_drops_the_pending_retry(
    db: Database, store: Store, proof: Result, ahead: timedelta
) -> None:
    message = await store.put(mode=Mode.RETRYING)
    started = await _start(db, message)
    now = datetime.now(UTC)
    await record_outcomes(
        db, 0, [Recorded.of(started, "", now, LOST, Step(State.DEFERRED, True, now + ahead))]
    )
    assert await store.state(message) is State.DEFERRED
    await _record(db, started, proof)
    expected = State.SENT if proof is ACCEPTED else State.FAILED
    delivery = await store.delivery(message)
    assert delivery.state is expected
    assert delivery.due_at is None
    assert await store.due_rows() == 0
    assert await store.value("SELECT count(*) FROM scheduled") == 0


async def test_what_proves_nothing_moves_nothing_when_late(db: Database, store: Store) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    started = await _start(db, message)
    await _record(db, started, LOST)
    before = await store.delivery(message)
    await _record(db, started, UNKNOWN)
    after = await store.delivery(message)
    assert replace(after, last_result=None) == replace(before, last_result=None)
    assert await _outcome(store, message) is Outcome.UNKNOWN


@pytest.mark.parametrize("proof", [DEFERRED, REJECTED])
async def test_proof_that_it_was_not_sent_ends_the_doubt_and_starts_nothing(
    db: Database, store: Store, proof: Result
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    started = await _start(db, message)
    await _record(db, started, LOST)
    assert (await store.delivery(message)).possibly_sent
    await _record(db, started, proof)
    delivery = await store.delivery(message)
    assert delivery.state is State.FAILED
    assert not delivery.possibly_sent  # so that Resend needs no risk accepted
    assert await store.due_rows() == 0


@pytest.mark.parametrize("result", [ACCEPTED, REJECTED, DEFERRED])
async def test_with_another_attempt_in_doubt_the_mark_stays(
    db: Database, store: Store, result: Result
) -> None:
    message = await store.put(mode=Mode.RETRYING)
    await _record(db, await _start(db, message), UNKNOWN)
    await store.make_due()
    second = await _start(db, message)
    now = datetime.now(UTC)
    used_up = Step(State.OUTCOME_UNKNOWN, True)
    await record_outcomes(db, 0, [Recorded.of(second, "", now, LOST, used_up)])
    before = await store.delivery(message)
    step = late_step(before, result, others_may_have_left=True)
    await _record(db, second, result)
    after = await store.delivery(message)
    assert after.possibly_sent
    assert after.state is (step.state if step else before.state)


@pytest.mark.parametrize("proof", [REJECTED, DEFERRED])
async def test_with_an_earlier_attempt_accepted_the_mark_stays(
    db: Database, store: Store, proof: Result
) -> None:
    """Else it is FAILED as if nothing had been sent, and Resend needs no risk accepted."""
    message = await store.put(mode=Mode.RETRYING, retry=RetryWishes(max_attempts=2))
    first, second = await _overtaken(db, store, message)
    now = datetime.now(UTC)
    used_up = Step(State.OUTCOME_UNKNOWN, True)
    await record_outcomes(db, 0, [Recorded.of(second, "", now, LOST, used_up)])
    await _record(db, first, ACCEPTED)
    await _record(db, second, proof)
    assert (await store.delivery(message)).possibly_sent


async def test_proof_about_an_attempt_whose_start_a_failover_lost_still_counts(
    db: Database, store: Store
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    started = await _start(db, message)
    # The new primary lacks the start: queued, never attempted, in nobody's hands.
    await db.write(
        "UPDATE deliveries SET state = 1, attempt_id = NULL, attempt_count = 0, due_at = now()"
    )
    await db.write("UPDATE due SET session_id = NULL")
    await _record(db, started, ACCEPTED)
    delivery = await store.delivery(message)
    assert (delivery.state, delivery.attempt_count) == (State.SENT, 1)
    assert await store.due_rows() == 0


async def test_with_a_newer_attempt_only_the_older_ones_record_changes(
    db: Database, store: Store
) -> None:
    message = await store.put(mode=Mode.RETRYING)
    first, second = await _overtaken(db, store, message)

    await _record(db, first, ACCEPTED)
    delivery = await store.delivery(message)
    assert delivery.state is State.SENDING
    assert delivery.possibly_sent
    assert await _outcome(store, message, 1) is Outcome.ACCEPTED

    await _record(db, second, REJECTED)
    await _record(db, first, ACCEPTED)  # once more, the newer attempt being over
    delivery = await store.delivery(message)
    assert delivery.state is State.FAILED
    assert delivery.possibly_sent
    assert await _outcome(store, message, 2) is Outcome.REJECTED


@pytest.mark.parametrize(("first", "second"), [(ACCEPTED, REJECTED), (REJECTED, ACCEPTED)])
async def test_proof_after_proof_changes_nothing(
    db: Database, store: Store, first: Result, second: Result
) -> None:
    message = await store.put()
    started = await _start(db, message)
    await _record(db, started, first)
    before = await store.delivery(message)
    await _record(db, started, second)
    assert await store.delivery(message) == before


@pytest.mark.parametrize("result", [ACCEPTED, REJECTED, DEFERRED, UNKNOWN])
@pytest.mark.parametrize("state", sorted(set(State) - {State.SENDING}))
async def test_the_database_moves_what_late_step_says(
    db: Database, store: Store, state: State, result: Result
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    started = await _start(db, message)
    await _record(db, started, LOST)
    await _put_into(store, state)
    before = await store.delivery(message)
    step = late_step(before, result, others_may_have_left=False)

    await _record(db, started, result)
    after = await store.delivery(message)
    assert after.state is (step.state if step else state)
    assert after.version == before.version + (step is not None)
    assert after.possibly_sent == (step.possibly_sent if step else True)
    assert await _outcome(store, message) is result.outcome
    assert await store.due_rows() == (after.state in UNENDED)


@pytest.mark.parametrize("result", [ACCEPTED, REJECTED])
async def test_a_record_whose_answer_was_lost_does_not_undo_a_resend(
    db: Database, store: Store, result: Result
) -> None:
    message = await store.put()
    started = await _start(db, message)
    await _record(db, started, result)
    await _put_into(store, State.QUEUED)  # by Resend, at the caller's risk
    await _record(db, started, result)  # the same once more
    assert await store.state(message) is State.QUEUED
    assert await store.due_rows() == 1


@pytest.mark.parametrize("result", [ACCEPTED, REJECTED, DEFERRED, UNKNOWN])
async def test_a_record_run_twice_leaves_one_attempt_and_one_event(
    lossy: LossyDatabase, store: Store, result: Result
) -> None:
    message = await store.put()
    started = await _start(lossy, message)
    await _record(lossy, started, result)
    before = await store.delivery(message)
    events = await store.value("SELECT count(*) FROM events")
    await _record(lossy, started, result)
    assert await store.delivery(message) == before
    assert await store.value("SELECT count(*) FROM events") == events
    assert len(await store.attempts(message)) == 1


async def test_a_result_for_what_was_cleared_meanwhile_leaves_nothing(
    db: Database, store: Store
) -> None:
    message = await store.put()
    started = await _start(db, message)
    await db.write("DELETE FROM deliveries")
    await db.write("DELETE FROM due")
    await _record(db, started, ACCEPTED)
    assert await store.value("SELECT count(*) FROM attempts") == 0


@pytest.mark.parametrize("result", [DEFERRED, LOST])
@pytest.mark.parametrize("told", ["while the second runs", "after the second"])
async def test_what_an_earlier_attempt_is_known_to_have_delivered_is_not_tried_again(
    db: Database, store: Store, told: str, result: Result
) -> None:
    message = await store.put(mode=Mode.RETRYING)
    first, second = await _overtaken(db, store, message)
    if told == "while the second runs":
        await _record(db, first, ACCEPTED)
        await _record(db, second, result)
    else:
        await _record(db, second, result)
        await _record(db, first, ACCEPTED)
    delivery = await store.delivery(message)
    assert (delivery.state, delivery.attempt_count) == (State.SENT, 2)
    assert delivery.possibly_sent
    assert await store.due_rows() == 0


@pytest.mark.parametrize("told", ["while it runs", "after it", "before it"])
async def test_what_resend_has_forced_is_sent_in_spite_of_what_came_before(
    db: Database, store: Store, told: str
) -> None:
    message = await store.put(mode=Mode.RETRYING, retry=RetryWishes(max_attempts=1))
    first, second = await _overtaken(db, store, message)
    await _record(db, second, LOST)
    await db.write("UPDATE deliveries SET state = 1, forced = true, due_at = now()")
    await store.make_due()
    if told == "before it":
        await _record(db, first, ACCEPTED)
        assert await store.state(message) is State.QUEUED
        return
    forced = await _start(db, message)
    if told == "while it runs":
        await _record(db, first, ACCEPTED)
        await _record(db, forced, LOST)
        assert await store.state(message) is State.OUTCOME_UNKNOWN
    else:
        await _record(db, forced, LOST)
        await _record(db, first, ACCEPTED)  # it is over, and what is known is told
        assert await store.state(message) is State.SENT
