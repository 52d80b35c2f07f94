"""`mailgrpc work` and arq's own command, as processes that are told to stop, or killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from mailgrpc.config import Settings
from mailgrpc.core.delivery import Mode, State
from mailgrpc.db.engine import Database
from mailgrpc.db.workers import read_sessions
from tests.gateway import PATIENCE_S
from tests.worker.rig import Clock, Part, Store, outlive_lease

WORK = ("mailgrpc", "work")
ARQ = ("arq", "mailgrpc.worker.main.WorkerSettings")
Process = asyncio.subprocess.Process


@asynccontextmanager
async def running(settings: Settings, *module: str, **env: str) -> AsyncIterator[Process]:
    """`python -m module…` with these settings; killed if it is still there in the end."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MAILGRPC_")}
    environ |= {
        "MAILGRPC_DATABASE_URL": settings.database_url or "",
        "MAILGRPC_REDIS_URL": settings.redis_url or "",
        "MAILGRPC_CHANNEL_URL": "capture:",
        **env,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", *module, env=environ, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _seen(ask: Callable[[], Awaitable[object]], wanted: object) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await ask() != wanted:
            await asyncio.sleep(0.02)


async def _terminated(process: Process, within_s: float) -> str:
    """SIGTERM ends it with 0 in time; what it said."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 0, said.decode()
    assert time.monotonic() - began < within_s
    return said.decode()


@pytest.mark.parametrize(
    ("mode", "becomes"),
    [(Mode.SEND_ONCE, State.OUTCOME_UNKNOWN), (Mode.RETRYING, State.DEFERRED)],
)
async def test_a_worker_killed_while_it_sends_leaves_nothing_in_sending(
    settings: Settings, db: Database, store: Store, clock: Clock, mode: Mode, becomes: State
) -> None:
    message = await store.put(mode=mode)
    hangs = "capture:?latency=600"
    async with running(settings, *WORK, MAILGRPC_CHANNEL_URL=hangs) as process:
        await _seen(lambda: store.state(message), State.SENDING)
        process.kill()
        await process.wait()
    assert await store.state(message) is State.SENDING

    async with Part(db, clock) as other:
        await outlive_lease(other.reaper, clock)
    delivery = await store.delivery(message)
    assert delivery.state is becomes
    assert delivery.possibly_sent


async def test_sigterm_records_what_is_in_flight_and_gives_back_the_rest(
    settings: Settings, db: Database, store: Store
) -> None:
    await store.put_many([["a@example.com"]] * 4, mode=Mode.SEND_ONCE)
    in_state = "SELECT count(*) FROM deliveries WHERE state = $1"
    env = {"MAILGRPC_CHANNEL_URL": "capture:?latency=1", "MAILGRPC_SEND_CONCURRENCY": "1"}
    async with running(settings, *WORK, **env) as process:
        await _seen(lambda: store.value(in_state, State.SENDING), 1)
        await _terminated(process, within_s=5)
    assert await store.value(in_state, State.SENDING) == 0
    assert await store.value(in_state, State.SENT) >= 1
    waiting = await db.fetch("SELECT session_id, claims FROM due")
    assert waiting
    assert {tuple(row) for row in waiting} == {(None, 0)}
    assert await read_sessions(db) == []


async def test_sigterm_ends_within_the_grace_time_when_a_send_does_not(
    settings: Settings, db: Database, store: Store, clock: Clock
) -> None:
    message = await store.put(mode=Mode.SEND_ONCE)
    env = {"MAILGRPC_CHANNEL_URL": "capture:?latency=600", "MAILGRPC_GRACE_S": "0.5"}
    async with running(settings, *WORK, **env) as process:
        await _seen(lambda: store.state(message), State.SENDING)
        await _terminated(process, within_s=5)
    async with Part(db, clock) as other:
        await other.reaper.reap()  # the session has ended: nobody waits for a lease
    assert await store.state(message) is State.OUTCOME_UNKNOWN


async def test_arqs_own_command_delivers_and_ends_in_time(
    settings: Settings, db: Database, store: Store
) -> None:
    message = await store.put()
    async with running(settings, *ARQ) as process:
        await _seen(lambda: store.state(message), State.SENT)
        await _terminated(process, within_s=5)
    assert await read_sessions(db) == []


async def test_burst_sends_what_is_due_and_exits(
    settings: Settings, db: Database, store: Store
) -> None:
    now = await store.put("temperror@example.test", "a@example.com")
    overdue = await store.put("b@example.com")
    await db.write(
        """WITH d AS (DELETE FROM due WHERE delivery_id >= $1 RETURNING *)
           INSERT INTO scheduled SELECT delivery_id, channel, project_id, priority, due_at FROM d""",
        overdue,
    )
    async with running(settings, *WORK, "--burst") as process:
        await asyncio.wait_for(process.wait(), PATIENCE_S)
        assert process.returncode == 0
    assert await store.state(now, 1) is State.DEFERRED
    assert await store.state(now, 2) is State.SENT
    assert await store.state(overdue) is State.SENT
    assert await read_sessions(db) == []
