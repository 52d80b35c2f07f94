"""Lost answers, a store that is away, messages that break the code."""

from __future__ import annotations

import asyncio
import logging

import pytest

from mailgrpc.core.delivery import Cause, Mode, Outcome, Result, State
from mailgrpc.core.ids import delivery_id
from mailgrpc.core.message import Priority, RetryWishes
from mailgrpc.db.deliveries import claim_due
from mailgrpc.db.engine import Database
from mailgrpc.db.workers import end_session, open_session, release_unstarted
from mailgrpc.worker.call import GIVEN_UP_AT_CLAIMS
from tests.gateway import PATIENCE_S, until
from tests.worker.rig import Clock, Gate, LossyDatabase, Part, Scripted, Store


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("drain", "record", "sessions"):
        monkeypatch.setattr(f"mailgrpc.worker.{module}._RETRY_S", 0.01)


@pytest.mark.parametrize("mode", list(Mode))
async def test_a_start_whose_answer_was_lost_is_asked_again_and_sent_once(
    lossy: LossyDatabase, store: Store, clock: Clock, mode: Mode
) -> None:
    message = await store.put("a@example.com", "b@example.com", mode=mode)
    lossy.lose_answer("start_deliveries", "start_deliveries")
    async with Part(lossy, clock) as part:
        await part.work()
        assert part.outbox == ["a@example.com", "b@example.com"]
    assert await store.state(message) is State.SENT
    assert (await store.delivery(message)).attempt_count == 1
    assert await store.due_rows() == 0


