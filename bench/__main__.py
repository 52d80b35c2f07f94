"""`make bench`: the rows, each interleaved with its counterpart, medians and ratios.

Enqueue is measured with one server process, on one machine that also runs the load and PostgreSQL.
The counterpart runs on the same cores with the same load, so the ratio tells more than the rates.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import grpc

from bench.counterparts.raw_inserts import batches_a_second, single_rows_a_second
from bench.family import Family, bare_server, family, load
from bench.load import request
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import mail_service_pb2_grpc

ROUNDS = 3
SECONDS = 4.0
CONCURRENCY = 128
RESULTS = Path(__file__).parent / "results" / "latest.json"


def fdatasync_us() -> float:
    """The machine's own latency of making 8 KiB durable, median, in microseconds."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
        times = []
        for _ in range(200):
            os.pwrite(file.fileno(), os.urandom(8192), 0)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def bench_enqueue(stores: Family) -> dict:
    """One message a call: durable and idempotent, against a bare server."""
    ours, bare, cpu = [], [], []
    stored = _stored(stores)
    with stores.running("serve") as server, bare_server() as bare_target:
        load(bare_target, "Enqueue", seconds=1, concurrency=CONCURRENCY)
        warm = load(server.address, "Enqueue", seconds=1, concurrency=CONCURRENCY)
        for _ in range(ROUNDS):
            bare.append(load(bare_target, "Enqueue", seconds=SECONDS, concurrency=CONCURRENCY))
            before = server.cpu_s()
            ours.append(load(server.address, "Enqueue", seconds=SECONDS, concurrency=CONCURRENCY))
            cpu.append((server.cpu_s() - before) / ours[-1]["messages"] * 1e6)
    stored = _stored(stores) - stored
    said = sum(run["messages"] for run in [warm, *ours])
    if stored != said:
        raise SystemExit(f"void: {said} acknowledged, {stored} rows")
    rate, against = _median(ours, "rate"), _median(bare, "rate")
    single = asyncio.run(single_rows_a_second(stores.url, seconds=SECONDS, connections=32))
    return {
        "Enqueue, one a call": f"{rate:,.0f}/s",
        "bare grpc.aio server": f"{against:,.0f}/s",
        "ratio": f"{rate / against:.2f}  (wanted: 0.70)",
        "raw single-row durable inserts": f"{single:,.0f}/s",
        "ratio to these": f"{rate / single:.2f}",
        "latency p50, p99": f"{_median(ours, 'p50_ms'):.1f}, {_median(ours, 'p99_ms'):.1f} ms",
        "server's processor time a message": f"{statistics.median(cpu):.0f} µs",
        "acknowledged = rows": f"{stored:,}",
    }


def bench_batch(stores: Family) -> dict:
    """EnqueueBatch of 100, against the same rows by asyncpg from ready arrays."""
    ours, raw = [], []
    with stores.running("serve") as server:
        load(server.address, "EnqueueBatch", seconds=1, concurrency=8, batch=100)
        for _ in range(ROUNDS):
            raw.append(
                asyncio.run(batches_a_second(stores.url, size=100, seconds=SECONDS, connections=4))
            )
            ours.append(
                load(server.address, "EnqueueBatch", seconds=SECONDS, concurrency=8, batch=100)
            )
    rate, against = _median(ours, "rate"), statistics.median(raw)
    return {
        "EnqueueBatch of 100": f"{rate:,.0f}/s",
        "raw inserts of the same rows": f"{against:,.0f}/s",
        "ratio": f"{rate / against:.2f}  (wanted: 0.50)",
    }


def bench_pickup(stores: Family) -> dict:
    """From the acknowledgement of Enqueue to the start of its send, one mail at a time."""
    with stores.running("serve") as server, stores.running("work"):
        _drained(stores)
        waits = asyncio.run(_pickups(server.address, 200))
    waits.sort()
    return {
        "acknowledged → started, p50": f"{waits[len(waits) // 2] * 1e3:.1f} ms",
        "acknowledged → started, p99": f"{waits[int(len(waits) * 0.99)] * 1e3:.1f} ms",
    }


async def _pickups(target: str, count: int) -> list[float]:
    waits = []
    async with grpc.aio.insecure_channel(target) as channel:
        stub = mail_service_pb2_grpc.MailServiceStub(channel)
        for _ in range(count):
            answer = await stub.Enqueue(request())
            acknowledged = time.time()
            while True:
                found = await stub.GetMessage(pb.GetMessageRequest(message_id=answer.message_id))
                if found.attempts:
                    break
            started = found.attempts[0].started_at
            waits.append(max(0.0, started.seconds + started.nanos / 1e9 - acknowledged))
    return waits


def bench_idle(stores: Family) -> dict:
    """What `serve` and `work` use while nothing happens."""
    with stores.running("serve") as server, stores.running("work") as worker:
        _drained(stores)
        before = (server.cpu_s(), worker.cpu_s())
        seconds = 20.0
        time.sleep(seconds)
        used = (server.cpu_s() - before[0], worker.cpu_s() - before[1])
    return {
        "serve, idle": f"{used[0] / seconds:.2%} of a core  (wanted: under 1 %)",
        "work, idle": f"{used[1] / seconds:.2%} of a core  (wanted: under 1 %)",
    }


def _drained(stores: Family) -> None:
    async def wait() -> None:
        connection = await asyncpg.connect(stores.url)
        await connection.execute("TRUNCATE mailgrpc.due")  # what the other rows left behind
        await connection.close()

    asyncio.run(wait())


def _stored(stores: Family) -> int:
    async def count() -> int:
        connection = await asyncpg.connect(stores.url)
        found = await connection.fetchval("SELECT count(*) FROM mailgrpc.messages")
        await connection.close()
        return int(found)

    return asyncio.run(count())


def _median(runs: list[dict], field: str) -> float:
    return statistics.median(run[field] for run in runs)


ROWS: dict[str, Callable[[Family], dict]] = {
    "enqueue": bench_enqueue,
    "batch": bench_batch,
    "pickup": bench_pickup,
    "idle": bench_idle,
}


def main() -> None:
    wanted = sys.argv[1:] or list(ROWS)
    if unknown := set(wanted) - set(ROWS):
        raise SystemExit(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    print(f"fdatasync of 8 KiB: {fdatasync_us():.0f} µs, {os.cpu_count()} cores\n", flush=True)
    results = {}
    with family() as stores:
        for name in wanted:
            print(f"{name}: {ROWS[name].__doc__}", flush=True)
            results[name] = ROWS[name](stores)
            for label, value in results[name].items():
                print(f"  {label:36} {value}", flush=True)
            print()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2, ensure_ascii=False))


main()
