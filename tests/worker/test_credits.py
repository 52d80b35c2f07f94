"""Handing over: what a worker does with its credits, whatever becomes of the notices about them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgpack
import pytest

from mailgrpc.core.delivery import Cause, Mode, Outcome, Result, State
from mailgrpc.core.ids import delivery_id
from mailgrpc.db.deliveries import Started
from mailgrpc.db.engine import Database, SessionEnded
from mailgrpc.db.handover import Handed, read_running
from mailgrpc.db.messages import Start
from mailgrpc.db.workers import begin_epoch, end_session
from mailgrpc.doorbell import Doorbell
from mailgrpc.handover import MISSING_S, RETRACT_S, Grant, Handover, Notice
from mailgrpc.worker.credits import REFUSED_S, STRAY_S
from mailgrpc.worker.pace import AHEAD, AHEAD_S
from tests.gateway import until
from tests.worker.rig import Clock, Gate, LossyDatabase, Part, Store, outlive_lease

GRANTS = f"mailgrpc:grants:{uuid.UUID(int=0)}:default"
CLAIMS = "SELECT count(*) FROM due WHERE session_id IS NOT NULL"


@pytest.fixture
async def servers(redis_url: str) -> AsyncIterator[Handover]:
    """The other end."""
    doorbell = Doorbell(redis_url)
    yield Handover(doorbell)
    await doorbell.close()


@pytest.fixture(autouse=True)
async def no_grants(redis_url: str) -> None:
    """Nothing is left of what other tests offered."""
    doorbell = Doorbell(redis_url)
    await doorbell.ask(lambda redis: redis.delete(GRANTS), 2)
    await doorbell.close()


@pytest.fixture
async def part(
    lossy: LossyDatabase, clock: Clock, redis_url: str, store: Store
) -> AsyncIterator[Part]:
    """A worker that has given credit; in the end no place is missing from its journal."""
    async with Part(lossy, clock, redis_url=redis_url) as part:
        part.drain.credits.are_heard = True
        room = part.journal.room
        await given(part)
        yield part
        lossy.away = False
        part.drain.credits.withdraw()
        await part.recorded()
        await part.journal.synced()
        assert part.journal.room == room


async def given(part: Part) -> None:
    """Find nothing due, and give what there is room for."""
    part.drain.credits.note_mail()
    assert await part.drain.drain_once()
    assert part.drain.credits.are_open


async def taken(servers: Handover) -> Grant:
    grant = await servers.take(["default"])
    assert grant is not None
    return grant


async def put(store: Store, grant: Grant, *to: str) -> tuple[list[uuid.UUID], Notice]:
    """Store messages with the credits of a grant; and what its worker is to be told."""
    attempts = grant.attempts[: len(to)]
    start = Start(grant.session_id, grant.epoch, grant.channel, attempts)
    ids = await store.put_many([[a] for a in to], start=start)
    pairs = [(a, delivery_id(m, 1)) for a, m in zip(attempts, ids, strict=True)]
    return ids, Notice(grant.channel, grant.epoch, pairs, ())


async def states(store: Store, ids: Sequence[uuid.UUID]) -> list[State]:
    return [await store.state(m) for m in ids]


async def looked(part: Part) -> None:
    """A look is taken, and what came of it has happened."""
    part.drain.credits.look()
    while tasks := part.drain.credits._tasks:
        await asyncio.wait(set(tasks))


async def missing(part: Part, clock: Clock) -> None:
    """The time in which all must have come back is over, and looks have been taken."""
    clock.now += RETRACT_S + 0.1
    await looked(part)
    clock.now += MISSING_S
    await looked(part)
    await part.drain._guarded_pass()
    await part.recorded()


async def test_a_mail_is_started_by_the_commit_that_takes_it_in(
    part: Part, store: Store, servers: Handover
) -> None:
    ids, notice = await put(store, await taken(servers), "a@example.com", "b@example.com")
    assert await states(store, ids) == [State.SENDING] * 2
    part.drain.credits.note(notice)
    await part.recorded()
    assert sorted(part.outbox) == ["a@example.com", "b@example.com"]
    assert await states(store, ids) == [State.SENT] * 2
    told = await store.db.fetch(
        "SELECT old_state, state, version, attempt_count, wait_reason, due_at IS NULL AS ends"
        " FROM events WHERE message_id = $1 ORDER BY seq",
        ids[0],
    )
    assert [tuple(row) for row in told] == [
        (0, State.QUEUED, 1, 0, 1, False),
        (State.QUEUED, State.SENDING, 2, 1, 0, True),
        (State.SENDING, State.SENT, 3, 1, 0, True),
    ]
    assert await store.due_rows() == 0


async def test_a_notice_is_heard_over_redis(part: Part, store: Store, servers: Handover) -> None:
    grant = await taken(servers)
    ids, notice = await put(store, grant, "a@example.com")
    await servers.tell(grant.session_id, notice)
    told = await servers.hear(grant.session_id)
    assert told == notice
    part.drain.credits.note(told)
    await part.recorded()
    assert await states(store, ids) == [State.SENT]


async def test_a_session_that_has_ended_starts_nothing(
    part: Part, store: Store, servers: Handover
) -> None:
    grant = await taken(servers)
    await end_session(store.db, grant.session_id)
    ids, _ = await put(store, grant, "a@example.com")
    assert store.inserted is not None
    assert store.inserted.unstarted
    assert await states(store, ids) == [State.QUEUED]
    with pytest.raises(SessionEnded):
        await part.drain.drain_once()


async def test_an_epoch_that_is_over_starts_nothing(
    part: Part, store: Store, servers: Handover
) -> None:
    grant = await taken(servers)
    await begin_epoch(store.db, grant.session_id, "default", grant.epoch + 1)
    ids, _ = await put(store, grant, "a@example.com")
    assert store.inserted is not None
    assert store.inserted.unstarted
    assert await states(store, ids) == [State.QUEUED]


async def test_another_channels_epoch_is_of_no_matter(
    part: Part, store: Store, servers: Handover
) -> None:
    grant = await taken(servers)
    await begin_epoch(store.db, grant.session_id, "bulk", 7)
    ids, notice = await put(store, grant, "a@example.com")
    assert await states(store, ids) == [State.SENDING]
    part.drain.credits.note(notice)


async def test_who_is_not_to_be_mailed_is_not_started(
    part: Part, store: Store, servers: Handover
) -> None:
    await store.db.write(
        "INSERT INTO suppressions (project_id, address, reason) VALUES (1, 'a@example.com', 3)"
    )
    ids, notice = await put(store, await taken(servers), "a@example.com", "b@example.com")
    assert store.inserted is not None
    assert store.inserted.with_suppressed == {ids[0]}
    assert await states(store, ids) == [State.SUPPRESSED, State.SENDING]
    part.drain.credits.note(notice)  # of a server that says too much
    await part.recorded()
    assert part.outbox == ["b@example.com"]


async def test_what_is_never_told_is_found_and_sent_once(
    part: Part, store: Store, servers: Handover, clock: Clock
) -> None:
    ids, notice = await put(store, await taken(servers), "a@example.com")
    await missing(part, clock)
    assert part.outbox == ["a@example.com"]
    assert await states(store, ids) == [State.SENT]
    first, second = await store.attempts(ids[0])
    assert first.result is not None
    assert (first.result.outcome, first.result.cause) == (Outcome.DEFERRED, Cause.WORKER_LOST)
    assert second.number == 2
    found = await store.delivery(ids[0])
    assert (found.spared, found.possibly_sent) == (1, False)
    part.drain.credits.note(notice)  # comes after all
    await part.recorded()
    assert part.outbox == ["a@example.com"]


async def test_after_that_its_credits_are_of_no_use(
    part: Part, store: Store, servers: Handover, clock: Clock
) -> None:
    grant = await taken(servers)
    await missing(part, clock)
    ids, _ = await put(store, grant, "a@example.com")
    assert await states(store, ids) == [State.QUEUED]


async def test_what_no_server_took_is_given_again(
    part: Part, servers: Handover, clock: Clock, store: Store
) -> None:
    clock.now += RETRACT_S + 0.1
    await looked(part)
    clock.now += MISSING_S - 0.1
    await looked(part)
    part.session._heard(part.session.session_id, clock.now)
    await part.drain._guarded_pass()  # begins no new epoch
    ids, notice = await put(store, await taken(servers), "a@example.com")
    assert await states(store, ids) == [State.SENDING]
    part.drain.credits.note(notice)
    await part.recorded()


async def test_what_comes_back_unused_is_given_again(part: Part, servers: Handover) -> None:
    grants = await all_taken(servers)
    for grant in grants:
        part.drain.credits.note(Notice("default", 0, (), grant.attempts))
    again = await taken(servers)
    assert len(again.attempts) == 2
    assert set(again.attempts).isdisjoint(a for grant in grants for a in grant.attempts)


async def test_a_credit_that_is_used_twice_sends_both_once(
    part: Part, store: Store, servers: Handover, clock: Clock
) -> None:
    """Redis fell back to an older state, and gave a grant to two servers."""
    grant = await taken(servers)
    first, one = await put(store, grant, "a@example.com")
    second, two = await put(store, grant, "b@example.com")
    part.drain.credits.note(one)
    part.drain.credits.note(two)
    clock.now += REFUSED_S + 0.1
    await looked(part)
    await part.drain._guarded_pass()
    await part.recorded()
    assert sorted(part.outbox) == ["a@example.com", "b@example.com"]
    assert await states(store, first + second) == [State.SENT] * 2


async def test_a_notice_that_comes_twice_sends_once(
    part: Part, store: Store, servers: Handover
) -> None:
    ids, notice = await put(store, await taken(servers), "a@example.com")
    part.drain.credits.note(notice)
    part.drain.credits.note(notice)
    await part.drain._guarded_pass()
    await part.recorded()
    assert part.outbox == ["a@example.com"]
    assert len(await store.attempts(ids[0])) == 1


async def test_what_cannot_be_read_is_taken_back_and_sent(
    part: Part, store: Store, servers: Handover, lossy: LossyDatabase
) -> None:
    ids, notice = await put(store, await taken(servers), "a@example.com")
    lossy.away = True
    part.drain.credits.note(notice)
    await part.drain.credits.settle()
    lossy.away = False
    await part.drain._guarded_pass()
    await part.recorded()
    assert part.outbox == ["a@example.com"]
    assert await states(store, ids) == [State.SENT]


async def test_what_was_started_by_a_credit_of_nobodys_is_found_each_minute(
    part: Part, store: Store, clock: Clock
) -> None:
    grant = Grant(part.session.session_id, 0, "default", (uuid.uuid4(),))  # somebody wrote to Redis
    ids, _ = await put(store, grant, "a@example.com")
    clock.now += STRAY_S + 1
    part.session._heard(part.session.session_id, clock.now)
    await part.drain._guarded_pass()
    assert await states(store, ids) == [State.SENDING]  # a notice could still come
    await store.db.write("UPDATE deliveries SET attempt_started_at = now() - interval '2 minutes'")
    clock.now += STRAY_S + 1
    part.session._heard(part.session.session_id, clock.now)
    await part.drain._guarded_pass()
    await part.recorded()
    assert part.outbox == ["a@example.com"]
    assert await states(store, ids) == [State.SENT]


async def test_a_worker_that_stops_gives_back_what_it_is_not_told(
    part: Part, store: Store, servers: Handover
) -> None:
    ids, _ = await put(store, await taken(servers), "a@example.com")
    part.drain.stop_claiming()
    await part.drain.run()
    await part.recorded()
    assert part.outbox == []
    assert await states(store, ids) == [State.DEFERRED]
    assert await store.value(CLAIMS) == 0


async def test_a_worker_that_is_killed_leaves_it_to_the_reaper(
    db: Database, part: Part, store: Store, servers: Handover, clock: Clock
) -> None:
    ids, _ = await put(store, await taken(servers), "a@example.com")
    async with Part(db, clock) as other:
        await outlive_lease(other.reaper, clock)
        assert await states(store, ids) == [State.DEFERRED]
        assert (await store.delivery(ids[0])).possibly_sent
        await store.make_due()
        await other.session._beat_until_heard()
        await other.work()
        assert other.outbox == ["a@example.com"]


async def test_no_credit_is_given_while_more_is_due_than_is_claimed(
    lossy: LossyDatabase,
    clock: Clock,
    redis_url: str,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mailgrpc.worker.claimer.CLAIM_DELIVERIES", 2)
    async with Part(lossy, clock, redis_url=redis_url) as part:
        part.drain.credits.are_heard = True
        part.drain.credits.note_mail()
        await store.put_many([[f"a{n}@example.com"] for n in range(3)])
        await part.drain.drain_once()
        assert not part.drain.credits.are_open
        await part.drain.drain_once()
        assert part.drain.credits.are_open
        await part.recorded()
        part.drain.credits.withdraw()


async def test_without_mail_no_credit_is_given(
    lossy: LossyDatabase, clock: Clock, redis_url: str
) -> None:
    async with Part(lossy, clock, redis_url=redis_url) as part:
        part.drain.credits.are_heard = True
        assert await part.drain.drain_once()
        assert not part.drain.credits.are_open


async def test_servers_do_not_take_from_the_dead(
    part: Part, servers: Handover, redis_url: str
) -> None:
    grants = 4
    doorbell = Doorbell(redis_url)
    async with asyncio.timeout(5):
        while await doorbell.ask(lambda redis: redis.llen(GRANTS), 2) != grants:
            await asyncio.sleep(0.01)
    await servers.leave(part.session.session_id)
    assert await servers.take(["default"]) is None
    notice = await servers.hear(part.session.session_id)
    assert notice is not None
    assert len(notice.unused) == 2
    await doorbell.close()


async def test_what_others_have_written_to_redis_is_passed_over(
    servers: Handover, redis_url: str
) -> None:
    doorbell = Doorbell(redis_url)
    one = [uuid.uuid4().bytes]
    for rubbish in (
        b"",
        b"\xc1",
        b"\x93\x01\x02\x03",
        b"\x94\x01\x02\x03\x91\x04",
        msgpack.packb((2**63, 0, "default", one)),
        msgpack.packb((7, 2**31, "default", one)),
        msgpack.packb((7, float("inf"), "default", one)),
        msgpack.packb((7, 0, "default", [])),
        msgpack.packb((7, 0, 7, one)),
        msgpack.packb(("default", 2**40, [], one)),
    ):
        await doorbell.ask(lambda redis: redis.rpush(GRANTS, rubbish), 2)  # noqa: B023
        await doorbell.ask(lambda redis: redis.rpush("mailgrpc:notices:9", rubbish), 2)  # noqa: B023
        assert await servers.take(["default"]) is None
        assert await servers.hear(9) is None
    await doorbell.close()


async def test_while_redis_takes_nothing_grants_rest(
    lossy: LossyDatabase, clock: Clock, store: Store
) -> None:
    async with Part(lossy, clock, redis_url="redis://127.0.0.1:1") as part:
        part.drain.credits.are_heard = True
        await given(part)
        await until(lambda: part.drain.credits._rest_until > clock.now)
        await missing(part, clock)
        assert not part.drain.credits.are_open
        await part.drain.drain_once()
        assert not part.drain.credits.are_open


async def test_what_is_told_of_an_epoch_that_is_over_begins_no_new_one(
    part: Part, store: Store, servers: Handover, clock: Clock
) -> None:
    ids, notice = await put(store, await taken(servers), "a@example.com")
    await missing(part, clock)
    part.drain.credits.note(notice)
    await part.drain._guarded_pass()
    await begun(store, 1)
    assert part.outbox == ["a@example.com"]
    assert len(await store.attempts(ids[0])) == 2


async def begun(store: Store, epoch: int) -> None:
    assert await store.value("SELECT (epochs ->> 'default')::int FROM workers") == epoch


async def test_what_is_recorded_while_we_look_is_not_taken_back(
    part: Part, store: Store, servers: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look shows it running, and its result is recorded before the look is judged."""
    gate = part.provider = Gate()
    part.drain._wire._provider = gate
    ids, notice = await put(store, await taken(servers), "a@example.com")
    part.drain.credits.note(notice)
    await part.drain.credits.settle()

    async def slow_look(*args: Any) -> list[Started]:
        found = await read_running(*args)
        gate.open()
        await part.recorded()
        return found

    monkeypatch.setattr("mailgrpc.worker.credits.read_running", slow_look)
    await part.drain.credits.take_back(part.session.session_id)
    [attempt] = await store.attempts(ids[0])
    assert attempt.result is not None
    assert attempt.result.outcome is Outcome.ACCEPTED
    assert await states(store, ids) == [State.SENT]


