"""A quarter of an hour at half load: memory that does not grow, and queues that stay clean.

End to end to the SMTP sink, one server and one worker, at half of the rate that they were found to
keep up with just before. Meanwhile 10,000 streams are opened and cancelled. Looked at every few
seconds: the memory of each process, and what the queue tables hold of dead rows and of pages. The
first third is for what fills up once (caches, pools, plans); the last is held to the second. Of
PostgreSQL only what is not its shared memory counts, which it fills as long as there is more to read.

SOAK_MINUTES (15) is for trials; what is written down is of the whole.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from dataclasses import dataclass, field

from bench.family import Family, calls, generate
from bench.gateway import Gateway, gateway
from bench.memory import anonymous_mb
from bench.row import Measured
from bench.rows.end_to_end import CONNECTIONS, by_calls
from bench.sink import sink

MINUTES = float(os.environ.get("SOAK_MINUTES", "15"))
STREAMS = 10_000
PIECES = 20
"""In how many goes the streams are opened, over two thirds of the time."""
GROWTH = 1.05
QUEUES = ("due", "scheduled", "workers")
_PIECE_S = 30.0
_LOOK_EVERY_S = 5.0
_PROBE = 10_000
_SLACK_MB = 1.0  # a page or two of the allocator; 5 % of the smallest process is 4 MB


@dataclass(slots=True)
class _Look:
    """What was found, one value a look."""

    memory: dict[str, list[float]] = field(default_factory=dict)
    dead: list[float] = field(default_factory=list)
    pages: list[float] = field(default_factory=list)


def run(family: Family) -> list[Measured]:
    row = Measured(f"{MINUTES:g} minutes at half load")
    with sink() as taker, gateway(family, taker, CONNECTIONS) as ours:
        by_calls(ours, _PROBE // 5)
        rate = by_calls(ours, _PROBE).rate / 2
        _soak(row, ours, rate)
    return [row]


def _soak(row: Measured, ours: Gateway, rate: float) -> None:
    look, load, seconds = _Look(), _Load(ours.server.address, rate), MINUTES * 60
    stored, sent = ours.family.stored(), ours.sent()
    opened = pieces = 0
    load.start()
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        if pieces < min(PIECES, passed / (seconds * 2 / 3) * PIECES):
            opened += _come_and_go(ours.server.address, STREAMS // PIECES)
            pieces += 1
        _look(look, ours)
        time.sleep(_LOOK_EVERY_S)
    load.stop()
    ours.settled(load.messages)
    row.check(
        "books",
        acknowledged=load.messages,
        rows=ours.family.stored() - stored,
        SENT=ours.sent() - sent,
    )
    row.check("streams", wanted=STREAMS, opened=opened)
    for name, values in look.memory.items():
        second, last = _thirds(values)
        row.facts[f"{name}, second and last third"] = f"{second:.1f} MB, {last:.1f} MB"
        row.limit(f"{name} grows by at most 5 %", last <= max(second * GROWTH, second + _SLACK_MB))
    for name, values in (("dead rows", look.dead), ("pages", look.pages)):
        second, last = _thirds(values)
        row.facts[f"{name} of the queue tables, second and last third"] = (
            f"{second:,.0f}, {last:,.0f}"
        )
        row.limit(f"{name} of the queue tables do not grow", last <= second * 1.1 + 50)
    row.facts["load"] = f"{rate:,.0f}/s, {load.messages:,} messages in all"
    row.facts["Enqueue, the worst p99 of a piece"] = f"{max(load.p99_ms):.1f} ms"
    row.facts["streams opened and cancelled"] = f"{opened:,}"


class _Load(threading.Thread):
    """An open loop in pieces, each a generator of its own, whose mails are made beforehand."""

    def __init__(self, address: str, rate: float) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._rate = rate
        self._ending = threading.Event()
        self.messages = 0
        self.p99_ms: list[float] = []

    def run(self) -> None:
        while not self._ending.is_set():
            found = calls(self._address, rate=self._rate, seconds=_PIECE_S)
            self.messages += found["messages"]
            self.p99_ms.append(found["p99_ms"])

    def stop(self) -> None:
        """After the piece that is under way."""
        self._ending.set()
        self.join()


def _come_and_go(address: str, count: int) -> int:
    return int(generate("bench.load.idle", address, "churn", str(count))["opened"])


def _look(look: _Look, ours: Gateway) -> None:
    now = {
        "server": ours.server.memory_mb(),
        "worker": ours.worker.memory_mb(),
        "PostgreSQL, not shared": anonymous_mb(ours.family.postgres_pid()),
    }
    for name, value in now.items():
        look.memory.setdefault(name, []).append(value)
    [found] = ours.family.sql(
        """SELECT sum(n_dead_tup)::float8 AS dead, sum(pg_total_relation_size(relid) / 8192)::float8
           AS pages FROM pg_stat_user_tables WHERE relname = ANY ($1)""",
        list(QUEUES),
    )
    look.dead.append(found["dead"])
    look.pages.append(found["pages"])


def _thirds(values: list[float]) -> tuple[float, float]:
    """The medians of the second and of the last third."""
    third = len(values) // 3
    return statistics.median(values[third : 2 * third]), statistics.median(values[2 * third :])
