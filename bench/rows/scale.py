"""More processes, and a PostgreSQL that waits for another.

Two servers and two workers against one of each, end to end into the capture provider. All of them
share this machine with PostgreSQL and the load, so on two cores there is no processor left to win:
what is asked is that a second process costs nothing, on locks and lanes and on half-full batches.

Enqueue by two servers while each commit waits for a synchronous standby at some distance, against
the same without any standby. A flush holds its lane of the feed until the standby has it. The rate
holds if what waits is joined into larger flushes and the other lanes go on meanwhile.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from bench.family import Child, Family, calls
from bench.row import Measured
from bench.standby import commit_ms, standby

ROUNDS = 5
SECONDS = 6.0
WARM_UP = 3000
CALLS = 256
"""In flight, over CONNECTIONS: the kernel spreads these over the servers."""
CONNECTIONS = 16
ROUND_TRIP_MS = 3.0
_PATIENCE_S = 60.0

_LAST = "SELECT id FROM deliveries ORDER BY id DESC LIMIT 1"
_SENT = """SELECT count(*) AS n, extract(epoch FROM max(state_since))::float8 AS last_at
    FROM deliveries WHERE state = 4 AND id > $1"""
_TRIED = "SELECT count(*) AS n FROM attempts WHERE delivery_id > $1 AND outcome = 1"
_TOLD = "SELECT count(*) AS n FROM events WHERE state = 4 AND delivery_id > $1"
_LANES = "SELECT count(DISTINCT lane) AS n FROM events WHERE message_id IS NOT NULL"


def run(family: Family) -> list[Measured]:
    return [_processes(family), _distance(family)]


def _processes(family: Family) -> Measured:
    row = Measured(
        "two servers, two workers, end to end", "one of each", at_least=1.0, against_itself=True
    )
    mails = {}
    for count in (1, 2):
        with _gateway(family, count) as running:
            mails[count] = max(int(_through(family, row, running, WARM_UP)[0] * SECONDS), 100)
    used: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for count, rates in ((1, row.theirs), (2, row.ours)):
            with _gateway(family, count) as running:
                _through(family, row, running, WARM_UP)
                rate, cpu_us = _through(family, row, running, mails[count])
                rates.append(rate)
                used[count].append(cpu_us)
    row.facts = {
        "mails a round": f"{mails[2]:,}, {mails[1]:,} by one of each",
        "processor time a mail": _cpu_text(used[2]),
        "the same, one of each": _cpu_text(used[1]),
        "acknowledged = rows = SENT = attempts = events": "in every round",
    }
    return row


def _cpu_text(used: list[dict[str, float]]) -> str:
    return ", ".join(f"{who} {statistics.median(u[who] for u in used):.0f} µs" for who in used[0])


@dataclass(frozen=True, slots=True)
class _Running:
    servers: Child
    workers: list[Child]


@contextlib.contextmanager
def _gateway(family: Family, count: int) -> Iterator[_Running]:
    """So many servers, on one port, and as many workers."""
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(family.running("serve", "--processes", str(count)))
        workers = [stack.enter_context(family.running("work")) for _ in range(count)]
        yield _Running(servers, workers)


def _used(family: Family, running: _Running) -> dict[str, float]:
    """Processor seconds so far, by who used them."""
    return {
        "servers": running.servers.cpu_s(),
        "workers": sum(worker.cpu_s() for worker in running.workers),
        "PostgreSQL": family.postgres_cpu_s(),
    }


def _through(
    family: Family, row: Measured, running: _Running, mails: int
) -> tuple[float, dict[str, float]]:
    """A round: mails a second from the first acknowledgement to the last SENT; µs a mail."""
    found = family.sql(_LAST)
    last = found[0]["id"] if found else uuid.UUID(int=0)
    stored, used = family.stored(), _used(family, running)
    load = calls(
        running.servers.address, messages=mails, concurrency=CALLS, connections=CONNECTIONS
    )
    give_up_at = time.monotonic() + _PATIENCE_S
    while family.sql("SELECT EXISTS (SELECT FROM due) AS any")[0]["any"]:
        if time.monotonic() > give_up_at:
            break  # the books tell
        time.sleep(0.05)
    now = _used(family, running)
    sent = family.sql(_SENT, last)[0]
    row.check(
        "books",
        wanted=mails,
        acknowledged=load["messages"],
        rows=family.stored() - stored,
        sent=sent["n"],
        attempts=family.sql(_TRIED, last)[0]["n"],
        told_sent=family.sql(_TOLD, last)[0]["n"],
    )
    cpu_us = {who: (now[who] - used[who]) / mails * 1e6 for who in now}
    return mails / (sent["last_at"] - load["first_at"]), cpu_us


def _distance(family: Family) -> Measured:
    row = Measured(
        f"Enqueue, synchronous standby {ROUND_TRIP_MS:g} ms away",
        "the same two servers without a standby",
        at_least=0.7,
        against_itself=True,
    )
    follows: list[float] = []
    alone_ms, waits_ms = [], []
    with (
        standby(family, round_trip_ms=ROUND_TRIP_MS) as second,
        family.running("serve", "--processes", "2") as servers,
    ):
        _enqueue(family, row, servers)
        for _ in range(ROUNDS):
            alone_ms.append(commit_ms(family.url))
            row.theirs.append(_enqueue(family, row, servers))
            with second.running(waited_for=False):
                follows.append(_enqueue(family, row, servers))
            with second.running(waited_for=True):
                waits_ms.append(commit_ms(family.url))
                row.ours.append(_enqueue(family, row, servers))
    row.facts = {
        "with a standby that nobody waits for": f"{statistics.median(follows):,.0f}/s",
        "a commit alone, without and with the wait": (
            f"{statistics.median(alone_ms):.1f} ms, {statistics.median(waits_ms):.1f} ms"
        ),
        "lanes written to": str(family.sql(_LANES)[0]["n"]),
        "acknowledged = rows": "in every round",
    }
    return row


def _enqueue(family: Family, row: Measured, servers: Child) -> float:
    stored = family.stored()
    found = calls(servers.address, seconds=SECONDS, concurrency=CALLS, connections=CONNECTIONS)
    row.check("books", acknowledged=found["messages"], rows=family.stored() - stored)
    return found["rate"]
