"""What 5 million ended messages cost those that come after, and what it costs to drop a day of them.

Two installations side by side, one empty and one with the past in it, measured in turns.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime

import asyncpg

from bench import past
from bench.family import Family, batches, calls
from bench.family import family as another_family
from bench.row import Measured
from mailgrpc.db.days import drop_days
from mailgrpc.db.engine import Database

MESSAGES = 5_000_000
ROUNDS = 5
SECONDS = 4.0
DAY_SMALL, DAY_LARGE = 170_000, 1_700_000


def run(family: Family) -> list[Measured]:
    with another_family() as full:
        past.make_days(full)
        took_s = past.fill(full, MESSAGES, first_day=past.DAYS, days=past.DAYS)
        past.settle(full)
        # Both have the same ranges; only one has something in them.
        past.make_days(family)
        rows = [_enqueue(full, family), _batches(full, family), _drain(full, family)]
        for row in rows:
            row.facts["ended messages"] = f"{MESSAGES:,}, put in within {took_s:.0f} s"
    return [*rows, _retention(family)]


def _in_turns(row: Measured, full: Family, empty: Family, once: Callable[[Family], dict]) -> None:
    said = {full: 0, empty: 0}
    before = {f: f.stored() for f in said}
    cpu: dict[Family, list[float]] = {full: [], empty: []}
    for number in range(ROUNDS + 1):
        for f, rates in ((empty, row.theirs), (full, row.ours)):
            used = f.postgres_cpu_s()
            found = once(f)
            said[f] += found["messages"]
            if number:  # the first of each warms it up
                rates.append(found["rate"])
                cpu[f].append((f.postgres_cpu_s() - used) / found["messages"] * 1e6)
    for f, acknowledged in said.items():
        row.check("books", acknowledged=acknowledged, rows=f.stored() - before[f])
    row.facts["PostgreSQL's processor time a message, full and empty"] = (
        f"{statistics.median(cpu[full]):.0f} µs, {statistics.median(cpu[empty]):.0f} µs"
    )


def _enqueue(full: Family, empty: Family) -> Measured:
    row = Measured(
        "Enqueue beside 5 million ended", "the same, empty", at_least=0.9, against_itself=True
    )
    with full.running("serve") as a, empty.running("serve") as b:
        at = {full: a.address, empty: b.address}
        _in_turns(row, full, empty, lambda f: calls(at[f], seconds=SECONDS, concurrency=256))
    return row


def _batches(full: Family, empty: Family) -> Measured:
    row = Measured(
        "EnqueueBatch beside 5 million ended", "the same, empty", at_least=0.9, against_itself=True
    )
    with full.running("serve") as a, empty.running("serve") as b:
        at = {full: a.address, empty: b.address}
        _in_turns(
            row, full, empty, lambda f: batches(at[f], seconds=SECONDS, concurrency=8, size=100)
        )
    return row


def _drain(full: Family, empty: Family) -> Measured:
    row = Measured(
        "Drain beside 5 million ended", "the same, empty", at_least=0.9, against_itself=True
    )
    for f in (full, empty):  # what the rows before have left
        _drained(f)

    def once(f: Family) -> dict:
        with f.running("serve") as server:
            put = batches(server.address, seconds=1.5, concurrency=8, size=100)["messages"]
        f.checkpoint()
        return {"messages": put, "rate": put / _drained(f)}

    _in_turns(row, full, empty, once)
    return row


def _drained(f: Family) -> float:
    """Let a worker send all that waits; the seconds it took from when it was ready."""
    with (
        tempfile.TemporaryDirectory(prefix="mailgrpc-bench-") as directory,
        f.running("work", MAILGRPC_DATA_DIR=directory),
    ):
        began = time.monotonic()
        while f.sql("SELECT EXISTS (SELECT FROM due) AS some")[0]["some"]:
            time.sleep(0.02)
        return time.monotonic() - began


def _retention(family: Family) -> Measured:
    """How long others wait for days with ten times as much in them, dropped as the sweeper does it."""
    row = Measured(
        f"Longest wait while a day of {DAY_LARGE:,} messages is dropped",
        f"while a day of {DAY_SMALL:,} is",
        unit="ms",
        at_most=3.0,
    )
    midnight = (datetime.now(UTC) - datetime.now(UTC).replace(hour=0, minute=0)).total_seconds()
    sizes = {28: DAY_LARGE, 27: DAY_SMALL, 26: DAY_SMALL}
    for days_ago, messages in sizes.items():
        first_day = days_ago + midnight / 86400.0 - 0.01
        past.fill(family, messages, first_day=first_day, days=0.95, salt=str(days_ago))
    past.settle(family)
    asyncio.run(_drop(family, row))
    return row


async def _drop(family: Family, row: Measured) -> None:
    db = Database(family.url, pool_size=1)
    await db.open()
    asked = await asyncpg.connect(family.url, server_settings={"search_path": "mailgrpc"})
    wholly: list[str] = []
    await drop_days(db, 0, 1)  # looks, and finds them quiet; two days later:
    await db.write("UPDATE days SET quiet_since = quiet_since - interval '2 days'")
    for retention in range(past.DAYS + 1, 24, -1):
        [held] = await db.fetch(
            """SELECT count(*) AS n FROM deliveries WHERE id < (SELECT until_id FROM days
               WHERE until <= clock_timestamp() - make_interval(days => $1)
               ORDER BY until DESC LIMIT 1)""",
            retention,
        )
        asking = asyncio.create_task(_longest_wait_ms(asked, stop := asyncio.Event()))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await drop_days(db, 0, retention)
        took_ms = (time.monotonic() - began) * 1e3
        stop.set()
        waited_ms = await asking
        if held["n"]:
            (row.ours if held["n"] > DAY_SMALL * 5 else row.theirs).append(waited_ms)
            wholly.append(f"{took_ms:.0f} ms for {held['n']:,}")
    row.limit("each of these days was dropped", len(row.ours) == 1 and len(row.theirs) == 2)
    row.facts["until its files were removed too, which nobody waits for"] = ", ".join(wholly)
    await asked.close()
    await db.close()


async def _longest_wait_ms(connection: asyncpg.Connection, stop: asyncio.Event) -> float:
    """Read from the same tables without a pause; the longest that one answer took."""
    longest = 0.0
    while not stop.is_set():
        began = time.monotonic()
        await connection.fetch("SELECT FROM messages ORDER BY id DESC LIMIT 1")
        await connection.fetch("SELECT FROM attempts ORDER BY delivery_id DESC LIMIT 1")
        longest = max(longest, time.monotonic() - began)
    return longest * 1e3
