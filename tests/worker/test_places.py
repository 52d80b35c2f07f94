"""Handing over: what a worker does with its places, whatever becomes of the words about them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence

import pytest

from mailgrpc.core.delivery import Cause, Outcome, State
from mailgrpc.core.ids import delivery_id
from mailgrpc.db.engine import Database, SessionEnded
from mailgrpc.db.messages import Start
from mailgrpc.db.workers import begin_epoch, end_session
from mailgrpc.doorbell import Doorbell
from mailgrpc.handover import MISSING_S, NO_INSTALLATION, RETRACT_S, Handover, Lot, Word
from mailgrpc.worker.places import LOT, STRAY_S
from tests.gateway import until
from tests.worker.rig import LEASE_S, Clock, LossyDatabase, Part, Store, outlive_lease

LOTS = f"mailgrpc:lots:{NO_INSTALLATION}:default"
CLAIMS = "SELECT count(*) FROM due WHERE session_id IS NOT NULL"


@pytest.fixture
async def servers(redis_url: str) -> AsyncIterator[Handover]:
    """The other end."""
    doorbell = Doorbell(redis_url)
    yield Handover(doorbell)
    await doorbell.close()


@pytest.fixture(autouse=True)
async def no_lots(redis_url: str) -> None:
    """Nothing is left of what other tests offered."""
    doorbell = Doorbell(redis_url)
    await doorbell.ask(lambda redis: redis.delete(LOTS), 2)
    await doorbell.close()


@pytest.fixture
async def part(
    lossy: LossyDatabase, clock: Clock, redis_url: str, store: Store
) -> AsyncIterator[Part]:
    """A worker that has offered places; in the end none of them is missing from its journal."""
    async with Part(lossy, clock, redis_url=redis_url) as part:
        part.drain.places.are_heard = True
        room = part.journal.room
        await offer(part)
        yield part
        lossy.away = False
        part.drain.places.withdraw()
        await part.recorded()
        await part.journal.synced()
        assert part.journal.room == room


async def offer(part: Part) -> None:
    """Find nothing due, and offer what there is room for."""
    part.drain.places.note_mail()
    assert await part.drain.drain_once()
    assert part.drain.places.is_open


async def taken(servers: Handover) -> Lot:
    lot = await servers.taken(["default"])
    assert lot is not None
    return lot


async def put(store: Store, lot: Lot, *to: str) -> tuple[list[uuid.UUID], Word]:
    """Store messages with the places of a lot; and what its worker is to be told."""
    attempts = lot.attempts[: len(to)]
    start = Start(lot.session_id, lot.epoch, lot.channel, attempts)
    ids = await store.put_many([[a] for a in to], start=start)
    pairs = [(a, delivery_id(m, 1)) for a, m in zip(attempts, ids, strict=True)]
    return ids, Word(lot.channel, pairs, ())


async def states(store: Store, ids: Sequence[uuid.UUID]) -> list[State]:
    return [await store.state(m) for m in ids]


async def missing(part: Part, clock: Clock) -> None:
    """The time in which all must have come back is over, and looks have been taken."""
    clock.now += RETRACT_S + 0.1
    await part.drain.places.look()
    clock.now += MISSING_S
    await part.drain.places.look()
    await part.drain._guarded_pass()
    await part.recorded()


async def test_a_mail_is_started_by_the_commit_that_takes_it_in(
    part: Part, store: Store, servers: Handover
) -> None:
    ids, word = await put(store, await taken(servers), "a@example.com", "b@example.com")
    assert await states(store, ids) == [State.SENDING] * 2
    part.drain.places.note(word)
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


async def test_what_one_place_is_offered_for_by_redis_is_heard_of_by_it(
    part: Part, store: Store, servers: Handover
) -> None:
    lot = await taken(servers)
    ids, word = await put(store, lot, "a@example.com")
    await servers.tell(lot.session_id, word)
    told = await servers.told(lot.session_id)
    assert told == word
    part.drain.places.note(told)
    await part.recorded()
    assert await states(store, ids) == [State.SENT]


async def test_a_session_that_has_ended_starts_nothing(
    part: Part, store: Store, servers: Handover
) -> None:
    lot = await taken(servers)
    await end_session(store.db, lot.session_id)
    ids, _ = await put(store, lot, "a@example.com")
    assert store.inserted is not None
    assert store.inserted.unstarted
    assert await states(store, ids) == [State.QUEUED]
    with pytest.raises(SessionEnded):
        await part.drain.drain_once()


async def test_an_epoch_that_is_over_starts_nothing(
    part: Part, store: Store, servers: Handover
) -> None:
    lot = await taken(servers)
    await begin_epoch(store.db, lot.session_id, "default", lot.epoch + 1)
    ids, _ = await put(store, lot, "a@example.com")
    assert store.inserted is not None
    assert store.inserted.unstarted
    assert await states(store, ids) == [State.QUEUED]


async def test_another_channels_epoch_is_of_no_matter(
    part: Part, store: Store, servers: Handover
) -> None:
    lot = await taken(servers)
    await begin_epoch(store.db, lot.session_id, "bulk", 7)
    ids, word = await put(store, lot, "a@example.com")
    assert await states(store, ids) == [State.SENDING]
    part.drain.places.note(word)


async def test_who_is_not_to_be_mailed_is_not_started(
    part: Part, store: Store, servers: Handover
) -> None:
    await store.db.write(
        "INSERT INTO suppressions (project_id, address, reason) VALUES (1, 'a@example.com', 3)"
    )
    ids, word = await put(store, await taken(servers), "a@example.com", "b@example.com")
    assert store.inserted is not None
    assert store.inserted.with_suppressed == {ids[0]}
    assert await states(store, ids) == [State.SUPPRESSED, State.SENDING]
    part.drain.places.note(word)  # of a server that says too much
    await part.recorded()
    assert part.outbox == ["b@example.com"]


async def test_what_is_never_told_is_found_and_sent_once(
    part: Part, store: Store, servers: Handover, clock: Clock
) -> None:
    ids, word = await put(store, await taken(servers), "a@example.com")
    await missing(part, clock)
    assert part.outbox == ["a@example.com"]
    assert await states(store, ids) == [State.SENT]
    first, second = await store.attempts(ids[0])
    assert first.result is not None
    assert (first.result.outcome, first.result.cause) == (Outcome.DEFERRED, Cause.WORKER_LOST)
    assert second.number == 2
    found = await store.delivery(ids[0])
    assert (found.spared, found.possibly_sent) == (1, False)
    part.drain.places.note(word)  # comes after all
    await part.recorded()
    assert part.outbox == ["a@example.com"]


async def test_after_that_its_places_are_of_no_use(
    part: Part, store: Store, servers: Handover, clock: Clock
) -> None:
    lot = await taken(servers)
    await missing(part, clock)
    ids, _ = await put(store, lot, "a@example.com")
    assert await states(store, ids) == [State.QUEUED]


async def test_what_no_server_took_is_offered_again(
    part: Part, servers: Handover, clock: Clock
) -> None:
    clock.now += RETRACT_S + 0.1
    await part.drain.places.look()
    assert part.drain.places.is_open
    clock.now += MISSING_S - 0.1
    await part.drain.places.look()
    assert (await taken(servers)).epoch == 0


async def test_what_comes_back_unused_is_offered_again(part: Part, servers: Handover) -> None:
    lots = []
    while (lot := await servers.taken(["default"])) is not None:
        lots.append(lot)
    for lot in lots:
        part.drain.places.note(Word("default", (), lot.attempts))
    again = await taken(servers)
    assert len(again.attempts) == LOT
    assert set(again.attempts).isdisjoint(a for lot in lots for a in lot.attempts)


async def test_a_place_that_is_used_twice_sends_both_once(
    part: Part, store: Store, servers: Handover
) -> None:
    """Redis fell back to an older state, and gave a lot to two servers."""
    lot = await taken(servers)
    first, one = await put(store, lot, "a@example.com")
    second, two = await put(store, lot, "b@example.com")
    part.drain.places.note(one)
    part.drain.places.note(two)
    await part.drain._guarded_pass()
    await part.recorded()
    assert sorted(part.outbox) == ["a@example.com", "b@example.com"]
    assert await states(store, first + second) == [State.SENT] * 2


async def test_a_word_that_comes_twice_sends_once(
    part: Part, store: Store, servers: Handover
) -> None:
    ids, word = await put(store, await taken(servers), "a@example.com")
    part.drain.places.note(word)
    part.drain.places.note(word)
    await part.drain._guarded_pass()
    await part.recorded()
    assert part.outbox == ["a@example.com"]
    assert len(await store.attempts(ids[0])) == 1


async def test_what_cannot_be_read_is_taken_back_and_sent(
    part: Part, store: Store, servers: Handover, lossy: LossyDatabase
) -> None:
    ids, word = await put(store, await taken(servers), "a@example.com")
    lossy.away = True
    part.drain.places.note(word)
    await part.drain.places.settle()
    lossy.away = False
    await part.drain._guarded_pass()
    await part.recorded()
    assert part.outbox == ["a@example.com"]
    assert await states(store, ids) == [State.SENT]


async def test_what_was_started_by_a_place_of_nobodys_is_found_each_minute(
    part: Part, store: Store, clock: Clock
) -> None:
    lot = Lot(part.session.session_id, 0, "default", (uuid.uuid4(),))  # somebody wrote to Redis
    ids, _ = await put(store, lot, "a@example.com")
    clock.now += STRAY_S + 1
    part.session._heard(part.session.session_id, clock.now)
    await part.drain._guarded_pass()
    assert await states(store, ids) == [State.SENDING]  # a word could still come
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
    assert LEASE_S > MISSING_S


async def test_nothing_is_offered_while_more_is_due_than_is_claimed(
    lossy: LossyDatabase,
    clock: Clock,
    redis_url: str,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mailgrpc.worker.drain.CLAIM_DELIVERIES", 2)
    async with Part(lossy, clock, redis_url=redis_url) as part:
        part.drain.places.are_heard = True
        part.drain.places.note_mail()
        await store.put_many([[f"a{n}@example.com"] for n in range(3)])
        await part.drain.drain_once()
        assert not part.drain.places.is_open
        await part.drain.drain_once()
        assert part.drain.places.is_open
        await part.recorded()
        part.drain.places.withdraw()


async def test_without_mail_nothing_is_offered(
    lossy: LossyDatabase, clock: Clock, redis_url: str
) -> None:
    async with Part(lossy, clock, redis_url=redis_url) as part:
        part.drain.places.are_heard = True
        assert await part.drain.drain_once()
        assert not part.drain.places.is_open


async def test_servers_do_not_take_from_the_dead(
    part: Part, servers: Handover, redis_url: str
) -> None:
    lots = part.journal.slots // 2 // LOT
    doorbell = Doorbell(redis_url)
    async with asyncio.timeout(5):
        while await doorbell.ask(lambda redis: redis.llen(LOTS), 2) != lots:
            await asyncio.sleep(0.01)
    await servers.leave(part.session.session_id)
    assert await servers.taken(["default"]) is None
    word = await servers.told(part.session.session_id)  # in case that it lives after all
    assert word is not None
    assert len(word.unused) == LOT
    await doorbell.close()


async def test_what_others_have_written_to_redis_is_passed_over(
    servers: Handover, redis_url: str
) -> None:
    doorbell = Doorbell(redis_url)
    for rubbish in (b"", b"\xc1", b"\x93\x01\x02\x03", b"\x94\x01\x02\x03\x91\x04"):
        await doorbell.ask(lambda redis: redis.rpush(LOTS, rubbish), 2)  # noqa: B023
        await doorbell.ask(lambda redis: redis.rpush("mailgrpc:words:9", rubbish), 2)  # noqa: B023
        assert await servers.taken(["default"]) is None
        assert await servers.told(9) is None
    await doorbell.close()


async def test_while_redis_takes_nothing_offers_rest(
    lossy: LossyDatabase, clock: Clock, store: Store
) -> None:
    async with Part(lossy, clock, redis_url="redis://127.0.0.1:1") as part:
        part.drain.places.are_heard = True
        await offer(part)
        await until(lambda: part.drain.places._rest_until > clock.now)
        await missing(part, clock)
        assert not part.drain.places.is_open
        await part.drain.drain_once()
        assert not part.drain.places.is_open
