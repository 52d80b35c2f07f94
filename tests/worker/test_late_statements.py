"""Statements that come to PostgreSQL after their worker gave them up, or between two of its others."""

from __future__ import annotations

import asyncio
import contextlib
import random
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from mailgrpc.core.delivery import Cause, Mode, Outcome, Result, State, next_step
from mailgrpc.core.ids import delivery_id, new_id
from mailgrpc.core.retry import DEFAULT_POLICY
from mailgrpc.db.deliveries import (
    Recorded,
    Starting,
    claim_due,
    record_outcomes,
    start_deliveries,
)
from mailgrpc.db.engine import AmbiguousCommit, Database
from mailgrpc.db.workers import begin_epoch, open_session
from mailgrpc.errors import SchemaError, StoreUnavailable
from mailgrpc.worker.sweep import Reaper
from tests.gateway import until
from tests.worker.rig import ACCEPTED, Clock, LossyDatabase, Part, Scripted, Store, outlive_lease

GREYLISTED = Result(Outcome.DEFERRED, Cause.RATE_LIMITED, 450, text="come back")


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
        self._held_up = 0
        self.was_reset = False
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

    @property
    def has_stalled(self) -> bool:
        """Whether something is on its way."""
        return bool(self._held_up)

    @property
    def has_arrived(self) -> bool:
        """Whether nothing is any more."""
        return not self._held_up

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

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.read(65536)
        except ConnectionResetError:
            self.was_reset = True
            raise

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, may_stall: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await self._read(reader):
                if may_stall and self._is_stalling:
                    event = asyncio.Event()
                    self._stalled.append(event)
                    self._held_up += 1
                    await event.wait()
                    writer.write(data)
                    await writer.drain()
                    self._held_up -= 1
                    continue
                writer.write(data)
                await writer.drain()
        writer.close()


async def test_a_claim_that_arrives_after_it_was_given_up_holds_no_mail(
    db: Database, store: Store, clock: Clock, database_url: str
) -> None:
    async with LateLine(database_url) as line:
        through = Database(line.url, pool_size=1)
        try:
            async with Part(through.with_patience(0.5), clock) as part:
                await part.drain.drain_once()  # finds nothing; the statement is prepared
                line.stall()
                running = asyncio.create_task(part.drain.run())  # claims into the silence
                await until(lambda: line.has_stalled)
                line.heal()
                await store.until("SELECT epochs ->> 'default' = '1' FROM workers")
                message = await store.put(mode=Mode.RETRYING)
                line.arrive()  # the old claim, now; nobody has rung for the message
                await until(lambda: line.has_arrived)
                async with asyncio.timeout(10):
                    while await store.state(message) is not State.SENT:
                        part.drain.wake()
                        await asyncio.sleep(0.05)
                part.drain.stop_claiming()
                await running
        finally:
            await through.close()


async def test_what_belongs_to_an_earlier_epoch_does_nothing(db: Database, store: Store) -> None:
    message = await store.put(mode=Mode.RETRYING)
    session = await open_session(db, "test", ["default", "other"])
    await claim_due(db, session, "default", 10, 0)
    first = [Starting(delivery_id(message, 1), new_id(), new_id())]
    # The first try was given up (AmbiguousCommit) and is still on the line; the second answers.
    [started] = await start_deliveries(db, session, 0, first)
    now = datetime.now(UTC)
    step = next_step(started.delivery, GREYLISTED, now, DEFAULT_POLICY, random.Random(1))
    await record_outcomes(db, 0, [Recorded.of(started, "smtp", now, GREYLISTED, step)])
    await store.make_due()
    assert await begin_epoch(db, session, "default", 1)
    with pytest.raises(asyncpg.PostgresError, match="epoch"):
        await claim_due(db, session, "default", 10, 0)
    assert (await claim_due(db, session, "default", 10, 0, epoch=1)).claimed  # the retry
    assert await start_deliveries(db, session, 0, first) == []  # the first try arrives
    assert await store.state(message) is State.DEFERRED
    second = [Starting(delivery_id(message, 1), new_id(), new_id())]
    assert len(await start_deliveries(db, session, 0, second, epoch=1)) == 1

    await store.put(channel="other")  # whose epoch is another one
    assert (await claim_due(db, session, "other", 10, 0)).claimed
    assert await begin_epoch(db, session, "default", 0)  # one that comes late takes nothing back
    assert await store.value("SELECT epochs ->> 'default' FROM workers") == "1"


@pytest.mark.parametrize("lost", ["claim_due", "start_deliveries"])
async def test_after_a_doubt_a_new_epoch_begins(
    lossy: LossyDatabase, store: Store, clock: Clock, lost: str
) -> None:
    message = await store.put()
    lossy.lose_answer(lost)
    async with Part(lossy, clock) as part:
        running = asyncio.create_task(part.drain.run())
        await store.until("SELECT epochs ->> 'default' = '1' FROM workers", part.drain.wake)
        await part.recorded()
        later = await store.put()
        async with asyncio.timeout(10):
            while await store.state(later) is not State.SENT:
                part.drain.wake()
                await asyncio.sleep(0.01)
        part.drain.stop_claiming()
        await running
    assert await store.state(message) is State.SENT