async def test_a_start_in_doubt_sends_nothing_when_the_session_was_ended_meanwhile(
    db: Database, lossy: LossyDatabase, store: Store, clock: Clock
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    lossy.lose_answer("start_deliveries")
    async with Part(lossy, clock) as part, Part(db, clock) as other:
        running = asyncio.create_task(part.drain.run())
        await until(lambda: lossy.count("start_deliveries") == 1)
        lossy.away = True
        await end_session(db, part.session.session_id)
        await other.reaper.reap()
        assert await store.state(message) is State.OUTCOME_UNKNOWN
        lossy.away = False
        await _settled(part)
        part.drain.stop_claiming()
        await running
        assert part.outbox == []


async def _settled(part: Part) -> None:
    """A new session has been taken and has looked for work."""
    first = part.session.session_id
    await until(lambda: part.session.session_id != first)
    await part.drain.drain_once()


async def test_a_start_in_doubt_at_a_stop_is_left_to_the_reaper(
    db: Database, lossy: LossyDatabase, store: Store, clock: Clock
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    async with Part(lossy, clock) as part:
        lossy.lose_answer("start_deliveries")
        running = asyncio.create_task(part.drain.run())
        await until(lambda: lossy.count("start_deliveries") == 1)
        lossy.away = True
        part.drain.stop_claiming()
        await running
        lossy.away = False
    assert await store.state(message) is State.SENDING
    async with Part(db, clock) as other:
        await other.reaper.reap()
    assert await store.state(message) is State.OUTCOME_UNKNOWN


async def test_a_claim_whose_answer_was_lost_is_given_back_and_claimed_again(
    lossy: LossyDatabase, store: Store, clock: Clock
) -> None:
    await store.put()
    lossy.lose_answer("claim_due")
    async with Part(lossy, clock) as part:
        running = asyncio.create_task(part.drain.run())
        await until(lambda: len(part.outbox) == 1)
        part.drain.stop_claiming()
        await running


async def test_a_batch_that_failed_between_claim_and_start_is_given_back(
    lossy: LossyDatabase, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.put_many([["a@example.com"]] * 3)
    async with Part(lossy, clock) as part:
        with monkeypatch.context() as broken:
            broken.setattr("mailgrpc.worker.claimer.group_claims", _raise)
            await part.drain._guarded_pass()
        assert await store.value("SELECT count(session_id) FROM due") == 3
        await part.drain._guarded_pass()
        await part.recorded()
        assert len(part.outbox) == 3


async def _raise(*_: object) -> None:
    raise RuntimeError("a fault of ours")


async def test_a_record_whose_answer_was_lost_is_repeated_and_changes_nothing_twice(
    lossy: LossyDatabase, store: Store, clock: Clock
) -> None:
    message = await store.put()
    lossy.lose_answer("record_outcomes")
    async with Part(lossy, clock) as part:
        await part.work()
    delivery = await store.delivery(message)
    assert delivery.state is State.SENT
    assert delivery.version == 3
    assert lossy.count("record_outcomes") == 2


async def test_results_wait_out_an_outage_and_it_is_told_once(
    lossy: LossyDatabase, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    provider = Gate()
    async with Part(lossy, clock, provider) as part:
        running = asyncio.create_task(part.drain.run())
        await until(lambda: len(provider.held) == 1)
        lossy.away = True
        provider.open()
        part.drain.wake()
        await until(lambda: len(part.recorder) == 1)
        for _ in range(20):  # many rounds of every loop
            await asyncio.sleep(0.01)
            part.drain.wake()
        lossy.away = False
        await part.recorder.drain()
        part.drain.stop_claiming()
        await running
    assert await store.state(message) is State.SENT
    told = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert 1 <= len(told) <= 2  # a pass that was under way may have said that it is over


async def test_no_more_is_started_while_too_much_is_unrecorded(
    lossy: LossyDatabase, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailgrpc.worker.wire.MAX_UNRECORDED", 1)
    monkeypatch.setattr("mailgrpc.worker.drain._RETRY_S", 3600.0)  # what was recorded is told
    await store.put_many([["a@example.com"]] * 20, mode=Mode.SEND_ONCE)
    provider = Gate()
    async with Part(lossy, clock, provider, concurrency=2) as part:
        draining = asyncio.create_task(part.drain.drain_once())
        await until(lambda: len(provider.held) == 2)
        lossy.away = True
        provider.open()
        await until(lambda: len(part.recorder) == 2)
        assert len(provider.held) == 2
        lossy.away = False
        async with asyncio.timeout(PATIENCE_S):
            await draining
            await part.recorded()
        assert len(part.outbox) == 20


async def test_a_flush_that_would_be_full_does_not_wait_for_more(
    db: Database, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the recording is slower than the wire, and starts wait for it."""
    monkeypatch.setattr("mailgrpc.worker.record.FLUSH_RESULTS", 2)
    monkeypatch.setattr("mailgrpc.worker.record._REST", 10**9)
    monkeypatch.setattr("mailgrpc.worker.record._LONGEST_REST_S", 3600.0)
    messages = await store.put_many([[f"a{n}@example.com"] for n in range(6)])
    provider = Gate()
    async with Part(db, clock, provider) as part:
        await part.drain.drain_once()
        await until(lambda: len(provider.held) == 6)
        provider.open()
        async with asyncio.timeout(PATIENCE_S):
            await part.recorded()
    assert {await store.state(message) for message in messages} == {State.SENT}


async def test_content_that_cannot_be_unpacked_fails_alone_and_unsent(
    db: Database, store: Store, clock: Clock
) -> None:
    good, bad, good_too = await store.put_many([["a@b.com"], ["bad@b.com"], ["c@d.com"]])
    await db.write("UPDATE messages SET content = '\\xff00' WHERE id = $1", bad)
    async with Part(db, clock) as part:
        await part.work()
        assert sorted(part.outbox) == ["a@b.com", "c@d.com"]
    assert await store.state(good) is await store.state(good_too) is State.SENT
    delivery = await store.delivery(bad)
    assert delivery.state is State.FAILED  # nothing was sent, and that is known
    assert not delivery.possibly_sent
    assert delivery.last_result is not None
    assert delivery.last_result.cause is Cause.INTERNAL


@pytest.mark.parametrize("error", [ValueError("a bug\x00"), asyncio.CancelledError()])
async def test_a_provider_that_raises_leaves_its_own_call_in_doubt_and_no_other(
    db: Database, store: Store, clock: Clock, error: BaseException
) -> None:
    messages = await store.put_many([["a@b.com"], ["c@d.com"]], retry=RetryWishes(max_attempts=1))
    provider = Scripted(error, Result(Outcome.ACCEPTED))
    async with Part(db, clock, provider, concurrency=1) as part:
        await part.work()
    by_message = {call.message_id: n for n, call in enumerate(provider.calls)}
    broken, fine = sorted(messages, key=lambda m: by_message[m])
    delivery = await store.delivery(broken)
    assert delivery.state is State.OUTCOME_UNKNOWN  # who knows how far it came
    assert delivery.last_result is not None
    assert delivery.last_result.cause is Cause.INTERNAL
    assert await store.state(fine) is State.SENT


async def test_a_result_with_words_that_the_store_refuses_is_recorded_without_them(
    db: Database, store: Store, clock: Clock
) -> None:
    first, second = await store.put_many([["a@b.com"], ["c@d.com"]])
    bad = Result(Outcome.ACCEPTED, text="\x00", provider_message_id="x")
    provider = Scripted(bad, Result(Outcome.ACCEPTED, text="ok"))
    async with Part(db, clock, provider, concurrency=2) as part:
        await part.work()
    assert await store.state(first) is await store.state(second) is State.SENT


def _refuse(*_: object) -> None:
    raise RuntimeError("a fault of ours")


async def test_what_was_started_has_a_result_when_its_policy_cannot_be_read(
    db: Database, store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RetryWishes, "policy", _refuse)
    message = await store.put()
    async with Part(db, clock, Scripted(Result(Outcome.DEFERRED, Cause.MAILBOX_FULL))) as part:
        await part.work()
    delivery = await store.delivery(message)
    assert delivery.state is State.DEFERRED  # what is known stays known
    assert delivery.last_result is not None
    assert delivery.last_result.cause is Cause.MAILBOX_FULL


@pytest.mark.parametrize("mode", list(Mode))
async def test_what_was_started_is_in_doubt_when_nobody_knows_what_its_result_means(
    db: Database, store: Store, clock: Clock, mode: Mode
) -> None:
    message = await store.put("a@b.com", "c@d.com", mode=mode)
    odd = Result(Outcome.DEFERRED, retry_after="soon")  # type: ignore[arg-type]
    async with Part(db, clock, Scripted(*[odd] * 2)) as part:
        await part.work()
    for number in (1, 2):
        delivery = await store.delivery(message, number)
        assert delivery.possibly_sent
        assert delivery.last_result is not None
        assert delivery.last_result.outcome is Outcome.UNKNOWN
        assert delivery.last_result.cause is Cause.INTERNAL
        retrying = mode is Mode.RETRYING
        assert delivery.state is (State.DEFERRED if retrying else State.OUTCOME_UNKNOWN)


_GUARD = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION 'refused' USING ERRCODE = '23514'; END $$"""


async def test_a_result_that_the_store_goes_on_refusing_is_kept_until_it_is_taken(
    db: Database, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    refused, fine = await store.put_many([["a@b.com"], ["c@d.com"]])
    await db.write(_GUARD)
    await db.write(
        "CREATE TRIGGER refuse BEFORE INSERT ON attempts FOR EACH ROW"
        f" WHEN (message_of(NEW.delivery_id) = '{refused}') EXECUTE FUNCTION refuse()"
    )
    try:
        async with Part(db, clock) as part:
            await part.work()  # it waits for no result that is refused
            assert await store.state(fine) is State.SENT
            assert await store.state(refused) is State.SENDING
            assert len(part.recorder) == 1
            await until(lambda: "results are refused and kept" in caplog.text)
            await db.write("DROP TRIGGER refuse ON attempts")
            await until(lambda: len(part.recorder) == 0)
        assert await store.state(refused) is State.SENT
        assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) < 10
    finally:
        await db.write("DROP TRIGGER IF EXISTS refuse ON attempts")
        await db.write("DROP FUNCTION refuse")


async def test_a_result_that_is_still_refused_at_the_end_is_told_and_left_to_the_reaper(
    db: Database, store: Store, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    await db.write(_GUARD)
    await db.write(
        "CREATE TRIGGER refuse BEFORE INSERT ON attempts FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    try:
        async with Part(db, clock) as part:
            await part.work()
        assert "1 results are not recorded" in caplog.text
    finally:
        await db.write("DROP TRIGGER refuse ON attempts")
        await db.write("DROP FUNCTION refuse")
    async with Part(db, clock) as other:
        await other.reaper.reap()
    assert await store.state(message) is State.OUTCOME_UNKNOWN


async def _workers_died_with_it(db: Database, times: int) -> None:
    for _ in range(times):
        session = await open_session(db, "dies", [])
        await claim_due(db, session, "default", 200, 0)
        await end_session(db, session)
        await release_unstarted(db, session, lost=True)


async def test_what_workers_died_with_twice_is_claimed_alone(
    lossy: LossyDatabase, store: Store, clock: Clock
) -> None:
    await store.put("suspect@example.com")
    await _workers_died_with_it(lossy, 2)
    await store.put_many([[f"a{i}@example.com"] for i in range(3)])
    async with Part(lossy, clock, Gate()) as part:
        await part.drain.drain_once()
        assert isinstance(part.provider, Gate)
        held = part.provider.held
        await until(lambda: len(held) == 1)
        assert held[0].addressees[0].recipient.address == "suspect@example.com"
        # The others are not in its company: nobody holds them, and no claim is on their account.
        rows = await lossy.fetch("SELECT session_id, claims FROM due ORDER BY delivery_id")
        assert [tuple(r) for r in rows[1:]] == [(None, 0)] * 3
        part.provider.open()
        await part.work()
        assert len(part.outbox) == 4


async def test_what_worker_after_worker_died_with_is_given_up(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put(mode=Mode.RETRYING)
    await _workers_died_with_it(db, GIVEN_UP_AT_CLAIMS - 1)
    other = await store.put("b@example.com")
    async with Part(db, clock) as part:
        await part.work()
        assert part.outbox == ["b@example.com"]
    delivery = await store.delivery(message)
    assert delivery.state is State.FAILED
    assert delivery.last_result is not None
    assert delivery.last_result.cause is Cause.WORKER_LOST
    assert await store.state(other) is State.SENT


async def test_a_suspect_is_claimed_though_mail_of_higher_priority_keeps_coming(
    db: Database, store: Store, clock: Clock
) -> None:
    low = await store.put("low@example.com", priority=Priority.NORMAL)
    peer = await store.put("peer@example.com", priority=Priority.NORMAL)
    await db.write("UPDATE due SET claims = 2 WHERE delivery_id = $1", delivery_id(low, 1))
    async with Part(db, clock) as part:
        for n in range(3):
            await store.put(f"high{n}@example.com", priority=Priority.HIGH)
            await part.drain.drain_once()
        await part.recorded()
        assert await store.state(peer) is State.SENT
        assert await store.state(low) is State.SENT
        assert part.outbox.index("low@example.com") == 2  # alone, by the second claim


async def test_a_result_that_is_none_leaves_nothing_in_sending(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put()
    async with Part(db, clock, Gate(lambda call: [None])) as part:  # type: ignore[list-item]
        part.provider.open()  # type: ignore[attr-defined]
        await part.drain.drain_once()
        await part.recorded()
        assert await store.state(message) is not State.SENDING
