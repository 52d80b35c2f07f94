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
STREAM_ROUNDS = 20
"""In how many goes the streams are opened, over two thirds of the time."""
GROWTH = 1.05
QUEUES = ("due", "scheduled", "workers")
_LOAD_RUN_S = 30.0
_SAMPLE_EVERY_S = 5.0
_KEPT_UP = 0.9  # of the wanted rate; between two runs the next one's mails are made
_PROBE = 10_000
_POSTGRES = "PostgreSQL, not shared, those processes that lived through both"
_SLACK_MB = 1.0  # a page or two of the allocator; 5 % of the smallest process is 4 MB


@dataclass(slots=True)
class _Samples:
    """What was found, one value a sample."""

    memory: dict[str, list[float]] = field(default_factory=dict)
    postgres: list[dict[int, float]] = field(default_factory=list)  # by process
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
    samples, load, seconds = _Samples(), _Load(ours.server.address, rate), MINUTES * 60
    stored, sent = ours.family.stored(), ours.sent()
    opened = rounds = 0
    load.start()
    began = time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        if rounds < min(STREAM_ROUNDS, passed / (seconds * 2 / 3) * STREAM_ROUNDS):
            opened += _come_and_go(ours.server.address, STREAMS // STREAM_ROUNDS)
            rounds += 1
        _sample(samples, ours)
        time.sleep(_SAMPLE_EVERY_S)
    load.stop()
    ours.settled(load.messages)
    row.check(
        "books",
        acknowledged=load.messages,
        rows=ours.family.stored() - stored,
        SENT=ours.sent() - sent,
    )
    row.limit("the load was kept up", load.messages >= _KEPT_UP * rate * seconds)
    row.check("streams", wanted=STREAMS, opened=opened)
    samples.memory[_POSTGRES] = _of_those_that_lived(samples.postgres)
    for name, values in samples.memory.items():
        second, last = _thirds(values)
        row.facts[f"{name}, second and last third"] = f"{second:.1f} MB, {last:.1f} MB"
        row.limit(f"{name} grows by at most 5 %", last <= max(second * GROWTH, second + _SLACK_MB))
    for name, values in (("dead rows", samples.dead), ("pages", samples.pages)):
        second, last = _thirds(values)
        row.facts[f"{name} of the queue tables, second and last third"] = (
            f"{second:,.0f}, {last:,.0f}"
        )
        # Cleaned now and then: what is found is some part of the way from one time to the next.
        row.limit(f"{name} of the queue tables do not grow", last <= second * 1.1 + 50)
    row.facts["load"] = f"{rate:,.0f}/s, {load.messages:,} messages in all"
    row.facts["Enqueue, the worst p99 of half a minute"] = f"{max(load.p99_ms):.1f} ms"
    row.facts["streams opened and cancelled"] = f"{opened:,}"


class _Load(threading.Thread):
    """An open loop in runs, each a generator of its own, whose mails are made beforehand."""

    def __init__(self, address: str, rate: float) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._rate = rate
        self._ending = threading.Event()
        self._failed: BaseException | None = None
        self.messages = 0
        self.p99_ms: list[float] = []

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                found = calls(self._address, rate=self._rate, seconds=_LOAD_RUN_S)
                self.messages += found["messages"]
                self.p99_ms.append(found["p99_ms"])
        except BaseException as error:  # noqa: BLE001  told by `stop`
            self._failed = error

    def stop(self) -> None:
        """After the run that is under way. Raises what ended it before."""
        self._ending.set()
        self.join()
        if self._failed is not None:
            raise self._failed


def _come_and_go(address: str, count: int) -> int:
    return int(generate("bench.load.idle", address, "churn", str(count))["opened"])


def _sample(samples: _Samples, ours: Gateway) -> None:
    now = {
        "server": ours.server.memory_mb(),
        "worker": ours.worker.memory_mb(),
    }
    samples.postgres.append(anonymous_mb(ours.family.postgres_pid()))
    for name, value in now.items():
        samples.memory.setdefault(name, []).append(value)
    [found] = ours.family.sql(
        """SELECT sum(n_dead_tup)::float8 AS dead, sum(pg_total_relation_size(relid) / 8192)::float8
           AS pages FROM pg_stat_user_tables WHERE relname = ANY ($1)""",
        list(QUEUES),
    )
    samples.dead.append(found["dead"])
    samples.pages.append(found["pages"])


def _of_those_that_lived(samples: list[dict[int, float]]) -> list[float]:
    """The sum over the processes that were there in the second and the last third, sample by sample.

    One more connection is one more process, and not a process that has grown.
    """
    lived = set.intersection(*(set(sample) for sample in samples[len(samples) // 3 :]))
    return [sum(sample.get(pid, 0.0) for pid in lived) for sample in samples]


def _thirds(values: list[float]) -> tuple[float, float]:
    """The medians of the second and of the last third."""
    third = len(values) // 3
    return statistics.median(values[third : 2 * third]), statistics.median(values[2 * third :])
