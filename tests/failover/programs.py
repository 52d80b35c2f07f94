"""`mailgrpc serve` and `work` as an operator runs them, and callers that do not give up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import mail_service_pb2_grpc, message_pb2
from tests.gateway import enqueue

PATIENCE_S = 30.0
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class Program:
    """A process of ours and where it writes what it says."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def said(self) -> str:
        return self._log.read_text()

    async def says(self, pattern: str) -> re.Match[str]:
        """Wait until it has said something like this."""
        async with asyncio.timeout(PATIENCE_S):
            while (found := re.search(pattern, self.said)) is None:
                assert self.process.returncode is None, self.said
                await asyncio.sleep(0.02)
        return found


@contextlib.asynccontextmanager
async def running(log: Path, *command: str, **env: str) -> AsyncIterator[Program]:
    """`python -m mailgrpc command…`; it must live until the end, and then end well."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MAILGRPC_")}
    with log.open("w") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mailgrpc", *command), env=environ | env, stderr=file
        )
    program = Program(process, log)
    try:
        yield program
        assert process.returncode is None, program.said
        process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            assert await process.wait() == 0, program.said
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def installation(
    directory: Path, database_url: str, redis_url: str, channel_url: str
) -> AsyncIterator[mail_service_pb2_grpc.MailServiceStub]:
    """A server and a worker, and a stub that calls the server."""
    env = {
        "MAILGRPC_DATABASE_URL": database_url,
        "MAILGRPC_REDIS_URL": redis_url,
        "MAILGRPC_CHANNEL_URL": channel_url,
        "MAILGRPC_DATA_DIR": str(directory),
        "MAILGRPC_GRACE_S": "5",
    }
    async with (
        running(directory / "serve.log", "serve", "--listen", "127.0.0.1:0", **env) as server,
        running(directory / "work.log", "work", **env) as worker,
    ):
        target = (await server.says(r"serving on (\S+)"))[1]
        await worker.says("working on")
        async with grpc.aio.insecure_channel(target) as channel:
            yield mail_service_pb2_grpc.MailServiceStub(channel)


class Load:
    """Callers that enqueue one message after the other, each until it is acknowledged."""

    def __init__(self, stub: Any, callers: int) -> None:
        self._stub = stub
        self.acknowledged: dict[str, str] = {}  # request_id -> message_id
        self.refused = 0
        self.longest_s = 0.0
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._call(n)) for n in range(callers)]

    async def until(self, count: int) -> None:
        """Wait until so many are acknowledged."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.acknowledged) < count:
                for task in self._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """What is under way is still acknowledged."""
        self._stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*self._tasks)

    async def _call(self, caller: int) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            request_id = f"{'once' if number % 2 else 'retry'}-{caller}-{number}"
            self.acknowledged[request_id] = await self._insist(request_id)
            await asyncio.sleep(0.01)  # a caller has something else to do

    async def _insist(self, request_id: str) -> str:
        request = enqueue("ada@example.org", request_id=request_id, subject=request_id)
        if request_id.startswith("once"):
            request.options.mode = message_pb2.DELIVERY_MODE_SEND_ONCE
        clock = asyncio.get_running_loop().time
        while True:
            asked_at = clock()
            try:
                answer = await self._stub.Enqueue(request, timeout=5)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _PASSING:
                    raise
                self.refused += 1
                await asyncio.sleep(0.05)
            else:
                return str(answer.message_id)
            finally:
                self.longest_s = max(self.longest_s, clock() - asked_at)


class Watcher:
    """A subscriber who resumes with the token whenever the stream breaks."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self.token = ""
        self.events: list[Any] = []
        self.breaks = 0
        self.ended: grpc.aio.AioRpcError | None = None
        self._task = asyncio.create_task(self._run())

    async def until(self, *, caught_up_at: int) -> None:
        """Wait until so many events have come."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.events) < caught_up_at:
                assert not self._task.done(), self.ended
                await asyncio.sleep(0.02)

    async def until_begun(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not self.token:
                await asyncio.sleep(0.01)

    async def until_ended(self) -> grpc.aio.AioRpcError:
        """Wait for an end that a token does not help over."""
        async with asyncio.timeout(PATIENCE_S):
            await self._task
        assert self.ended is not None
        return self.ended

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            call = self._stub.WatchStatus(pb.WatchStatusRequest(resume_token=self.token))
            try:
                async for response in call:
                    self.events += response.events
                    self.token = response.resume_token or self.token
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    self.ended = error
                    return
                self.breaks += 1
                await asyncio.sleep(0.05)
