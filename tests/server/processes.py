"""A `mailgrpc serve` of its own, as an operator starts it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator

import grpc

from mailgrpc.config import Settings
from mailgrpc.v1 import mail_service_pb2_grpc
from tests.gateway import PATIENCE_S


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[mail_service_pb2_grpc.MailServiceStub]:
    """A server process over the database of these settings, and a stub that calls it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAILGRPC_")}
    environment |= {
        "MAILGRPC_DATABASE_URL": settings.database_url or "",
        "MAILGRPC_REDIS_URL": settings.redis_url or "",
        "MAILGRPC_CHANNEL_URL": "capture:",
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mailgrpc", "serve", "--listen", "127.0.0.1:0"),
        env=environment,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(2 * PATIENCE_S):
            target = await _target_of(process)
        async with grpc.aio.insecure_channel(target) as channel:
            yield mail_service_pb2_grpc.MailServiceStub(channel)
    finally:
        process.terminate()
        async with asyncio.timeout(PATIENCE_S):
            assert process.stderr is not None
            await process.stderr.read()
            assert await process.wait() == 0


async def _target_of(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    async for line in process.stderr:
        if found := re.search(rb"serving on (\S+)", line):
            return found[1].decode()
    raise AssertionError("the server ended before it served")
