"""A reader that stops reading costs nobody memory, and loses nothing when it reads on."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mailgrpc.config import Settings
from mailgrpc.db.engine import Database
from mailgrpc.server import ring
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import mail_service_pb2_grpc
from tests.feed.reading import Stream, faults, feed_of, nudge, table, watching
from tests.feed.writing import enqueue, message
from tests.gateway import PATIENCE_S, Gateway, until

HUNDRED = [f"reader{n}@example.test" for n in range(100)]
LARGE = {f"note{n}": "x" * 250 for n in range(8)}
ALLOWED_GROWTH = 48 * 1024 * 1024


class ServerProcess:
    """`mailgrpc serve` as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, target: str) -> None:
        self._process = process
        self.channel = grpc.aio.insecure_channel(target)
        self.stub: Any = mail_service_pb2_grpc.MailServiceStub(self.channel)

    @property
    def memory(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
async def server_process(settings: Settings) -> AsyncIterator[ServerProcess]:
    read_end, write_end = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "mailgrpc",
        "serve",
        env={
            **os.environ,
            "MAILGRPC_LISTEN": "127.0.0.1:0",
            "MAILGRPC_DATABASE_URL": settings.database_url or "",
            "MAILGRPC_REDIS_URL": settings.redis_url or "",
            "MAILGRPC_CHANNEL_URL": "capture:",
            "MAILGRPC_READY_FD": str(write_end),
        },
        pass_fds=[write_end],
        stderr=asyncio.subprocess.DEVNULL,
    )
    os.close(write_end)
    with os.fdopen(read_end) as ready:
        target = (await asyncio.to_thread(ready.readline)).removeprefix("ready ")
    server = ServerProcess(process, target.strip())
    yield server
    await server.channel.close()
    process.terminate()
    await asyncio.wait_for(process.wait(), PATIENCE_S)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
async def test_a_reader_that_stops_does_not_grow_the_server_and_loses_nothing(
    server_process: ServerProcess, db: Database
) -> None:
    labels = {"custom_args": {"order": "x" * 200}}
    async with (
        watching(server_process.stub) as stopped,
        watching(server_process.stub) as live,
    ):
        # The ring is full and everything has been used once.
        await enqueue(db, *(message(*HUNDRED, **labels) for _ in range(100)))
        await live.until_events(10_000)
        before = server_process.memory

        for _ in range(4):
            await enqueue(db, *(message(*HUNDRED, **labels) for _ in range(50)))
            await live.until_events(len(live.events) // 5000 * 5000 + 5000)
        assert server_process.memory - before < ALLOWED_GROWTH

        await stopped.until_events(30_000)
        rows = await table(db)
        assert faults(stopped.events, rows) == []
        assert faults(live.events, rows) == []


async def test_the_ring_is_bounded_and_who_falls_out_of_it_reads_the_table(
    server: Gateway, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "RING_EVENTS", 300)
    feed = feed_of(server)
    async with watching(server.stub) as stopped, watching(server.stub) as live:
        # Until what is not read has filled the buffers of the transport, and then the ring.
        pages = 0
        while all(feed.ring.has(reader) for reader in feed.ring._of_project[1]):
            assert pages < 50, "the reader that stopped is never left behind"
            new = (message(*HUNDRED, custom_args=LARGE) for _ in range(2))
            await enqueue(db, *new, lane=pages % 3)
            pages += 1
            nudge(server)
            await live.until_events(200 * pages)
            assert feed.ring.event_count <= 300
        await stopped.until_events(200 * pages)
        rows = await table(db)
        assert faults(stopped.events, rows) == []
        assert faults(live.events, rows) == []


async def test_a_page_larger_than_the_ring_is_read_from_the_table(
    server: Gateway, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "RING_EVENTS", 10)
    async with watching(server.stub) as stream:
        await enqueue(db, *(message(*HUNDRED) for _ in range(3)))
        nudge(server)
        await stream.until_events(300)
        await enqueue(db, message())
        nudge(server)
        await stream.until_events(301)
        assert faults(stream.events, await table(db)) == []
        assert feed_of(server).ring.event_count <= 10


async def test_a_thousand_streams_that_came_and_went_leave_nothing_behind(server: Gateway) -> None:
    feed = feed_of(server)
    tasks_before = len(asyncio.all_tasks())
    for _ in range(10):
        streams = await asyncio.gather(*(_opened(server) for _ in range(100)))
        assert feed.ring.reader_count == 100
        for stream in streams:
            stream.cancel()
        await until(lambda: feed.ring.reader_count == 0)
    await until(lambda: len(asyncio.all_tasks()) <= tasks_before)
    assert server.server._service._watch._streams == 0


async def _opened(server: Gateway) -> Any:
    stream = server.stub.WatchStatus(pb.WatchStatusRequest())
    assert (await stream.read()).caught_up
    return stream


async def test_streams_that_end_while_the_transport_holds_them_up_leave_nothing_behind(
    server: Gateway, db: Database
) -> None:
    async with watching(server.stub) as stream:
        begin = stream.token
    await enqueue(db, *(message(*HUNDRED, custom_args={"note": "x" * 250}) for _ in range(30)))
    for _ in range(20):
        held_up = Stream(server.stub, resume_token=begin)
        await held_up.read()
        held_up.call.cancel()
    await until(lambda: feed_of(server).ring.reader_count == 0)
    assert server.server._service._watch._streams == 0
