"""Readers of the feed, as a caller writes them, and what a whole history looks like."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from mailgrpc.core.ids import DELIVERY, EVENT, to_text
from mailgrpc.db.engine import Database
from mailgrpc.server.feed import Feed
from mailgrpc.v1 import mail_service_pb2 as pb
from tests.gateway import PATIENCE_S, Gateway
from tests.server.answers import Refusal, read_refusal


class Stream:
    """A WatchStatus call and what came of it."""

    def __init__(self, stub: Any, **request: Any) -> None:
        self.call = stub.WatchStatus(pb.WatchStatusRequest(**request))
        self.token = ""
        self.events: list[Any] = []
        self.snapshot: list[Any] = []
        self.caught_up = 0

    async def read(self, within_s: float = PATIENCE_S) -> Any:
        """The next response. Raises grpc.aio.AioRpcError where the server ended the stream."""
        async with asyncio.timeout(within_s):
            response = await self.call.read()
        assert response is not grpc.aio.EOF, "a stream ends by an error only"
        self.events += response.events
        self.snapshot += response.snapshot
        self.token = response.resume_token or self.token
        self.caught_up += response.caught_up
        return response

    async def until(self, condition: Callable[[Stream], bool]) -> None:
        """Read until `condition` holds."""
        while not condition(self):
            await self.read()

    async def until_caught_up(self) -> None:
        await self.until(lambda s: s.caught_up > 0)

    async def refusal(self) -> Refusal:
        """How the server ended the stream, whatever came before."""
        try:
            while True:
                await self.read()
        except grpc.aio.AioRpcError as error:
            return read_refusal(error)

    async def until_events(self, count: int) -> None:
        await self.until(lambda s: len(s.events) >= count)
        assert len(self.events) == count

    @property
    def ids(self) -> list[str]:
        return [e.event_id for e in self.events]


@contextlib.asynccontextmanager
async def watching(stub: Any, **request: Any) -> AsyncIterator[Stream]:
    """A stream that has caught up; cancelled in the end."""
    stream = Stream(stub, **request)
    try:
        await stream.until_caught_up()
        yield stream
    finally:
        stream.call.cancel()


def feed_of(server: Gateway) -> Feed:
    """The feed of a server in this process."""
    return server.server._feed


def nudge(server: Gateway) -> None:
    """Tell the server that somebody who rang nowhere has written events."""
    feed_of(server).wake()


async def all_after(stub: Any, token: str, **request: Any) -> list[Any]:
    """The events from a token to now."""
    async with watching(stub, resume_token=token, **request) as stream:
        return stream.events


async def table(db: Database, project_id: int = 1) -> list[Any]:
    """All events of a project in the database, by seq."""
    return await db.fetch("SELECT * FROM events WHERE project_id = $1 ORDER BY seq", project_id)


def event_id(row: Any) -> str:
    """How callers see the id of a row: seq, lane and fingerprint."""
    number = row["seq"] << 64 | row["lane"] << 48 | row["fingerprint"] & 0xFFFF_FFFF
    return to_text(EVENT, uuid.UUID(int=number))


def faults(seen: list[Any], rows: list[Any]) -> list[str]:
    """What is wrong with the events that a reader saw, given all that happened; nothing if whole."""
    happened = [event_id(row) for row in rows]
    count = Counter(e.event_id for e in seen)
    found = [f"{i} was lost" for i in happened if not count[i]]
    found += [f"{i} came {n} times" for i, n in count.items() if n > 1]
    found += [f"{i} never happened" for i in count.keys() - set(happened)]
    next_version: Counter[str] = Counter()
    for event in seen:
        delivery = event.state_changed.delivery
        next_version[delivery.delivery_id] += 1
        if delivery.version != next_version[delivery.delivery_id]:
            found.append(f"{delivery.delivery_id} version {delivery.version} is out of order")
            next_version[delivery.delivery_id] = delivery.version
    return found


async def states(db: Database) -> dict[str, tuple[int, int]]:
    """State and version of each delivery in the table."""
    rows = await db.fetch("SELECT id, state, version FROM deliveries")
    return {to_text(DELIVERY, row["id"]): (row["state"], row["version"]) for row in rows}
