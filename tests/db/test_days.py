"""History lies in ranges of days: made ahead, with a net beneath, read and written only where it is."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from mailgrpc.core.delivery import State
from mailgrpc.core.ids import delivery_id, new_message_id
from mailgrpc.core.message import Attachment, Mailbox, MailMessage, Recipient, Submission
from mailgrpc.core.shape import checked_submission
from mailgrpc.db.days import AHEAD, RANGES, make_days, width_of
from mailgrpc.db.deliveries import Started, claim_due, read_deliveries, started_of
from mailgrpc.db.engine import Database
from mailgrpc.db.messages import (
    NewMessage,
    Start,
    insert_messages,
    read_attempts,
    read_contents,
    read_statuses,
)
from mailgrpc.db.migrate import migrate
from mailgrpc.db.schema import check_schema
from mailgrpc.db.workers import open_session
from tests.feed.writing import Sender

DAY = timedelta(days=1)
TABLES = ("messages", "deliveries", "attempts", "attachments")


def made_at(moment: datetime, *to: str) -> NewMessage:
    """A message whose id was made at this moment, with a file."""
    recipients = tuple(Recipient(a) for a in to or ("ada@example.com",))
    mail = MailMessage(
        sender=Mailbox("shop@example.com"),
        recipients=recipients,
        subject="Hello",
        text="A word.",
        attachments=(Attachment("a.bin", b"1"),),
    )
    return NewMessage(
        message_id=new_message_id(int(moment.timestamp() * 1000)),
        project_id=1,
        submission=checked_submission(Submission(mail)),
        fingerprint=b"",
        flags=0,
        channel="default",
        expire_at=datetime.now(UTC) + 5 * DAY,
    )


def ids_of(new: Sequence[NewMessage]) -> list[uuid.UUID]:
    return [delivery_id(m.message_id, 1) for m in new]


class DatabaseBefore(Database):
    """As of workers before 0007: they record with a column of each field."""

    async def write(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        if "record_outcomes" in sql:
            lane, results, without_proof = args
            args = (lane, *zip(*results, strict=True), without_proof)
            sql = f"SELECT record_outcomes({_parameters(args)})"
        return await super().write(sql, *args)


def _parameters(args: Sequence[Any]) -> str:
    return ", ".join(f"${n}" for n in range(1, len(args) + 1))


class SenderBefore(Sender):
    """Of schema 0002."""

    async def start(self, limit: int = 500) -> list[Started]:
        claimed = await self._db.write(
            "SELECT * FROM claim_due($1, 'default', $2, 0)", self._session_id, limit
        )
        ids = [row["delivery_id"] for row in claimed]
        rows = await self._db.write(
            "SELECT * FROM start_deliveries($1, 0, $2::uuid[], $3::uuid[], $3::uuid[])",
            self._session_id,
            ids,
            [uuid.uuid4() for _ in ids],
        )
        return [started_of(row) for row in rows]


async def send(db: Database, new: Sequence[NewMessage], sender_of: type[Sender] = Sender) -> None:
    """All that is due is sent; these are among it."""
    sender = await sender_of.open(db)
    started = await sender.start()
    assert {s.delivery.delivery_id for s in started} >= set(ids_of(new))
    await sender.record(started)


async def days(db: Database) -> list[Any]:
    return await db.fetch("SELECT * FROM days ORDER BY until")


async def where(db: Database, table: str = "messages") -> dict[str, int]:
    """How many rows each range has."""
    rows = await db.fetch(
        f"SELECT tableoid::regclass::text AS name, count(*) FROM {table} GROUP BY 1"
    )
    return {row["name"].removeprefix(f"{table}_"): row["count"] for row in rows}


async def test_what_is_stored_stays_through_the_migration(empty_database_url: str) -> None:
    await asyncio.to_thread(migrate, empty_database_url, "0002")
    db = DatabaseBefore(empty_database_url, pool_size=2)
    now = datetime.now(UTC)
    waiting, sent, ahead = (made_at(m) for m in (now, now - 40 * DAY, now + 40 * DAY))
    await insert_messages(db, 0, [sent, ahead])
    await send(db, [sent, ahead], SenderBefore)
    await insert_messages(db, 0, [waiting])
    was = await read_statuses(db, 1, [m.message_id for m in (waiting, sent, ahead)])
    files = {table: await db.fetch(f"SELECT pg_relation_filenode('{table}')") for table in TABLES}
    await db.close()

    await asyncio.to_thread(migrate, empty_database_url)
    db = Database(empty_database_url, pool_size=2)
    await check_schema(db)
    assert await read_statuses(db, 1, list(was)) == was
    assert len(await read_attempts(db, sent.message_id)) == 1
    contents = await read_contents(db, list(was), with_files=True)
    assert all(c.message == sent.submission.message for c in contents.values())
    assert await where(db) == {"before": 2, "net": 1}
    for table in TABLES:  # nothing was copied
        assert files[table] == await db.fetch(f"SELECT pg_relation_filenode('{table}_before')")
    await send(db, [waiting])
    await db.close()


async def test_a_retry_of_what_is_known_to_be_accepted_is_dropped_by_the_migration(
    empty_database_url: str,
) -> None:
    await asyncio.to_thread(migrate, empty_database_url, "0003")
    db = DatabaseBefore(empty_database_url, pool_size=2)
    known, unknown = (made_at(datetime.now(UTC)) for _ in range(2))
    await insert_messages(db, 0, [known, unknown])
    await db.write(
        "UPDATE deliveries SET state = 3, attempt_count = 2, possibly_sent = true, due_at = now()"
    )
    await db.write(
        """INSERT INTO attempts (delivery_id, number, id, call_id, channel, provider, started_at,
               ended_at, outcome, cause, status_code, enhanced_code, text, provider_message_id)
           SELECT d.id, n, gen_random_uuid(), gen_random_uuid(), 'default', 'smtp', now(), now(),
               CASE WHEN n = 1 AND d.id = $1 THEN 1 ELSE 4 END, 0, 250, '', '', ''
           FROM deliveries d, generate_series(1, 2) n""",
        ids_of([known])[0],
    )
    await db.close()
    await asyncio.to_thread(migrate, empty_database_url)
    db = Database(empty_database_url, pool_size=2)
    found = await read_deliveries(db, ids_of([known, unknown]))
    assert [found[i].state for i in ids_of([known, unknown])] == [State.SENT, State.DEFERRED]
    assert [r["delivery_id"] for r in await db.fetch("SELECT delivery_id FROM due")] == ids_of(
        [unknown]
    )
    events = await db.fetch("SELECT delivery_id FROM events WHERE old_state = 3 AND state = 4")
    assert [e["delivery_id"] for e in events] == ids_of([known])
    await db.close()


async def test_connections_from_before_the_migration_go_on(empty_database_url: str) -> None:
    """They have plans, and the functions as they were, in their memory."""
    await asyncio.to_thread(migrate, empty_database_url, "0002")
    db = DatabaseBefore(empty_database_url, pool_size=1)
    for _ in range(8):
        await insert_messages(db, 0, [message := made_at(datetime.now(UTC))])
        await send(db, [message], SenderBefore)
    await asyncio.to_thread(migrate, empty_database_url)
    await insert_messages(db, 0, [message := made_at(datetime.now(UTC))])
    await send(db, [message])
    assert (await db.fetch("SELECT count(*) FROM attempts"))[0][0] == 9
    start = Start(await open_session(db, "before", ["default"]), 0, "default", [uuid.uuid4()])
    await insert_messages(db, 0, [message := made_at(datetime.now(UTC))], start)
    [delivery_id] = ids_of([message])
    found = await db.fetch("SELECT state, attempt_id FROM deliveries WHERE id = $1", delivery_id)
    assert [tuple(row) for row in found] == [(State.SENDING, start.attempts[0])]
    await db.close()


@pytest.mark.parametrize(
    ("retention", "width"), [(None, 30), (1, 1), (7, 1), (30, 1), (31, 2), (90, 3), (365, 13)]
)
def test_what_is_kept_is_cut_into_about_thirty(retention: int | None, width: int) -> None:
    assert width_of(retention) == width
    assert retention is None or retention / width <= RANGES


async def test_ranges_are_made_ahead_once_and_without_a_gap(db: Database) -> None:
    now = datetime.now(UTC)
    await make_days(db, 14)
    assert await make_days(db, 14) == 0
    made = await days(db)
    assert made[-1]["until"] >= now + AHEAD
    assert all(a["until_id"] == b["first_id"] for a, b in itertools.pairwise(made))
    assert all(d["until"] - d["since"] == DAY for d in made[1:])
    assert all(d["until"].hour == d["until"].minute == 0 for d in made)
    # Later the next ones follow, and of another width where the setting is another.
    await make_days(db, 90, now=now + 10 * DAY)
    assert (await days(db))[-1]["until"] >= now + 10 * DAY + AHEAD
    assert (await days(db))[-1]["until"] - (await days(db))[-1]["since"] == 3 * DAY


async def test_where_no_range_was_made_the_net_takes_it_and_becomes_one(db: Database) -> None:
    now = datetime.now(UTC)
    await make_days(db, 14)
    fell = [made_at(now + n * DAY) for n in range(6, 21)]
    far_ahead = made_at(now + 400 * DAY)
    await insert_messages(db, 0, [*fell, far_ahead])
    await send(db, fell)
    assert await where(db) == {"net": 16}
    await make_days(db, 14, now=now + 20 * DAY)
    for table in TABLES:
        ranges = await where(db, table)
        assert ranges.pop("net") == 1
        assert list(ranges.values()) == [15]  # one range for all of that time
    statuses = await read_statuses(db, 1, [m.message_id for m in [*fell, far_ahead]])
    assert len(statuses) == 16
    # And a new net hangs below.
    await insert_messages(db, 0, [made_at(now + 300 * DAY)])
    assert (await where(db))["net"] == 2


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y%m%d")


async def test_what_a_clock_put_ahead_goes_over_when_its_range_is_made(db: Database) -> None:
    now = datetime.now(UTC)
    await make_days(db, 14)
    early = made_at(now + 9 * DAY)
    await insert_messages(db, 0, [early])
    for n in range(1, 8):
        await make_days(db, 14, now=now + n * DAY)
    assert await where(db) == {"d" + _text(now + 9 * DAY): 1}
    await send(db, [early])


async def test_a_batch_over_several_ranges_is_sent_whole(db: Database) -> None:
    now = datetime.now(UTC)
    await make_days(db, 14)
    midnight = (now + 3 * DAY).replace(hour=0, minute=0, second=0, microsecond=0)
    millisecond = timedelta(milliseconds=1)
    new = [made_at(m) for m in (now - 30 * DAY, midnight - millisecond, midnight, now + 60 * DAY)]
    await insert_messages(db, 0, new)
    assert len(await where(db)) == 4
    await send(db, new)
    found = await read_deliveries(db, ids_of(new))
    assert {d.state for d in found.values()} == {State.SENT}
    sender = await Sender.open(db)
    assert await sender.resend(ids_of(new)) == len(new)
    await sender.record(await sender.start(), deferred=2)
    states = [d.state for d in (await read_deliveries(db, ids_of(new))).values()]
    assert sorted(states) == sorted([State.DEFERRED] * 2 + [State.SENT] * 2)
    [row] = await db.write(
        "SELECT * FROM clear_messages(0, '', 1, $1, true, '{}')", [m.message_id for m in new]
    )
    assert row["cleared"] == len(new)
    for table in TABLES:
        assert await where(db, table) == {}


async def test_the_hot_functions_read_only_the_rows_and_the_ranges_they_are_about(
    db: Database, database_url: str
) -> None:
    now = datetime.now(UTC)
    await make_days(db, 14)
    for n in range(1, 12):
        await make_days(db, 14, now=now + n * DAY)
    for n in range(12):
        past = [made_at(now + n * DAY) for _ in range(300)]
        await insert_messages(db, 0, past)
    await send_all(db)
    await db.write("ANALYZE")
    new = [made_at(now + n * DAY) for n in (4, 5) for _ in range(20)]
    await insert_messages(db, 0, new)
    connection = await asyncpg.connect(database_url, server_settings={"search_path": "mailgrpc"})
    session = (await db.fetch("SELECT id FROM workers LIMIT 1"))[0]["id"]
    claims = await claim_due(db, session, "default", 100, 0)
    ids = [c.delivery_id for c in claims.claimed]
    assert len(ids) == 40
    touched = """SELECT relname, seq_scan, idx_tup_fetch FROM pg_stat_xact_user_tables
        WHERE relname ~ '^(messages|deliveries|attempts|attachments)_' AND seq_scan + idx_scan > 0"""
    async with connection.transaction():
        started = await connection.fetch(
            "SELECT * FROM start_deliveries($1, 0, $2::uuid[], $2::uuid[], $2::uuid[], 0)",
            session,
            ids,
        )
        rows = await connection.fetch(touched)
        assert len(started) == 40
        assert {r["relname"] for r in rows} == {
            f"deliveries_d{_text(now + n * DAY)}" for n in (4, 5)
        }
        assert sum(r["seq_scan"] for r in rows) == 0
        # Twice each: to lock it and to change it; not the 300 beside them.
        assert sum(r["idx_tup_fetch"] for r in rows) <= 40 * 3
    await connection.close()


async def send_all(db: Database) -> None:
    sender = await Sender.open(db)
    while started := await sender.start():
        await sender.record(started)
