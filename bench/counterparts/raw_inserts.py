"""The rows of a message put into the same tables by asyncpg, from arrays that are ready.

One transaction a batch, a statement a table, nothing decided and nothing checked. Also the single
row: one durable INSERT a message, from as many connections as callers would be.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from datetime import UTC, datetime, timedelta

import asyncpg

from mailgrpc.core.ids import delivery_id, new_message_id

_STATEMENTS = (
    """INSERT INTO request_ids (project_id, request_id, kind, message_id, fingerprint, rule,
           created_at)
       SELECT 1, r, 1, m, f, 1, now() FROM unnest($1::text[], $2::uuid[], $3::bytea[]) u(r, m, f)""",
    """INSERT INTO messages (id, project_id, created_at, request_id, correlation_id, subject, tags,
           custom_args, options, flags, content)
       SELECT m, 1, now(), r, '', 'Your receipt', '[]', a, '{}', 0, c
       FROM unnest($1::uuid[], $2::text[], $3::jsonb[], $4::bytea[]) u(m, r, a, c)""",
    """INSERT INTO deliveries (id, project_id, recipient, role, channel, priority, mode, flags,
           state, state_since, version, wait_reason, due_at, expire_at)
       SELECT d, 1, r, 1, 'default', 20, 1, 0, 1, now(), 1, 1, now(), now() + interval '5 days'
       FROM unnest($1::uuid[], $2::text[]) u(d, r)""",
    """INSERT INTO due (delivery_id, channel, project_id, priority, due_at)
       SELECT d, 'default', 1, 20, now() FROM unnest($1::uuid[]) u(d)""",
    """INSERT INTO events (lane, seq, project_id, kind, occurred_at, message_id, delivery_id,
           recipient, role, old_state, state, version, wait_reason, due_at, possibly_sent,
           suppression_reason, attempt_count, channel)
       SELECT 0, nextval('feed_seq'), 1, 16, now(), m, d, r, 1, 0, 1, 1, 1, now(), false, 0, 0,
           'default'
       FROM unnest($1::uuid[], $2::uuid[], $3::text[]) u(m, d, r)""",
)


class Batch:
    """Arrays of `size` messages to one recipient each, made beforehand."""

    def __init__(self, size: int) -> None:
        self.messages = [new_message_id() for _ in range(size)]
        self.deliveries = [delivery_id(m, 1) for m in self.messages]
        self.requests = [str(uuid.uuid4()) for _ in range(size)]
        self.prints = [os.urandom(32) for _ in range(size)]
        self.recipients = [f"{os.urandom(6).hex()}@example.test" for _ in range(size)]
        self.args = [json.dumps({"order": r}) for r in self.requests]
        self.contents = [os.urandom(300).hex().encode() for _ in range(size)]

    async def insert(self, connection: asyncpg.Connection) -> None:
        columns = (
            (self.requests, self.messages, self.prints),
            (self.messages, self.requests, self.args, self.contents),
            (self.deliveries, self.recipients),
            (self.deliveries,),
            (self.messages, self.deliveries, self.recipients),
        )
        async with connection.transaction():
            for statement, arrays in zip(_STATEMENTS, columns, strict=True):
                await connection.execute(statement, *arrays)


async def batches_a_second(url: str, *, size: int, seconds: float, connections: int) -> float:
    """Messages a second in batches of `size`, over this many connections."""
    opened = [await _connect(url) for _ in range(connections)]
    ready = [[Batch(size) for _ in range(60)] for _ in opened]
    stop_at = time.perf_counter() + seconds
    done = 0

    async def run(connection: asyncpg.Connection, mine: list[Batch]) -> None:
        nonlocal done
        for batch in mine:
            if time.perf_counter() >= stop_at:
                return
            await batch.insert(connection)
            done += size

    began = time.perf_counter()
    await asyncio.gather(*(run(c, r) for c, r in zip(opened, ready, strict=True)))
    took = time.perf_counter() - began
    for connection in opened:
        await connection.close()
    return done / took


async def single_rows_a_second(url: str, *, seconds: float, connections: int) -> float:
    """Durable INSERTs of one row a second, into `messages` alone."""
    opened = [await _connect(url) for _ in range(connections)]
    stop_at = time.perf_counter() + seconds
    done = 0

    async def run(connection: asyncpg.Connection) -> None:
        nonlocal done
        while time.perf_counter() < stop_at:
            await connection.execute(
                "INSERT INTO messages VALUES ($1, 1, $2, '', '', 'x', '[]', '{}', '{}', 0, $3)",
                new_message_id(),
                datetime.now(UTC) - timedelta(days=1),
                b"x" * 600,
            )
            done += 1

    await asyncio.gather(*(run(c) for c in opened))
    for connection in opened:
        await connection.close()
    return done / seconds


async def _connect(url: str) -> asyncpg.Connection:
    return await asyncpg.connect(url, server_settings={"search_path": "mailgrpc", "jit": "off"})
