"""What watchers cost who only wait: memory, everybody else's Enqueue, and nothing once they left.

- Growth of the server's memory (PSS) from 0 to 1,000 idle streams of one message each, against
  the same of a bare server whose streams wait for nothing. Each round takes new processes; some
  streams are opened and closed before the first look, so that what comes once is not counted.
- The rate of Enqueue with 200 such watchers, against the same server's without. None of what is
  enqueued is for them, which is what a busy server's watchers mostly see.
- 10,000 streams opened and cancelled, every other hundred before it was answered. A server that
  forgets to count one down would in the end refuse streams, so it is set to allow 1,000, and must
  afterwards hold exactly so many and refuse the next.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Iterator

from bench.family import Family, beside, calls, generate
from bench.memory import pss_mb
from bench.row import Measured

ROUNDS = 3
STREAMS = 1000
RATE_ROUNDS = 5
SECONDS = 4.0
CONCURRENCY = 256
WATCHERS = 200
WARM = 20_000
CHURNED = 10_000
LEAK_MB = 2.0
_SETTLE_S = 2.0


def run(family: Family) -> list[Measured]:
    return [_memory(family), _enqueue(family), _churn(family)]


def _memory(family: Family) -> Measured:
    row = Measured(
        f"memory from 0 to {STREAMS:,} idle watchers",
        "the same of a bare grpc.aio server",
        unit=" MB",
        at_most=1.5,
    )
    for _ in range(ROUNDS):
        with _bare() as (address, pid):
            row.theirs.append(_growth(address, pid, row))
        with family.running("serve") as server:
            row.ours.append(_growth(server.address, server.process.pid, row))
    row.facts = {
        "a stream": f"{min(row.ours) / STREAMS * 1024:.0f} to {max(row.ours) / STREAMS * 1024:.0f}"
        f" kB, bare {min(row.theirs) / STREAMS * 1024:.0f} to"
        f" {max(row.theirs) / STREAMS * 1024:.0f} kB"
    }
    return row


def _growth(address: str, pid: int, row: Measured) -> float:
    with _watching(address, 20, row):
        pass
    time.sleep(_SETTLE_S)
    before = pss_mb(pid)
    with _watching(address, STREAMS, row):
        time.sleep(_SETTLE_S)
        return pss_mb(pid) - before


def _enqueue(family: Family) -> Measured:
    row = Measured(
        f"Enqueue with {WATCHERS} watchers of one message",
        "the same without",
        at_least=0.9,
        against_itself=True,
    )
    with_one: list[float] = []
    said = 0
    before = family.stored()
    with family.running("serve") as server:
        said += calls(server.address, seconds=1.5, concurrency=CONCURRENCY)["messages"]
        for _ in range(RATE_ROUNDS):
            alone = calls(server.address, seconds=SECONDS, concurrency=CONCURRENCY)
            with _watching(server.address, 1, row):
                one = calls(server.address, seconds=SECONDS, concurrency=CONCURRENCY)
            with _watching(server.address, WATCHERS, row):
                many = calls(server.address, seconds=SECONDS, concurrency=CONCURRENCY)
            row.theirs.append(alone["rate"])
            row.ours.append(many["rate"])
            with_one.append(one["rate"])
            said += alone["messages"] + one["messages"] + many["messages"]
    row.check("books", acknowledged=said, rows=family.stored() - before)
    row.facts = {
        "with one watcher": f"{statistics.median(with_one):,.0f}/s",
        "acknowledged = rows": f"{said:,}",
    }
    return row


def _churn(family: Family) -> Measured:
    row = Measured(f"{CHURNED:,} watchers that come and go")
    with family.running("serve", MAILGRPC_MAX_STREAMS=str(STREAMS)) as server:
        _come_and_go(server.address, WARM, row)
        before = server.memory_mb()
        took_s = _come_and_go(server.address, CHURNED, row)
        after = server.memory_mb()
        with (
            _watching(server.address, STREAMS, row),
            beside("bench.load.idle", server.address, "hold", "1") as one_more,
        ):
            refused = _open(one_more) == 0
    row.limit(f"they leave at most {LEAK_MB:g} MB", after - before <= LEAK_MB)
    row.limit("afterwards there is room for as many as before, and for no more", refused)
    row.facts = {
        "memory before and after": f"{before:.1f} MB, {after:.1f} MB",
        "opened and cancelled": f"{CHURNED / took_s:,.0f}/s",
    }
    return row


def _come_and_go(address: str, count: int, row: Measured) -> float:
    """Open and cancel so many; in how many seconds."""
    began = time.monotonic()
    found = generate("bench.load.idle", address, "churn", str(count))
    took_s = time.monotonic() - began
    row.check("come and gone", wanted=count, opened=found["opened"])
    row.check("let in", refused=found["refused"], none=0)
    time.sleep(_SETTLE_S)
    return took_s


@contextlib.contextmanager
def _bare() -> Iterator[tuple[str, int]]:
    with beside("bench.counterparts.bare_stream") as process:
        yield f"127.0.0.1:{process.stdout.readline().strip()}", process.pid


@contextlib.contextmanager
def _watching(address: str, count: int, row: Measured) -> Iterator[None]:
    with beside("bench.load.idle", address, "hold", str(count)) as streams:
        row.check("streams", wanted=count, opened=_open(streams))
        yield
        streams.communicate(timeout=30)  # the end of its input: it cancels them


def _open(streams: subprocess.Popen[str]) -> int:
    return int(streams.stdout.readline().removeprefix("open"))
