"""Redis is a hint: what happens with it, without it, and when it comes back."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from arq.worker import create_worker
from redis.asyncio import Redis

from mailgrpc.config import Settings
from mailgrpc.core.delivery import State
from mailgrpc.db.engine import Database
from mailgrpc.doorbell import QUEUE, Doorbell
from mailgrpc.embedded.valkey import EmbeddedValkey
from mailgrpc.providers.capture import CaptureProvider
from mailgrpc.worker import main
from mailgrpc.worker.credits import Credits
from mailgrpc.worker.runtime import Worker
from tests.gateway import PATIENCE_S, until
from tests.worker.rig import Store


class Wakes:
    """A worker, as far as arq's job sees it."""

    def __init__(self) -> None:
        self.count = 0

    def wake(self) -> None:
        self.count += 1


@pytest.fixture
def own_valkey() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey() as server:
        yield server


def _kill(server: EmbeddedValkey) -> None:
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGKILL)
    assert server.process.ended.wait(PATIENCE_S)


@pytest.mark.parametrize("redis_url", [None, "redis://127.0.0.1:1", "unix:///nowhere.sock"])
async def test_without_redis_mail_leaves_within_two_seconds(
    settings: Settings, db: Database, store: Store, redis_url: str | None
) -> None:
    capture = CaptureProvider()
    worker = Worker(replace(settings, redis_url=redis_url), db, channels={"default": capture})
    await worker.start()
    arq = asyncio.create_task(main.keep_arq_running(redis_url, worker)) if redis_url else None
    try:
        for n in range(2):
            began = time.monotonic()
            await store.put()
            await until(lambda: len(capture.outbox) > n)  # noqa: B023  awaited here
            assert time.monotonic() - began < 2
    finally:
        if arq is not None:
            arq.cancel()
            await asyncio.gather(arq, return_exceptions=True)
        await worker.stop()