async def test_no_credit_is_given_for_a_channel_that_pauses(part: Part, servers: Handover) -> None:
    refused = Result(Outcome.DEFERRED, Cause.CONNECTION, text="refused", of_channel=True)
    part.drain.breaker.note(refused, part.drain.breaker.now())
    for grant in await all_taken(servers):
        part.drain.credits.note(Notice("default", 0, (), grant.attempts))
        part.drain.credits.withdraw()
    assert await part.drain.drain_once()
    part.drain.credits.give()
    assert not part.drain.credits.are_open


async def test_no_credit_is_given_while_one_waits_for_a_slot(
    lossy: LossyDatabase, clock: Clock, redis_url: str, store: Store
) -> None:
    gate = Gate()
    async with Part(lossy, clock, gate, redis_url=redis_url, concurrency=1) as part:
        part.drain.credits.are_heard = True
        await store.put_many([["a@example.com"], ["b@example.com"]], mode=Mode.SEND_ONCE)
        draining = asyncio.create_task(part.drain.drain_once())
        await until(lambda: len(gate.held) == 1)
        await until(lambda: not part.drain.credits._gives)
        part.drain.credits.withdraw()
        gate.open()
        await draining
        await part.recorded()


async def all_taken(servers: Handover) -> list[Grant]:
    grants = []
    while (grant := await servers.take(["default"])) is not None:
        grants.append(grant)
    return grants


