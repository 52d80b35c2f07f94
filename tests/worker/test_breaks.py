"""Sequences of events that break a promise: what is known and not mended yet.

Each test says what should hold, and fails today (docs/reliability.md, "Known gaps"). Whoever mends
one takes its test to where it belongs; what is in here must only get less.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from mailgrpc.core.delivery import Cause, Mode, Outcome, Result, State, next_step, resend_step
from mailgrpc.core.ids import delivery_id, new_id
from mailgrpc.core.message import RetryWishes
from mailgrpc.core.retry import DEFAULT_POLICY
from mailgrpc.db.deliveries import (
    Move,
    Recorded,
    Started,
    Starting,
    claim_due,
    move_deliveries,
    read_deliveries,
    record_outcomes,
    start_deliveries,
)
from mailgrpc.db.engine import Database
from mailgrpc.db.workers import open_session
from mailgrpc.worker.expiry import Expiry
from mailgrpc.worker.journal import Journal
from mailgrpc.worker.journal_file import SLOT_BYTES, DiskFile
from mailgrpc.worker.sweep import Reaper
from tests.gateway import until
from tests.worker.rig import (
    ACCEPTED,
    Clock,
    Gate,
    LossyDatabase,
    Part,
    Store,
    outlive_lease,
)
from tests.worker.test_journal import a_result, killed, opened

pytestmark = pytest.mark.xfail(reason="a known gap: docs/reliability.md", strict=False)

GREYLISTED = Result(Outcome.DEFERRED, Cause.RATE_LIMITED, 450, text="come back")
LOST = Result(Outcome.UNKNOWN, Cause.WORKER_LOST)


async def _recorded(db: Database, started: Started, result: Result) -> None:
    now = datetime.now(UTC)
    step = next_step(started.delivery, result, now, DEFAULT_POLICY, random.Random(1))
    await record_outcomes(db, 0, [Recorded.of(started, "smtp", now, result, step)])


# 1. A statement that comes to the server after its client gave it up.


class LateLine:
    """A line that can stall: what was written into it arrives when it goes on, even where the
    writer closed its end meanwhile. TCP does so: the kernel goes on sending what a closed socket
    still holds (Linux: for minutes), and tries at growing intervals, so after a partition the old
    bytes come later than a new connection."""

    def __init__(self, url: str) -> None:
        query = parse_qs(urlsplit(url).query)
        self._socket = f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"
        parts = urlsplit(url)
        self._login, self._path = parts.netloc.rpartition("@")[0], parts.path
        self._stalled: list[asyncio.Event] = []
        self._is_stalling = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> LateLine:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"postgresql://{self._login}@127.0.0.1:{port}{self._path}?sslmode=disable"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stall(self) -> None:
        """What is written from now on does not arrive yet."""
        self._is_stalling = True

    def heal(self) -> None:
        """New writes arrive again; those that stalled are still on their way."""
        self._is_stalling = False

    def arrive(self) -> None:
        """Now they are there."""
        for event in self._stalled:
            event.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind, there = await asyncio.open_unix_connection(self._socket)
        for way in ((reader, there, True), (behind, writer, False)):
            task = asyncio.create_task(self._pass(*way))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, may_stall: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                if may_stall and self._is_stalling:
                    event = asyncio.Event()
                    self._stalled.append(event)
                    await event.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


async def test_a_claim_that_arrives_after_it_was_given_up_holds_no_mail(
    db: Database, store: Store, clock: Clock, database_url: str
) -> None:
    async with LateLine(database_url) as line:
        through = Database(line.url, pool_size=4)
        try:
            async with Part(through.with_patience(0.5), clock) as part:
                running = asyncio.create_task(part.drain.run())
                await asyncio.sleep(0.1)  # it found nothing and waits
                line.stall()
                part.drain.wake()  # claims into the silence
                await asyncio.sleep(0.3)
                line.heal()
                await asyncio.sleep(2)  # patience is over; all claims were given back; it drains
                message = await store.put(mode=Mode.RETRYING)
                line.arrive()  # the old claim, now
                async with asyncio.timeout(5):
                    while await store.value("SELECT session_id FROM due") is None:
                        await asyncio.sleep(0.01)
                later = await store.put(mode=Mode.RETRYING)
                for _ in range(20):  # the sweeper rings each second; here 20 times
                    part.drain.wake()
                    await part.reaper.reap()
                    await asyncio.sleep(0.1)
                state = await store.state(message)
                assert await store.state(later) is State.SENT  # the worker is well
                part.drain.stop_claiming()
                await running
            assert state is State.SENT, "nobody knows of that lease while its session lives"
        finally:
            await through.close()


async def test_a_start_that_arrives_after_its_attempt_ended_starts_nothing(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put(mode=Mode.RETRYING)
    session = await open_session(db, "test", [])
    await claim_due(db, session, "default", 10, 0)
    first = [Starting(delivery_id(message, 1), new_id(), new_id())]
    # The first try was given up (AmbiguousCommit) and is still on the line; the second answers.
    [started] = await start_deliveries(db, session, 0, first)
    await _recorded(db, started, GREYLISTED)
    await store.make_due()
    await claim_due(db, session, "default", 10, 0)  # the retry, by the same worker
    await start_deliveries(db, session, 0, first)  # the first try arrives
    second = [Starting(delivery_id(message, 1), new_id(), new_id())]
    assert len(await start_deliveries(db, session, 0, second)) == 1, "nobody sends it now"


# 2. A start between the beat and the release of `give_back`, as at a stop that was cut short.


class SlowLine(LossyDatabase):
    """The start is on its way until the beat of the stop was answered; the release waits for it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.is_stopping = False
        self.start_sent = asyncio.Event()
        self._beaten = asyncio.Event()

    async def write(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        if "start_deliveries" in sql:
            self.start_sent.set()
            return await asyncio.shield(asyncio.create_task(self._start(sql, *args)))
        if self.is_stopping and "UPDATE due" in sql and not self._beaten.is_set():
            self._beaten.set()
            await asyncio.sleep(0.2)  # the start comes to the server first
        return await super().write(sql, *args)

    async def _start(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        await self._beaten.wait()
        return await super().write(sql, *args)


async def test_a_stop_in_the_midst_of_a_start_takes_no_lease_from_what_is_sending(
    db: Database, store: Store, clock: Clock, database_url: str
) -> None:
    message = await store.put(mode=Mode.RETRYING)
    slow = SlowLine(database_url)
    await slow.open()
    part = Part(slow, clock)
    await part.__aenter__()
    once = asyncio.create_task(part.drain.drain_once())
    await slow.start_sent.wait()
    slow.is_stopping = True
    # Something reads the row for long (a Resend, a Clear, another start): here so that the two
    # statements surely meet.
    blocker = await asyncpg.connect(database_url)
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("SET search_path = mailgrpc; SELECT FROM deliveries FOR UPDATE")
    # In the order of Worker.stop. Whoever waits for a start may be cancelled, the start goes on.
    once.cancel()
    await asyncio.gather(once, return_exceptions=True)
    await part.drain.abandon()
    await part.recorder.close()
    stopping = asyncio.create_task(part.session.stop(5))
    await asyncio.sleep(1)
    await transaction.rollback()
    await blocker.close()
    await stopping
    await part.journal.close()
    reaper_clock = Clock()
    await outlive_lease(Reaper(db, lane=0, clock=reaper_clock), reaper_clock)
    async with Part(db, clock) as other:  # a worker that lives on
        await store.make_due()
        await other.work()
        await other.reaper.reap()
        assert await store.state(message) is not State.SENDING
    await slow.close()


# 3. Journals.


async def _left(directory: Path, *results: Recorded) -> Path:
    journal = Journal(directory, slots=8)
    await journal.open()
    assert journal._file is not None
    path = journal._file.path
    journal.append(results)
    await journal.synced()
    await until(lambda: journal._writer is not None and journal._writer.done())
    await killed(journal)
    return path


async def test_a_damaged_journal_on_a_full_disk_does_not_hide_the_one_before_it(
    tmp_path: Path,
) -> None:
    elsewhere = tmp_path / "elsewhere"
    good, bad = a_result("good"), a_result("bad")
    (await _left(elsewhere, good)).rename(tmp_path / "1.journal")
    damaged = (await _left(elsewhere, bad)).rename(tmp_path / "2.journal")
    with damaged.open("r+b") as file:  # the machine went down in the midst of a write
        file.seek(SLOT_BYTES + 100)
        file.write(b"\xff" * 64)
    is_full = False

    def on_this_disk(path: Path, *, create: bool = False) -> DiskFile:
        if create and is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return DiskFile(path, create=create)

    async with opened(tmp_path / "x", open_file=on_this_disk) as (journal, _):
        journal._directory = tmp_path  # its own file was made before the disk filled up
        is_full = True
        found: list[Recorded] = []
        for _ in range(3):
            with contextlib.suppress(OSError):
                found += await journal.adopt()
        is_full = False  # and even when there is space again
        for _ in range(3):
            with contextlib.suppress(OSError):
                found += await journal.adopt()
        assert good.attempt_id in {r.attempt_id for r in found}


async def test_the_journal_of_another_gateway_is_left_alone(
    db: Database, store: Store, clock: Clock, tmp_path: Path, cluster: Any
) -> None:
    """Two gateways of one account, each with a database of its own, and the same journal_dir."""
    from tests.conftest import TEMPLATE, _made

    made = _made(cluster, TEMPLATE)
    other_url = await asyncio.to_thread(next, made)
    other_db = Database(other_url)
    message = await store.put(mode=Mode.RETRYING)
    async with Part(db, clock) as part:  # has a session and a start, and then dies
        session = part.session.session_id
        await claim_due(db, session, "default", 1, 0)
        [started] = await start_deliveries(
            db, session, 0, [Starting(delivery_id(message, 1), new_id(), new_id())]
        )
        now = datetime.now(UTC)
        step = next_step(started.delivery, ACCEPTED, now, DEFAULT_POLICY, random.Random(1))
        await _left(tmp_path, Recorded.of(started, "smtp", now, ACCEPTED, step))
    # The other gateway's worker starts first; it adopts.
    async with Part(other_db, clock, journal=Journal(tmp_path, slots=8)) as stranger:
        await stranger.recorder.drain()
    # Ours comes back.
    async with Part(db, clock, journal=Journal(tmp_path, slots=8)) as again:
        await again.recorder.drain()
        await outlive_lease(again.reaper, clock)
        assert await store.state(message) is State.SENT
    await other_db.close()
    await asyncio.to_thread(lambda: next(made, None))


# 4. A stop that leaves results in the journal ends its session all the same.


async def test_a_stop_gives_its_journal_the_time_that_a_kill_gives(
    db: Database, store: Store, clock: Clock, lossy: LossyDatabase
) -> None:
    """What was accepted and could not be recorded before the stop is not sent again."""
    message = await store.put(
        mode=Mode.RETRYING, retry=RetryWishes(initial_backoff=timedelta(seconds=1))
    )
    part = Part(lossy, clock)
    await part.__aenter__()
    real = lossy.write

    async def slow_recording(sql: str, *args: Any) -> Any:
        if "record_outcomes" in sql:
            await asyncio.sleep(3600)  # a lock, a slow disk
        return await real(sql, *args)

    lossy.write = slow_recording  # type: ignore[method-assign]
    await part.drain.drain_once()
    await part.drain.settle()
    assert part.outbox == ["ada@example.com"]
    # As Worker.stop does once its grace is used up.
    await part.drain.abandon()
    await part.recorder.close()
    await part.session.stop()
    # A worker on another machine looks once.
    async with Part(db, clock) as other:
        await other.reaper.reap()
        state = await store.state(message)
        await store.make_due()
        await other.work()
        second = list(other.outbox)
    # And a second later the process is back, with its journal.
    await part.journal.close()
    lossy.write = real  # type: ignore[method-assign]
    assert (state, second) == (State.SENDING, [])


# 5. Expiry and Resend.


async def test_the_expiry_walk_lets_stand_what_resend_queued_meanwhile(
    db: Database, store: Store, clock: Clock
) -> None:
    past = datetime.now(UTC) - timedelta(minutes=5)
    message = await store.put(expire_at=past)
    wanted = delivery_id(message, 1)
    expiry = Expiry(db, lane=0)
    # The walk has read its page: the delivery is QUEUED and over. Before it reads it anew,
    async with Part(db, clock) as part:
        await part.work()  # a start expires it,
        assert await store.state(message) is State.EXPIRED
    delivery = (await read_deliveries(db, [wanted]))[wanted]
    step, forced, expire_at = resend_step(delivery, datetime.now(UTC))  # and somebody resends it.
    assert await move_deliveries(db, 0, "me", [Move(delivery, step, forced, expire_at)]) == 1
    await expiry._expire([wanted])
    assert await store.state(message) is State.QUEUED


# 6. What is known to be accepted is tried again.


@pytest.mark.parametrize("told", ["while the second runs", "after the second"])
async def test_what_an_earlier_attempt_is_known_to_have_delivered_is_not_tried_again(
    db: Database, store: Store, clock: Clock, told: str
) -> None:
    message = await store.put(mode=Mode.RETRYING)
    starts = []
    for result in (LOST, None):  # the reaper ends the first; the second is started
        session = await open_session(db, "test", [])
        await claim_due(db, session, "default", 10, 0)
        [started] = await start_deliveries(
            db, session, 0, [Starting(delivery_id(message, 1), new_id(), new_id())]
        )
        starts.append(started)
        if result is not None:
            await _recorded(db, started, result)
            await store.make_due()
    first, second = starts
    if told == "while the second runs":
        await _recorded(db, first, ACCEPTED)
        await _recorded(db, second, GREYLISTED)
    else:
        await _recorded(db, second, GREYLISTED)
        await _recorded(db, first, ACCEPTED)
    await store.make_due()
    async with Part(db, clock) as part:
        await part.work()
        assert part.outbox == []  # all attempts have ended with proof, the first was accepted


# 7. Suspects.


async def test_a_suspect_is_claimed_though_mail_of_higher_priority_keeps_coming(
    db: Database, store: Store, clock: Clock
) -> None:
    from mailgrpc.core.message import Priority

    low = await store.put("low@example.com", priority=Priority.NORMAL)
    peer = await store.put("peer@example.com", priority=Priority.NORMAL)
    await db.write("UPDATE due SET claims = 2 WHERE delivery_id = $1", delivery_id(low, 1))
    async with Part(db, clock) as part:
        for n in range(20):
            await store.put(f"high{n}@example.com", priority=Priority.HIGH)
            claims = await claim_due(db, part.session.session_id, "default", 200, 0)
            claimed = {c.delivery_id for c in claims.claimed}
            if delivery_id(low, 1) in claimed:
                break
        else:
            assert await store.value(
                "SELECT session_id FROM due WHERE delivery_id = $1", delivery_id(peer, 1)
            ), "its peer went with the first claim"
            pytest.fail("the suspect was passed over 20 times, with room for 200 each time")


# 8. A provider that breaks its own contract.


async def test_a_result_that_is_none_leaves_nothing_in_sending(
    db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put()
    async with Part(db, clock, Gate(lambda call: [None])) as part:  # type: ignore[list-item]
        part.provider.open()  # type: ignore[attr-defined]
        await part.drain.drain_once()
        await part.recorded()
        assert await store.state(message) is not State.SENDING
