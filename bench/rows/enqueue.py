"""Enqueue, one message a call, durable and idempotent, one server process.

Against a bare grpc.aio server on uvloop that parses the same request and returns the same response.
"""

from __future__ import annotations

import statistics

from bench.family import Family, bare_server, calls
from bench.row import Measured

ROUNDS = 5
SECONDS = 4.0
CONCURRENCY = 256


def run(family: Family) -> list[Measured]:
    row = Measured(
        "Enqueue, one a call", "a bare grpc.aio server, same request and answer", at_least=0.7
    )
    cpu, pg_cpu, p50, p99, own = [], [], [], [], []
    before = family.stored()
    said = 0
    with family.running("serve") as server, bare_server() as bare:
        for target in (bare, server.address):
            warm = calls(target, seconds=1.5, concurrency=CONCURRENCY)
        said += warm["messages"]
        for _ in range(ROUNDS):
            row.theirs.append(calls(bare, seconds=SECONDS, concurrency=CONCURRENCY)["rate"])
            used, pg_used = server.cpu_s(), family.postgres_cpu_s()
            found = calls(server.address, seconds=SECONDS, concurrency=CONCURRENCY)
            said += found["messages"]
            row.ours.append(found["rate"])
            cpu.append((server.cpu_s() - used) / found["messages"] * 1e6)
            pg_cpu.append((family.postgres_cpu_s() - pg_used) / found["messages"] * 1e6)
            p50.append(found["p50_ms"])
            p99.append(found["p99_ms"])
            own.append(found["generator_cpu"] / found["rate"] * 1e6)
    row.check("books", acknowledged=said, rows=family.stored() - before)
    row.facts = {
        "latency at full load, p50 and p99": (
            f"{statistics.median(p50):.1f} ms, {statistics.median(p99):.1f} ms"
        ),
        "server's processor time a message": f"{statistics.median(cpu):.0f} µs",
        "PostgreSQL's processor time a message": f"{statistics.median(pg_cpu):.0f} µs",
        "generator's processor time a call": f"{statistics.median(own):.0f} µs",
        "acknowledged = rows": f"{said:,}",
    }
    return [row]