async def test_notices_that_are_refused_begin_an_epoch_a_second_at_the_most(
    part: Part, servers: Handover, clock: Clock, store: Store
) -> None:
    await all_taken(servers)
    for _ in range(10):
        clock.now += REFUSED_S / 10
        part.drain.credits.note(Notice("default", 7, [(uuid.uuid4(), uuid.uuid4())], ()))
        await looked(part)
        part.session._heard(part.session.session_id, clock.now)
        await part.drain._guarded_pass()
    assert await store.value("SELECT coalesce((epochs ->> 'default')::int, 0) FROM workers") <= 1


async def test_what_may_have_been_sent_is_not_called_unsent(
    part: Part, store: Store, servers: Handover
) -> None:
    """A primary was lost with the last results, which nobody expects any more."""
    ids, notice = await put(store, await taken(servers), "a@example.com")
    before = await store.db.fetch("SELECT * FROM deliveries")
    due = await store.db.fetch("SELECT * FROM due")
    part.drain.credits.note(notice)
    await part.recorded()
    await store.db.write("DELETE FROM attempts")
    await store.db.write("DELETE FROM deliveries")
    await store.db.write("INSERT INTO deliveries VALUES (($1::deliveries).*)", before[0])
    await store.db.write("INSERT INTO due VALUES (($1::due).*)", due[0])
    part.drain._begin_anew()
    await part.drain._guarded_pass()
    [attempt] = await store.attempts(ids[0])
    assert attempt.result is not None
    assert attempt.result.outcome is Outcome.UNKNOWN
    assert (await store.delivery(ids[0])).possibly_sent
    assert part.outbox == ["a@example.com"]


