"""A gateway in this process, and the shortest way to say what a test wants sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any

import grpc

from mailgrpc.config import Settings
from mailgrpc.db.engine import Database
from mailgrpc.providers.capture import CaptureProvider
from mailgrpc.server.app import MailServer
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import mail_service_pb2_grpc, message_pb2
from mailgrpc.worker.runtime import Worker

PATIENCE_S = 10.0
"""How long a test waits for what must come; only a failing test waits that long."""


class Gateway:
    """A server, a worker and their capture channels, in the running loop."""

    def __init__(self, settings: Settings, *, worker: bool = True) -> None:
        self.settings = settings
        self.database = Database(settings.database_url, pool_size=6)
        self.capture = CaptureProvider()
        self.channels = dict.fromkeys(settings.channels, self.capture)
        self.server = MailServer(settings, self.database, channels=self.channels)
        self.worker = Worker(settings, self.database, channels=self.channels) if worker else None

    async def __aenter__(self) -> Gateway:
        await self.database.open()
        self.target = str(await self.server.start())
        self.channel = grpc.aio.insecure_channel(self.target)
        self.stub = mail_service_pb2_grpc.MailServiceStub(self.channel)
        if self.worker is not None:
            await self.worker.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.channel.close()
        if self.worker is not None:
            await self.worker.stop()
        await self.server.stop(1.0)
        await self.database.close()

    async def status(self, message_id: str) -> Any:
        """The MessageStatus of a message."""
        response = await self.stub.GetStatus(pb.GetStatusRequest(message_id=message_id))
        return response.status

    async def ended(self, message_id: str) -> Any:
        """The MessageStatus once the message has ended."""
        status = await self.status(message_id)
        async with asyncio.timeout(PATIENCE_S):
            while not status.ended:
                await asyncio.sleep(0.01)
                status = await self.status(message_id)
        return status


def enqueue(
    *to: str, request_id: str = "", edit: Callable[[Any], None] | None = None, **fields: Any
) -> pb.EnqueueRequest:
    """An EnqueueRequest to these addresses; `fields` are those of MailMessage, `edit` the rest."""
    message = message_pb2.MailMessage(
        to=[message_pb2.Recipient(address=a) for a in to or ("ada@example.test",)],
        **{
            "sender": message_pb2.Mailbox(address="shop@example.test"),
            "subject": "Hello",
            "text": "A word.",
            **fields,
        },
    )
    request = pb.EnqueueRequest(request_id=request_id, message=message)
    if edit is not None:
        edit(request)
    return request


async def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds; fails after PATIENCE_S."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)