class Late(LossyDatabase):
    """The first try of the first start comes after the second claim, when the retry is due."""

    held: tuple[str, Any] | None = None
    starts = claims = 0

    async def write(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        if "start_deliveries" in sql:
            self.starts += 1
            if self.starts == 1:
                self.held = sql, args
                raise AmbiguousCommit("given up")
        rows = await super().write(sql, *args)
        if "claim_due" in sql:
            self.claims += 1
            if self.claims > 1 and self.held is not None:
                (held, given), self.held = self.held, None
                await super().write(held, *given)
        if "record_outcomes" in sql and self.starts == 2:
            await Store(self).make_due()
        return rows


async def test_a_burst_begins_a_new_epoch_after_a_doubt_as_well(
    store: Store, clock: Clock, database_url: str
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    late = Late(database_url)
    await late.open()
    async with Part(late, clock, Scripted(GREYLISTED, ACCEPTED)) as part:
        await part.work()
        assert await store.state(message) is State.SENT
    await late.close()


@pytest.mark.parametrize("ending", ["pg_terminate_backend(pid)", "pg_cancel_backend(pid)"])
async def test_a_write_whose_connection_ends_is_in_doubt(
    db: Database, database_url: str, ending: str
) -> None:
    """On the loop of `work` a socket that is closed already is another error than elsewhere."""
    other = Database(database_url, pool_size=1)
    write = asyncio.create_task(db.write("SELECT pg_sleep(60)"))
    asleep = "FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)' AND state = 'active'"
    async with asyncio.timeout(10):
        while not await other.fetch(f"SELECT {asleep}"):
            await asyncio.sleep(0.01)
    await other.write(f"SELECT {ending} {asleep}")
    with pytest.raises(AmbiguousCommit if "terminate" in ending else StoreUnavailable):
        await write
    await other.close()


async def test_what_was_given_up_is_taken_back_from_the_kernel(database_url: str) -> None:
    """A closed socket would go on sending what it holds, to whoever reads again much later."""
    async with LateLine(database_url) as line:
        impatient = Database(line.url, pool_size=1).with_patience(0.3)
        await impatient.open()
        line.stall()
        with pytest.raises(AmbiguousCommit):
            # More than the line's first read takes, so that the rest is still the kernel's.
            await impatient.write("SELECT length($1)", "x" * 8_000_000)
        line.arrive()
        await until(lambda: line.was_reset)
        await impatient.close()


class Refusing(LossyDatabase):
    """Loses the answer of the first start, and refuses every other of that session."""

    started_by: Any = None

    async def write(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        if "start_deliveries" in sql and self.started_by == args[0]:
            raise SchemaError("no such function")
        if "start_deliveries" in sql and self.started_by is None:
            self.started_by = args[0]
            self.lose_answer("start_deliveries")
        return await super().write(sql, *args)


async def test_a_start_in_doubt_that_is_refused_for_good_is_left_to_the_reaper(
    db: Database, store: Store, clock: Clock, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailgrpc.worker.drain._RETRY_S", 0.01)
    message = await store.put(mode=Mode.SEND_ONCE)
    refusing = Refusing(database_url)
    await refusing.open()
    async with Part(refusing, clock) as part:
        first = part.session.session_id
        running = asyncio.create_task(part.drain.run())
        async with asyncio.timeout(10):
            while part.session.session_id == first:
                await asyncio.sleep(0.01)
        await db.write("UPDATE workers SET ended_at = ended_at - make_interval(secs => lease_s)")
        await part.reaper.reap()
        assert await store.state(message) is State.OUTCOME_UNKNOWN
        later = await store.put()
        part.drain.wake()
        async with asyncio.timeout(10):
            while await store.state(later) is not State.SENT:
                await asyncio.sleep(0.01)
        part.drain.stop_claiming()
        await running
    await refusing.close()


class SlowLine(LossyDatabase):
    """The start reaches PostgreSQL just before the stop's release, and both meet on its rows."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.is_stopping = False
        self.start_sent = asyncio.Event()
        self._release_asked = asyncio.Event()

    async def write(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        if "start_deliveries" in sql:
            self.start_sent.set()
            return await asyncio.shield(asyncio.create_task(self._start(sql, *args)))
        if self.is_stopping and "release_claims" in sql and not self._release_asked.is_set():
            self._release_asked.set()
            await waiting_for_a_lock(self, "start_deliveries")
        return await super().write(sql, *args)

    async def _start(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        await self._release_asked.wait()
        return await super().write(sql, *args)


async def waiting_for_a_lock(db: Database, function: str) -> None:
    """Return when a call of it waits for a row that somebody else holds."""
    async with asyncio.timeout(10):
        while not await db.fetch(
            """SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'
               AND query LIKE '%' || $1 || '%' AND pid <> pg_backend_pid()""",
            function,
        ):
            await asyncio.sleep(0.01)


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
    # Something holds the row for long (a Resend, a Clear, another start): so the two surely meet.
    blocker = await asyncpg.connect(database_url, server_settings={"search_path": "mailgrpc"})
    transaction = blocker.transaction()
    await transaction.start()
    await blocker.execute("SELECT FROM deliveries FOR UPDATE")
    # In the order of Worker.stop. Whoever waits for a start may be cancelled, the start goes on.
    once.cancel()
    await asyncio.gather(once, return_exceptions=True)
    await part.drain.abandon()
    await part.recorder.close()
    stopping = asyncio.create_task(part.session.stop(10))
    await waiting_for_a_lock(db, "release_claims")
    await transaction.rollback()
    await blocker.close()
    await stopping
    await part.journal.close()
    assert await store.state(message) is State.SENDING
    assert await store.value("SELECT session_id FROM due") is not None
    reaper_clock = Clock()
    await outlive_lease(Reaper(db, lane=0, clock=reaper_clock), reaper_clock)
    assert await store.state(message) is State.DEFERRED
    await slow.close()
