"""Events to one live subscriber of everything, against a bare stream of one event a response.

What is asked: whether the feed carries more than any plain stream would, although each event lies
in PostgreSQL, is read from there, joined with its message and resumable. A drain alone cannot
answer that: one worker tells of fewer events than either stream can carry. So there are two parts.

  - A drain at full speed, watched live: every event has to come, once, with a bounded lag.
  - The ratio: events are appended by the feed's own function as fast as one live subscriber takes
    them, never more than 4,000 ahead of it (load/live.py). It is the rate at which the lag stays
    bounded, and the analogue of the counterpart, whose stream is held by flow control alone. That
    PostgreSQL has to write, commit and read these events meanwhile counts against us; the
    counterpart has its cores for itself, and its events are made before it starts.

The subscriber is the same on both sides: own process, generated stubs, gRPC's own client. As a
fact: the history read from a token (catching up), by the same subscriber.
"""

from __future__ import annotations

import json
import statistics

from bench.family import Family, backlog, bare_server, beside, generate
from bench.row import Measured

ROUNDS = 5
SECONDS = 4.0
MAILS = 20_000
BARE_EVENTS = 60_000
LAG_MS = 1000.0
_APPENDED = "SELECT count(*) AS n FROM events WHERE state <> 1"


def run(family: Family) -> list[Measured]:
    row = Measured(
        "events to one live subscriber of all", "a bare grpc.aio stream, one event each", at_least=1
    )
    lags: list[float] = []
    appended = 0
    with family.running("serve") as server, bare_server("bare_stream") as bare:
        token = _watch_a_drain(family, server.address, row)
        for _ in range(ROUNDS):
            row.theirs.append(_watch(bare, BARE_EVENTS)["rate"])
            found = generate(
                "bench.load.live", server.address, family.url, family.redis_url, str(SECONDS)
            )
            row.ours.append(found["rate"])
            lags.append(found["lag_p99_ms"])
            appended += found["appended"]
            row.check(
                "live",
                appended=found["appended"],
                received=found["events"],
                different=found["different"],
            )
        behind = 2 * MAILS + appended
        row.check("rows", events=family.sql(_APPENDED)[0]["n"], told=behind)
        history = _watch(server.address, behind, token)
        row.check("history", read=history["events"], different=history["different"], rows=behind)
    row.limit(
        f"lag at most {LAG_MS:.0f} ms, p99, at the rate above", statistics.median(lags) <= LAG_MS
    )
    row.facts |= {
        "lag at that rate, p99": f"{statistics.median(lags):.0f} ms",
        "events a response at that rate": f"{found['a_response']:.0f}",
        "catching up with a history": f"{history['rate']:,.0f}/s of {behind:,} events",
    }
    return [row]


def _watch(target: str, count: int, token: str = "") -> dict:
    with beside("bench.load.watcher", target, str(count), *filter(None, [token])) as watcher:
        return json.loads(watcher.stdout.readlines()[-1])


def _watch_a_drain(family: Family, target: str, row: Measured) -> str:
    """One worker drains a backlog before a subscriber's eyes; the token from before it."""
    count = 2 * MAILS  # to SENDING, to SENT
    row.check("backlog", wanted=MAILS, acknowledged=backlog(target, MAILS))
    with beside("bench.load.watcher", target, str(count)) as watcher:
        token = watcher.stdout.readline().removeprefix("watching").strip()
        with family.running("work"):
            found = json.loads(watcher.stdout.readline())
    row.check("drain", expected=count, received=found["events"], different=found["different"])
    row.limit(
        f"lag at most {LAG_MS:.0f} ms, p99, while a worker drains", found["lag_p99_ms"] <= LAG_MS
    )
    row.facts = {
        "while one worker drains": f"{found['rate']:,.0f}/s",
        "lag then, p50, p99 and last": (
            f"{found['lag_p50_ms']:.0f}, {found['lag_p99_ms']:.0f}, {found['lag_last_ms']:.0f} ms"
        ),
    }
    return token