async def test_what_was_claimed_is_not_taken_back(
    lossy: LossyDatabase, clock: Clock, redis_url: str, store: Store
) -> None:
    """However it came to run and not be expected: nothing proves that it was not sent."""
    async with Part(lossy, clock, redis_url=redis_url) as part:
        part.drain.credits.are_heard = True
        await given(part)
        message_id = await store.put("a@example.com", mode=Mode.SEND_ONCE)
        lossy.lose_answer("start_deliveries")
        part.drain.stop_claiming()
        part.drain._stopping = False
        part.provider = gate = Gate()
        part.drain._wire._provider = gate
        draining = asyncio.create_task(part.drain.drain_once())
        await until(lambda: bool(gate.held))
        part.recorder.give_up(part.recorder.expected)
        await part.drain.credits.take_back(part.session.session_id)
        assert await store.state(message_id) is State.SENDING
        gate.open()
        await draining
        await part.recorded()
        part.drain.credits.withdraw()


async def test_credit_goes_by_what_goes_out(part: Part, servers: Handover, clock: Clock) -> None:
    """So that what is urgent does not wait for long behind it."""
    await all_taken(servers)
    part.drain.credits.withdraw()
    for ended, most in ((0, 8), (40, 8 + 40 * AHEAD_S), (100_000, 8 + AHEAD)):
        clock.now += 60.0
        part.drain.credits.note_mail()
        for _ in range(10):  # looks, until the rate is known
            clock.now += 0.2
            part.drain.credits._pace._ended = int(ended / 5)
            part.drain.credits.look()
        opened = len(part.drain.credits._open)
        limit = min(most, part.journal.slots / 2)
        assert limit / 2 < opened <= limit
        part.drain.credits.withdraw()
        await all_taken(servers)


async def test_what_is_told_while_a_worker_is_torn_down_is_not_sent(
    part: Part, store: Store, servers: Handover
) -> None:
    """It was read when nothing is to be sent any more: proof that it did not go out."""
    ids, notice = await put(store, await taken(servers), "a@example.com")
    await part.drain.abandon()
    part.drain.credits.note(notice)
    await part.recorded()
    assert part.outbox == []
    assert await states(store, ids) == [State.DEFERRED]
    assert not (await store.delivery(ids[0])).possibly_sent


async def test_what_is_being_read_when_a_worker_is_torn_down_is_left(
    part: Part, store: Store, servers: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = asyncio.Event()

    async def never(*_: object) -> list[Handed]:
        reading.set()
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr("mailgrpc.worker.credits.read_handed", never)
    ids, notice = await put(store, await taken(servers), "a@example.com")
    part.drain.credits.note(notice)
    await reading.wait()
    async with asyncio.timeout(5):
        await part.drain.abandon()
        await part.drain.settle()
    assert part.outbox == []
    assert await states(store, ids) == [State.SENDING]
    part.journal.unreserve(1)  # which goes with the process
