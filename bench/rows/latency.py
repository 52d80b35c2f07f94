"""How long a mail takes where nothing is at its limit: an open loop at a fifth of the full load.

Two ways are measured at once. From the acknowledgement until the sink has the final dot, against
Postfix from its 250, at the same absolute rate; where that rate is more than Postfix carries, both
get a fifth of what Postfix does at its best, which is said. And from SENT recorded until a
subscriber of WatchStatus is told, against a Redis pub/sub round trip that goes on meanwhile. Recorded
it is at its commit: the time is PostgreSQL's own, taken before it waits for the disk.

The clocks are one machine's, so that times of different processes may be subtracted. A mail can be
at the sink before its caller has read the answer: such a time is negative and counts as it is.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.family import Family, calls, generate
from bench.family import family as another_family
from bench.gateway import Gateway, gateway
from bench.journey import most_fitting, through_postfix
from bench.load.acknowledged import read_acknowledged
from bench.load.percentiles import of_times
from bench.machine import PLACE
from bench.postfix import Postfix, postfix, why_absent
from bench.row import Measured
from bench.rows.end_to_end import CONNECTIONS, by_calls
from bench.sink import Sink, Taken, sink
from mailgrpc.core.ids import DELIVERY, from_text

ROUNDS = 3
SECONDS = 8.0
FULL_MAILS = 10_000
"""Over which the full load of ours is found, after a warm-up of as many; Postfix gets a fourth."""
_CARRIED = 0.8
"""Of its full rate: beyond, a queue in front of Postfix would be measured, not Postfix."""
_PUBLISHED_A_SECOND = 100.0


_COMMITTED = """SELECT delivery_id, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 AS at
    FROM events WHERE state = 4 AND delivery_id = ANY ($1::uuid[])"""


def run(_: Family) -> list[Measured]:
    with another_family(commit_times=True) as family:
        return _run(family)


def _run(family: Family) -> list[Measured]:
    reached = [
        Measured(f"acknowledged → at the sink, {p}", "Postfix, from its 250", " ms", at_most=1)
        for p in ("p50", "p99")
    ]
    told = [
        Measured(f"SENT recorded → told to a watcher, {p}", "Redis pub/sub", " ms", at_most=5)
        for p in ("p50", "p99")
    ]
    with sink() as taker, gateway(family, taker, CONNECTIONS) as ours, _peer(taker) as peer:
        rate, why = _rate(ours, peer, taker)
        for _ in range(ROUNDS):
            with (
                _beside("bench.load.watch", ours.server.address) as watched,
                _beside(
                    "bench.counterparts.pubsub", family.redis_url, _PUBLISHED_A_SECOND
                ) as published,
            ):
                _add(reached, "ours", _our_way(reached, ours, rate))
            _add(told, "theirs", published)
            late = _after_commit(family, watched)
            _add(told, "ours", late)
            for row in told:
                row.check(
                    "events", sent=int(rate * SECONDS), told=len(watched), recorded=late["count"]
                )
            if peer is not None:
                _add(reached, "theirs", _their_way(reached, peer, taker, rate))
    for row in reached + told:
        row.facts["rate"] = f"{rate:,.0f}/s: {why}"
    for row in reached:
        row.facts["connections to the sink"] = f"{CONNECTIONS} on either side"
        if peer is None:
            row.facts["no counterpart"] = why_absent()
    for row in told:
        row.facts["published meanwhile"] = f"{_PUBLISHED_A_SECOND:.0f}/s"
    return reached + told


def _add(rows: list[Measured], side: str, found: dict) -> None:
    for row, name in zip(rows, ("p50_ms", "p99_ms"), strict=True):
        getattr(row, side).append(found[name])


@contextlib.contextmanager
def _peer(taker: Sink) -> Iterator[Postfix | None]:
    if why_absent():
        yield None
        return
    with postfix(taker.port, CONNECTIONS) as peer:
        yield peer


def _rate(ours: Gateway, peer: Postfix | None, taker: Sink) -> tuple[float, str]:
    """At which rate both are measured, and why."""
    by_calls(ours, FULL_MAILS)
    fifth = by_calls(ours, FULL_MAILS).rate / 5
    if peer is None:
        return fifth, "a fifth of the full load"
    mails = FULL_MAILS // 4
    full = through_postfix(peer, taker, mails, most_fitting(peer, taker, mails)).rate
    if fifth <= full * _CARRIED:
        return fifth, f"a fifth of our full load; Postfix does {full:,.0f}/s"
    return full / 5, f"a fifth of Postfix's full load, as it cannot carry {fifth:,.0f}/s"


def _our_way(rows: list[Measured], ours: Gateway, rate: float) -> dict:
    def load(path: Path) -> dict:
        return calls(ours.server.address, rate=rate, seconds=SECONDS, acknowledged=path)

    with _acknowledged() as path:
        found = load(path)
        _, taken = ours.settled(found["messages"])
        return _of_way(rows, "ours", path, taken)


def _their_way(rows: list[Measured], peer: Postfix, taker: Sink, rate: float) -> dict:
    with _acknowledged() as path:
        found = generate(
            "bench.load.smtp",
            peer.port,
            connections=CONNECTIONS,
            rate=rate,
            seconds=SECONDS,
            acknowledged=path,
        )
        taker.wait(found["messages"])
        return _of_way(rows, "theirs", path, taker.take())


def _of_way(rows: list[Measured], whose: str, path: Path, taken: Taken) -> dict:
    """The times from the acknowledgement to the dot, of mails that were acknowledged and came."""
    acknowledged = read_acknowledged(path)
    both = acknowledged.keys() & taken.at.keys()
    for row in rows:
        row.check(
            f"books of {whose}",
            acknowledged=len(acknowledged),
            ledger=taken.mails,
            both=len(both),
        )
    return of_times([taken.at[recipient] - acknowledged[recipient] for recipient in both])


def _after_commit(family: Family, told: dict[str, float]) -> dict[str, float]:
    """How long after the commit a subscriber was told."""
    told_at = {from_text(DELIVERY, text): at for text, at in told.items()}
    committed = family.sql(_COMMITTED, list(told_at))
    return of_times([told_at[row["delivery_id"]] - row["at"] for row in committed])


@contextlib.contextmanager
def _acknowledged() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mailgrpc-bench-", dir=PLACE) as place:
        yield Path(place) / "acknowledged"


@contextlib.contextmanager
def _beside(module: str, *arguments: object) -> Iterator[dict]:
    """Run what listens meanwhile; what it says is in the dict afterwards."""
    said: dict = {}
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield said
        said |= json.loads(process.communicate(timeout=20)[0])
    finally:
        process.kill()
        process.wait()