async def test_with_redis_mail_leaves_at_once(
    settings: Settings, db: Database, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailgrpc.worker.sweep.SWEEP_EVERY_S", 60.0)
    capture = CaptureProvider()
    worker = Worker(settings, db, channels={"default": capture})
    bell = Doorbell(settings.redis_url)
    await worker.start()
    try:
        for n in range(3):
            await store.put()
            bell.ring()
            await until(lambda: len(capture.outbox) > n)  # noqa: B023  awaited here
    finally:
        await bell.close()
        await worker.stop()


async def test_credits_are_looked_after_once_some_are_given(
    settings: Settings, db: Database, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle worker does not wake up for them, nor does it sleep through the first."""
    monkeypatch.setattr("mailgrpc.worker.runtime.LOOK_S", 0.0)
    monkeypatch.setattr("mailgrpc.worker.runtime._IDLE_LOOK_S", 3600.0)
    looks = []
    look = Credits.look
    monkeypatch.setattr(Credits, "look", lambda self: (looks.append(self.are_open), look(self)))
    capture = CaptureProvider()
    worker = Worker(settings, db, channels={"default": capture})
    await worker.start()
    try:
        for _ in range(20):
            await asyncio.sleep(0)
        assert not looks
        await store.put()
        worker.wake()
        await until(lambda: any(looks))
    finally:
        await worker.stop()


async def test_the_doorbell_and_arq_recover_when_redis_is_back(
    own_valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mailgrpc.worker.main._RESTART_S", 0.01)
    monkeypatch.setattr("mailgrpc.worker.main._RESTART_MAX_S", 0.1)
    monkeypatch.setattr("mailgrpc.worker.main._POLL_S", 0.02)
    monkeypatch.setattr("mailgrpc.doorbell._RECONNECT_S", 0.02)
    monkeypatch.setattr("mailgrpc.doorbell._JOB_EVERY_S", 0.0)
    caller, listener, wakes = Doorbell(own_valkey.url), Doorbell(own_valkey.url), Wakes()
    arq = asyncio.create_task(main.keep_arq_running(own_valkey.url, wakes))  # type: ignore[arg-type]
    try:
        await _rung(caller, listener, wakes)
        await asyncio.to_thread(_kill, own_valkey)
        for _ in range(5):
            caller.ring()
            assert not await listener.heard_ring(1)
        await asyncio.to_thread(own_valkey.start)
        await _rung(caller, listener, wakes)
        told = [r for r in caplog.records if "redis does not ring" in r.message]
        assert len(told) <= 2  # once by each end
    finally:
        arq.cancel()
        await asyncio.gather(arq, return_exceptions=True)
        await caller.close()
        await listener.close()


async def _rung(caller: Doorbell, listener: Doorbell, wakes: Wakes) -> None:
    """A ring is heard on both ways."""
    before, heard = wakes.count, False
    async with asyncio.timeout(PATIENCE_S):
        while not heard or wakes.count == before:
            caller.ring()
            heard = await listener.heard_ring(1) or heard


async def test_a_ring_for_later_is_one_job_a_second_and_none_for_what_is_far(
    own_valkey: EmbeddedValkey,
) -> None:
    bell = Doorbell(own_valkey.url)
    redis = Redis.from_url(own_valkey.url)
    soon = datetime.now(UTC).replace(microsecond=0) + timedelta(minutes=2)
    for second in range(10):
        bell.ring_at(soon + timedelta(milliseconds=50 * second))
    bell.ring_at(soon + timedelta(hours=1))
    await bell.close()
    assert await redis.zcard(QUEUE) == 1
    await redis.aclose()


async def test_no_more_jobs_are_sent_while_nobody_takes_them(
    own_valkey: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mailgrpc.doorbell._JOB_EVERY_S", 0.0)
    bell, redis = Doorbell(own_valkey.url), Redis.from_url(own_valkey.url)
    later = datetime.now(UTC) + timedelta(minutes=2)
    for second in range(30):  # these nobody can take yet
        bell.ring_at(later + timedelta(seconds=second))
    for _ in range(40):
        bell.ring()
        await until(lambda: bell._ringing is None or bell._ringing.done())
    await bell.close()
    assert await redis.zcount(QUEUE, "-inf", time.time() * 1000) == 17
    assert await redis.zcard(QUEUE) == 47
    await redis.aclose()


async def test_what_lies_in_redis_is_no_pickle(own_valkey: EmbeddedValkey) -> None:
    bell = Doorbell(own_valkey.url)
    bell.ring()
    await bell.close()
    redis = Redis.from_url(own_valkey.url)
    [key] = await redis.keys("arq:job:*")
    with pytest.raises(Exception):  # noqa: B017  whatever pickle says to it
        pickle.loads(await redis.get(key))
    await redis.aclose()


@pytest.fixture
def worker_settings(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("database_url", "redis_url"):
        monkeypatch.setenv(f"MAILGRPC_{name.upper()}", getattr(settings, name))
    monkeypatch.setenv("MAILGRPC_CHANNEL_URL", "capture:")
    return main.WorkerSettings


async def test_arqs_own_worker_delivers(worker_settings: Any, redis_url: str, store: Store) -> None:
    arq = create_worker(worker_settings, handle_signals=False)
    running = asyncio.create_task(arq.async_run())
    try:
        message = await store.put()
        async with asyncio.timeout(PATIENCE_S):
            while await store.state(message) is not State.SENT:
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        # A job that was cancelled with it would cancel arq's own closing, and us.
        await asyncio.gather(*arq.tasks.values(), return_exceptions=True)
        arq.tasks.clear()
        await arq.close()
    assert await store.value("SELECT count(*) FROM workers WHERE reaped_at IS NULL") == 0


async def test_arqs_job_carries_nothing_and_leaves_no_result(
    worker_settings: Any, redis_url: str
) -> None:
    bell = Doorbell(redis_url)
    bell.ring()
    await bell.close()
    arq = create_worker(worker_settings, burst=True, handle_signals=False)
    await arq.async_run()
    await arq.close()
    assert arq.jobs_complete >= 1
    assert arq.jobs_failed == 0
    redis = Redis.from_url(redis_url)
    assert await redis.keys("arq:result:*") == []
    assert await redis.zcard(QUEUE) == 0
    await redis.aclose()
