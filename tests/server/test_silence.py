"""A store that says nothing any more: no reset, no refusal. Nobody waits for it for long."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
import sqlalchemy as sa

from mailgrpc.config import Settings
from mailgrpc.db.engine import Database
from mailgrpc.errors import StoreUnavailable
from mailgrpc.server import app as app_module
from mailgrpc.server import intake as intake_module
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.failover.programs import running
from tests.feed.reading import Stream, all_after, faults, table, watching
from tests.feed.writing import enqueue as write_messages
from tests.feed.writing import message
from tests.gateway import PATIENCE_S, Gateway, enqueue, until
from tests.server.proxy import LossyProxy

IMPATIENT_S = 0.4


@pytest.fixture
async def proxy(database_url: str) -> AsyncIterator[LossyProxy]:
    async with LossyProxy(database_url) as running_proxy:
        yield running_proxy


@pytest.fixture
async def proxied(
    proxy: LossyProxy, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Gateway]:
    """A server behind the proxy that holds silence for absence sooner than it would in the field."""
    monkeypatch.setattr(app_module, "FEED_S", IMPATIENT_S)
    monkeypatch.setattr(app_module, "LOOK_UP_S", IMPATIENT_S)
    monkeypatch.setattr(intake_module, "FLUSH_TIMEOUT_S", IMPATIENT_S)
    async with Gateway(replace(settings, database_url=proxy.url), worker=False) as server:
        yield server


async def acknowledged(gateway: Gateway, request_id: str) -> None:
    """Enqueue as a caller does who does not give up."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await gateway.stub.Enqueue(enqueue(request_id=request_id), timeout=3)
                return
            await asyncio.sleep(0.05)


def one_second() -> pb.WatchStatusRequest:
    request = pb.WatchStatusRequest()
    request.heartbeat.FromSeconds(1)
    return request


async def test_a_stream_lives_through_silence_and_its_heartbeats_go_on(
    proxy: LossyProxy, proxied: Gateway, db: Database
) -> None:
    async with watching(proxied.stub, heartbeat=one_second().heartbeat) as stream:
        await acknowledged(proxied, "before")
        await stream.until_events(1)
        proxy.is_silent = True
        await until(lambda: proxy.swallowed > 0)
        for _ in range(2):
            heartbeat = await stream.read(within_s=2.5)
            assert not heartbeat.events
            assert heartbeat.resume_token
        proxy.is_silent = False
        await acknowledged(proxied, "after")
        await stream.until_events(2)
        assert faults(stream.events, await table(db)) == []
        assert await all_after(proxied.stub, stream.token) == []


async def test_a_stream_that_reads_the_table_waits_for_a_silent_store(
    proxy: LossyProxy, proxied: Gateway, db: Database
) -> None:
    """It has a long way to go; tokens given meanwhile lose nothing of what was not told."""
    async with watching(proxied.stub) as first:
        begin = first.token
    await write_messages(db, *(message(custom_args={"n": "x" * 250}) for _ in range(4000)))
    request = {"resume_token": begin, "heartbeat": one_second().heartbeat}
    stream = Stream(proxied.stub, **request)
    with contextlib.ExitStack() as stack:
        stack.callback(stream.call.cancel)
        await stream.read()
        proxy.is_silent = True
        seen = -1
        while seen < len(stream.events) or proxy.swallowed == 0:
            seen = len(stream.events)
            await stream.read(within_s=2.5)
        assert seen < 4000
        token = stream.token
        proxy.is_silent = False
        happened = await table(db)
        rest = await all_after(proxied.stub, token)
        assert faults(stream.events + rest, happened) == []
        await stream.until_events(4000)
        assert faults(stream.events, happened) == []


@pytest.fixture
async def four(proxy: LossyProxy) -> AsyncIterator[Database]:
    """A pool with four connections that lie idle."""
    database = Database(proxy.url, pool_size=4)
    await asyncio.gather(*(database.fetch("SELECT pg_sleep(0.1)") for _ in range(4)))
    yield database
    await database.close()


async def test_one_time_out_is_the_last_for_all_that_lies_idle(
    proxy: LossyProxy, four: Database
) -> None:
    impatient = four.with_patience(IMPATIENT_S)
    proxy.is_silent = True
    with pytest.raises(StoreUnavailable):
        await impatient.fetch("SELECT 1")
    proxy.is_silent = False
    for _ in range(4):  # each on what was silent, were that still there
        assert await impatient.fetch("SELECT 1")


async def test_a_composed_query_has_patience_too(proxy: LossyProxy, four: Database) -> None:
    began_at = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await four.with_patience(IMPATIENT_S).select(sa.select(sa.func.pg_sleep(20)))
    assert time.monotonic() - began_at < 3
    [(one,)] = await four.select(sa.select(sa.literal(1)))
    assert one == 1


async def test_closing_takes_seconds_whatever_the_store_does(
    proxy: LossyProxy, four: Database
) -> None:
    proxy.is_silent = True
    call = asyncio.ensure_future(four.fetch("SELECT 1"))
    await until(lambda: proxy.swallowed > 0)
    began_at = time.monotonic()
    await four.close()
    assert time.monotonic() - began_at < 5
    with pytest.raises(StoreUnavailable):
        await call


async def test_a_silent_host_of_a_url_does_not_hide_the_next(database_url: str) -> None:
    async with LossyProxy(database_url) as dead, LossyProxy(database_url) as alive:
        dead.is_silent = True
        one, other = urlsplit(dead.url), urlsplit(alive.url)
        hosts = f"{one.netloc},{other.netloc.rpartition('@')[2]}"
        database = Database(f"postgresql://{hosts}{one.path}?sslmode=disable", pool_size=2)
        began_at = time.monotonic()
        assert await database.fetch("SELECT 1")
        assert time.monotonic() - began_at < 4
        began_at = time.monotonic()  # who answered is asked first from now on
        await asyncio.gather(*(database.fetch("SELECT pg_sleep(0.1)") for _ in range(2)))
        assert time.monotonic() - began_at < 2
        await database.close()


async def test_stop_keeps_to_its_grace_while_the_store_is_silent(
    proxy: LossyProxy, proxied: Gateway
) -> None:
    async with watching(proxied.stub):
        proxy.is_silent = True
        call = asyncio.ensure_future(proxied.stub.Enqueue(enqueue(request_id="r")))
        await until(lambda: proxy.swallowed > 0)
        began_at = time.monotonic()
        await proxied.server.stop(1.0)
        assert time.monotonic() - began_at < 2.5
        with pytest.raises(grpc.aio.AioRpcError):
            await call


async def test_a_process_ends_well_while_the_store_is_silent(
    proxy: LossyProxy, settings: Settings, tmp_path: Path
) -> None:
    env = {
        "MAILGRPC_DATABASE_URL": proxy.url,
        "MAILGRPC_REDIS_URL": settings.redis_url or "",
        "MAILGRPC_CHANNEL_URL": "capture:",
        "MAILGRPC_GRACE_S": "1",
    }
    command = ("serve", "--listen", "127.0.0.1:0")
    async with running(tmp_path / "log", *command, **env) as program:
        await program.says("serving on")
        proxy.is_silent = True
        await until(lambda: proxy.swallowed > 0)
        began_at = time.monotonic()
    assert time.monotonic() - began_at < 7
