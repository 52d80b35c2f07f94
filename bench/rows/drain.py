"""One worker draining a backlog into the capture provider, against the bare SQL of the same work.

Before either side the same backlog is put into `due` by EnqueueBatch, with no worker running; the
server is stopped again. Ours is a `work` process as shipped, its journal on the same disk. The
capture provider builds each mail as for SMTP (core/mime.py) and keeps the bytes, so MIME is paid
for; what is spared is the network. The counterpart is a loop of claim, start and record over the
same tables by asyncpg, 200 at a time, which decides and builds nothing (counterparts/raw_loop.py).

The rate of ours is told by PostgreSQL's clock, from the first start to the last record: that a
process has to start up is not what is measured; that a new worker has to warm up is.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid

from bench.counterparts import raw_loop
from bench.family import Family, backlog
from bench.row import Measured

ROUNDS = 5
MAILS = 20_000
_PATIENCE_S = 300.0

_LAST = "SELECT id FROM deliveries ORDER BY id DESC LIMIT 1"
_SENT = """SELECT count(*) AS n, extract(epoch FROM max(state_since) - min(attempt_started_at))
        ::float8 AS took_s
    FROM deliveries WHERE state = 4 AND id > $1"""
_TOLD = """SELECT count(*) FILTER (WHERE state = 2) AS started,
        count(*) FILTER (WHERE state = 4) AS sent FROM events WHERE delivery_id > $1"""
_TRIED = "SELECT count(*) AS n FROM attempts WHERE delivery_id > $1 AND outcome = 1"


def run(family: Family) -> list[Measured]:
    row = Measured(
        "drain into capture, MIME built", "claim, start, record in SQL by asyncpg", at_least=0.4
    )
    cpu, pg_cpu, raw_pg_cpu = [], [], []
    for _ in range(ROUNDS):
        last, taken = _fill(family)
        pg_used = family.postgres_cpu_s()
        done, took_s = asyncio.run(raw_loop.drain(family.url))
        raw_pg_cpu.append((family.postgres_cpu_s() - pg_used) / taken * 1e6)
        row.theirs.append(done / took_s)
        _balance(family, row, "the counterpart's books", last, taken)

        last, taken = _fill(family)
        pg_used = family.postgres_cpu_s()
        with family.running("work") as worker:
            used = worker.cpu_s()
            wait_until_drained(family)
            cpu.append((worker.cpu_s() - used) / taken * 1e6)
            pg_cpu.append((family.postgres_cpu_s() - pg_used) / taken * 1e6)
        row.ours.append(taken / _balance(family, row, "books", last, taken))
    row.facts = {
        "worker's processor time a mail": f"{statistics.median(cpu):.0f} µs",
        "PostgreSQL's processor time a mail": f"{statistics.median(pg_cpu):.0f} µs",
        "the same, counterpart": f"{statistics.median(raw_pg_cpu):.0f} µs",
        "acknowledged = SENT = attempts = events": f"{MAILS:,} in each of {ROUNDS} rounds",
    }
    return [row]


def wait_until_drained(family: Family) -> None:
    """Return when nothing is left in `due`."""
    give_up_at = time.monotonic() + _PATIENCE_S
    while family.sql("SELECT EXISTS (SELECT FROM due) AS any")[0]["any"]:
        if time.monotonic() > give_up_at:
            raise SystemExit("the backlog is not drained")
        time.sleep(0.25)


def _fill(family: Family) -> tuple[uuid.UUID, int]:
    """A backlog: the last delivery before it, and how many were acknowledged."""
    before = family.sql(_LAST)
    with family.running("serve") as server:
        taken = backlog(server.address, MAILS)
    family.checkpoint()  # each side begins with the same write-ahead log
    return (before[0]["id"] if before else uuid.UUID(int=0)), taken


def _balance(family: Family, row: Measured, books: str, last: uuid.UUID, taken: int) -> float:
    """Void the row unless all that was acknowledged was sent and told once; the seconds it took."""
    sent, told = family.sql(_SENT, last)[0], family.sql(_TOLD, last)[0]
    tried = family.sql(_TRIED, last)[0]["n"]
    row.check(
        books,
        wanted=MAILS,
        acknowledged=taken,
        sent=sent["n"],
        attempts=tried,
        told_started=told["started"],
        told_sent=told["sent"],
    )
    return sent["took_s"]
