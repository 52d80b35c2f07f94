"""Writers of the feed: deliveries that live through the real functions of the database.

`python -m tests.feed.writing DATABASE_URL REDIS_URL LANES EVENTS SEED` is a process of two writers that go on until
they have written so many events. Their transactions stay open for a while after the function has
returned, which the program itself never does: so commits overtake each other as much as they can.
"""

from __future__ import annotations

import asyncio
import random
import sys
import uuid
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from mailgrpc.core.delivery import Outcome, Result, State, Step, WaitReason
from mailgrpc.core.ids import delivery_id, new_id, new_message_id
from mailgrpc.core.message import Mailbox, MailMessage, Recipient, Submission
from mailgrpc.core.shape import checked_submission
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
from mailgrpc.db.messages import NewMessage, insert_messages
from mailgrpc.db.workers import open_session
from mailgrpc.doorbell import Doorbell

ACCEPTED = Result(Outcome.ACCEPTED, status_code=250)
LATER = Result(Outcome.DEFERRED, status_code=451)


def message(*to: str, project_id: int = 1, **fields: Any) -> NewMessage:
    """A message to these addresses, ready to be stored; `fields` are those of MailMessage."""
    recipients = tuple(Recipient(a) for a in to or ("ada@example.test",))
    mail = MailMessage(
        sender=Mailbox("shop@example.test"),
        recipients=recipients,
        **{"subject": "Hello", "text": "A word.", **fields},
    )
    return NewMessage(
        message_id=new_message_id(),
        project_id=project_id,
        submission=checked_submission(Submission(mail)),
        fingerprint=b"",
        flags=0,
        channel="default",
        expire_at=datetime.now(UTC) + timedelta(days=1),
    )


async def enqueue(db: Database, *new: NewMessage, lane: int = 0) -> None:
    """Store messages: one event a recipient."""
    for start in range(0, len(new), 500):
        await insert_messages(db, lane, new[start : start + 500])


def deliveries_of(new: Iterable[NewMessage]) -> list[uuid.UUID]:
    """The ids of the deliveries of messages."""
    return [
        delivery_id(m.message_id, number)
        for m in new
        for number in range(1, len(m.submission.message.recipients) + 1)
    ]


class Sender:
    """A worker session that starts deliveries and says what came of them."""

    def __init__(self, db: Database, session_id: int, lane: int) -> None:
        self._db = db
        self._session_id = session_id
        self._lane = lane

    @classmethod
    async def open(cls, db: Database, lane: int = 0) -> Sender:
        return cls(db, await open_session(db, "sender", ["default"]), lane)

    async def start(self, limit: int = 500) -> list[Started]:
        """Start what is due: one event each."""
        batch = await claim_due(self._db, self._session_id, "default", limit, 0)
        starting = [Starting(c.delivery_id, new_id(), new_id()) for c in batch.claimed]
        if not starting:
            return []
        return await start_deliveries(self._db, self._session_id, self._lane, starting)

    async def record(self, started: Sequence[Started], deferred: int = 0) -> None:
        """The first `deferred` have to wait, the rest was accepted: one event each."""
        now = datetime.now(UTC)
        wait = Step(State.DEFERRED, False, now - timedelta(seconds=1), WaitReason.BACKOFF)
        sent = Step(State.SENT, False)
        recorded = [
            Recorded.of(
                s,
                "capture",
                now,
                LATER if n < deferred else ACCEPTED,
                wait if n < deferred else sent,
            )
            for n, s in enumerate(started)
        ]
        if recorded:
            await record_outcomes(self._db, self._lane, recorded)

    async def resend(self, ids: Sequence[uuid.UUID]) -> int:
        """Queue deliveries once more: one event each that had ended."""
        now = datetime.now(UTC)
        again = Step(State.QUEUED, False, now, WaitReason.DUE)
        found = await read_deliveries(self._db, ids)
        moves = [Move(d, again, forced=True) for d in found.values() if d.state is State.SENT]
        return await move_deliveries(self._db, self._lane, "tester", moves) if moves else 0


class LingeringDatabase(Database):
    """Commits each write a random time after its function returned, and then rings."""

    def __init__(self, url: str, redis_url: str, rng: random.Random) -> None:
        super().__init__(url, pool_size=2)
        self._doorbell = Doorbell(redis_url)
        self._rng = rng

    async def close(self) -> None:
        await self._doorbell.close()
        await super().close()

    async def write(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        async def call(connection: asyncpg.Connection) -> list[asyncpg.Record]:
            async with connection.transaction():
                rows = await connection.fetch(sql, *args)
                await asyncio.sleep(self._rng.choice((0.0, 0.001, 0.004, 0.012)))
            return rows

        rows = await self._run(call, writes=True)
        self._doorbell.hint_feed()
        return rows


async def live(db: Database, lane: int, events: int, rng: random.Random) -> int:
    """Let deliveries live on a lane until so many events are written. How many were.

    All writers claim from the same queue, so a delivery goes on in the lane of whoever got it.
    """
    sender = await Sender.open(db, lane)
    written = 0
    ended: list[uuid.UUID] = []
    while written < events:
        new = [message(f"{n}@example.test") for n in range(rng.randint(1, 24))]
        await enqueue(db, *new, lane=lane)
        started = await sender.start(rng.randint(1, 40))
        await sender.record(started, deferred=len(started) // 4)
        ended += [s.delivery.delivery_id for s in started[len(started) // 4 :]]
        again = await sender.resend(rng.sample(ended, min(len(ended), 3)))
        written += len(new) + 2 * len(started) + again
        del ended[:-100]
    return written


async def _main(url: str, redis_url: str, lanes: str, events: str, seed: str) -> None:
    rng = random.Random(seed)
    databases = [LingeringDatabase(url, redis_url, random.Random(rng.random())) for _ in range(2)]
    async with asyncio.TaskGroup() as group:
        for db, lane in zip(databases, lanes.split(","), strict=True):
            group.create_task(live(db, int(lane), int(events), random.Random(rng.random())))
    for db in databases:
        await db.close()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
