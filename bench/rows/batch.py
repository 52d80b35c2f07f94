"""EnqueueBatch of 100, against the same rows put into the same tables by asyncpg."""

from __future__ import annotations

import asyncio
import statistics

from bench.counterparts.raw_inserts import batches_a_second
from bench.family import Family, batches
from bench.row import Measured

ROUNDS = 5
SECONDS = 4.0
SIZE = 100


def run(family: Family) -> list[Measured]:
    row = Measured(
        "EnqueueBatch of 100", "the same rows by asyncpg from ready arrays", at_least=0.5
    )
    cpu, pg_cpu = [], []
    said = 0
    with family.running("serve") as server:
        before = family.stored()
        said += batches(server.address, seconds=1.5, concurrency=8, size=SIZE)["messages"]
        raw = 0
        for _ in range(ROUNDS):
            held = family.stored()
            row.theirs.append(
                asyncio.run(batches_a_second(family.url, size=SIZE, seconds=SECONDS, connections=4))
            )
            raw += family.stored() - held
            used, pg_used = server.cpu_s(), family.postgres_cpu_s()
            found = batches(server.address, seconds=SECONDS, concurrency=8, size=SIZE)
            said += found["messages"]
            row.ours.append(found["rate"])
            cpu.append((server.cpu_s() - used) / found["messages"] * 1e6)
            pg_cpu.append((family.postgres_cpu_s() - pg_used) / found["messages"] * 1e6)
        row.check("books", acknowledged=said, rows=family.stored() - before - raw)
    row.facts = {
        "server's processor time a message": f"{statistics.median(cpu):.0f} µs",
        "PostgreSQL's processor time a message": f"{statistics.median(pg_cpu):.0f} µs",
        "acknowledged = rows": f"{said:,}",
    }
    return [row]
