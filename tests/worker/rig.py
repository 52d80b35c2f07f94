"""The parts of a worker, loose: sessions with a clock that a test moves, providers that wait."""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg

from mailgrpc.core.delivery import Delivery, Outcome, Result, State
from mailgrpc.core.event import Attempt
from mailgrpc.core.ids import delivery_id, new_message_id
from mailgrpc.core.message import (
    DeliveryOptions,
    Mailbox,
    MailMessage,
    Recipient,
    Submission,
)
from mailgrpc.db.deliveries import read_deliveries
from mailgrpc.db.engine import AmbiguousCommit, Database
from mailgrpc.db.messages import Inserted, NewMessage, Start, insert_messages, read_attempts
from mailgrpc.db.schema import read_installation
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import StoreUnavailable
from mailgrpc.providers.capture import CaptureProvider
from mailgrpc.providers.provider import Provider, SendCall
from mailgrpc.worker.drain import Drain
from mailgrpc.worker.journal import Journal
from mailgrpc.worker.outage import Outage
from mailgrpc.worker.record import Recorder
from mailgrpc.worker.sessions import Session
from mailgrpc.worker.sweep import Reaper

LEASE_S = 30.0
ACCEPTED = Result(Outcome.ACCEPTED, status_code=250)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class LossyDatabase(Database):
    """A real database whose answers can be lost on the way, or which cannot be reached.

    A call of `hangs` does not come to an end: a lock, a slow disk.
    """

    away = False
    hangs = ""

    def __init__(self, url: str) -> None:
        super().__init__(url, pool_size=4)
        self._to_lose: list[str] = []
        self.asked: list[str] = []

    def with_patience(self, timeout_s: float) -> LossyDatabase:
        """Itself, so that what a test sets holds for all who share it."""
        return self

    def lose_answer(self, *functions: str) -> None:
        """The next call of each is carried out, and its answer lost."""
        self._to_lose += functions

    async def fetch(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        if self.away:
            raise StoreUnavailable("away")
        return await super().fetch(sql, *args)

    async def write(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        if self.away:
            raise StoreUnavailable("away")
        if self.hangs and self.hangs in sql:
            await asyncio.sleep(3600)
        rows = await super().write(sql, *args)
        self.asked.append(sql)
        for function in self._to_lose:
            if function in sql:
                self._to_lose.remove(function)
                raise AmbiguousCommit("the connection broke")
        return rows

    def count(self, function: str) -> int:
        """How often a function was carried out."""
        return sum(function in sql for sql in self.asked)


class Gate(CaptureProvider):
    """A capture provider that holds each call, after its last look, until `open` is called.

    `answer` replaces what capture answers.
    """

    def __init__(self, answer: Callable[[SendCall], list[Result]] | None = None) -> None:
        super().__init__()
        self.held: list[SendCall] = []
        self._answer = answer
        self._opened = asyncio.Event()

    def open(self) -> None:
        self._opened.set()

    async def send(self, call: SendCall) -> list[Result]:
        self.held.append(call)
        await self._opened.wait()
        return self._answer(call) if self._answer else await super().send(call)


class Scripted(CaptureProvider):
    """Gives each call the next answer, to all its addressees; or raises it."""

    def __init__(self, *answers: Result | BaseException) -> None:
        super().__init__()
        self.calls: list[SendCall] = []
        self._answers = list(answers)

    async def send(self, call: SendCall) -> list[Result]:
        self.calls.append(call)
        answer = self._answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return [answer] * len(call.addressees)


class Part:
    """One worker process, without its loops: a session, a recorder and a drain."""

    def __init__(
        self,
        db: Database,
        clock: Clock,
        provider: Provider | None = None,
        *,
        channel: str = "default",
        concurrency: int = 8,
        journal: Journal | None = None,
        redis_url: str | None = None,
    ) -> None:
        outage = Outage()
        self.database = db
        self._directory = tempfile.TemporaryDirectory()
        self.journal = journal or Journal(Path(self._directory.name), slots=256)
        self.doorbell = doorbell = Doorbell(redis_url)
        self.provider = provider or CaptureProvider()
        self.session = Session(db, "test", [channel], outage, lease_s=LEASE_S, clock=clock)
        self.recorder = Recorder(db, doorbell, outage, self.journal, lane=0)
        self.drain = Drain(
            db,
            self.session,
            self.recorder,
            doorbell,
            outage,
            self.journal,
            channel=channel,
            provider=self.provider,
            lane=0,
            concurrency=concurrency,
            clock=clock,
        )
        self.reaper = Reaper(db, lane=0, clock=clock)

    async def __aenter__(self) -> Part:
        installation = await read_installation(self.database)
        self.recorder.take_over(await self.journal.open(installation))
        await self.session.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.drain.stop_claiming()
        await self.drain.abandon()
        await self.recorder.close()
        await self.session.stop()
        await self.journal.close()
        await self.doorbell.close()
        self._directory.cleanup()

    async def work(self) -> None:
        """Send all that is due now, and record it."""
        await self.drain.burst()
        await self.recorded()

    async def recorded(self) -> None:
        await self.drain.settle()
        await self.recorder.drain()

    @property
    def outbox(self) -> list[str]:
        """Whom mail left for, in order."""
        assert isinstance(self.provider, CaptureProvider)
        return [r.address for captured in self.provider.outbox for r in captured.recipients]


class Store:
    """The short way to rows."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.inserted: Inserted | None = None  # by the last put

    async def put(self, *to: str, **options: Any) -> uuid.UUID:
        """One message to these addresses; `options` are those of DeliveryOptions. Its id."""
        [message_id] = await self.put_many([list(to or ("ada@example.com",))], **options)
        return message_id

    async def put_many(
        self,
        recipients: Sequence[Sequence[str]],
        *,
        project_id: int = 1,
        flags: int = 0,
        start: Start | None = None,
        **options: Any,
    ) -> list[uuid.UUID]:
        expire_at = options.get("expire_at") or datetime.now(UTC) + timedelta(days=5)
        now_ms = time.time_ns() // 1_000_000
        new = [
            NewMessage(
                message_id=new_message_id(now_ms + n),  # so that they are claimed in this order
                project_id=project_id,
                submission=Submission(
                    MailMessage(
                        sender=Mailbox("shop@example.com"),
                        recipients=tuple(Recipient(a, key=a) for a in to),
                        subject="Hello",
                        text="A word.",
                    ),
                    DeliveryOptions(**options),
                ),
                fingerprint=b"",
                flags=flags,
                channel=options.get("channel") or "default",
                expire_at=expire_at,
            )
            for n, to in enumerate(recipients)
        ]
        self.inserted = await insert_messages(self.db, 0, new, start)
        return [m.message_id for m in new]

    async def project(self, name: str) -> int:
        [row] = await self.db.write("INSERT INTO projects (name) VALUES ($1) RETURNING id", name)
        return int(row["id"])

    async def delivery(self, message_id: uuid.UUID, number: int = 1) -> Delivery:
        wanted = delivery_id(message_id, number)
        return (await read_deliveries(self.db, [wanted]))[wanted]

    async def state(self, message_id: uuid.UUID, number: int = 1) -> State:
        return (await self.delivery(message_id, number)).state

    async def attempts(self, message_id: uuid.UUID) -> list[Attempt]:
        return await read_attempts(self.db, message_id)

    async def make_due(self) -> None:
        """The time that all retries wait for has come."""
        await self.db.write("UPDATE deliveries SET due_at = now() WHERE state IN (1, 3)")
        await self.db.write("UPDATE due SET due_at = now() WHERE session_id IS NULL")
        await self.db.write("UPDATE scheduled SET due_at = now()")

    async def value(self, sql: str, *args: Any) -> Any:
        [row] = await self.db.fetch(sql, *args)
        return row[0]

    async def until(self, sql: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Return when this is true."""
        async with asyncio.timeout(10):
            while not await self.value(sql):
                meanwhile()
                await asyncio.sleep(0.01)

    async def due_rows(self) -> int:
        return int(await self.value("SELECT count(*) FROM due"))


async def outlive_lease(reaper: Reaper, clock: Clock) -> None:
    """Look on, as a sweeper does, until whoever does not beat has been silent for a lease."""
    await reaper.reap()
    for _ in range(6):
        clock.now += LEASE_S / 6
        await reaper.reap()
