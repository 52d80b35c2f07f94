"""Hints over Redis: who listens for them, and how often one is sent that nobody hears."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from mailgrpc import doorbell as doorbell_module
from mailgrpc.config import Settings
from mailgrpc.doorbell import Doorbell
from mailgrpc.server import feed as feed_module
from tests.feed.reading import watching
from tests.gateway import Gateway, enqueue, until

CHANNEL = "mailgrpc:feed"


class Listeners:
    """How many listen, as Redis knows it."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def are(self, number: int) -> None:
        """Return when it is so many."""
        async with asyncio.timeout(10):
            while (await self._redis.pubsub_numsub(CHANNEL))[0][1] != number:
                await asyncio.sleep(0.01)


@pytest.fixture
async def listeners(settings: Settings) -> AsyncIterator[Listeners]:
    assert settings.redis_url is not None
    async with Redis.from_url(settings.redis_url) as redis:
        yield Listeners(redis)


async def test_a_server_listens_only_while_somebody_watches(
    server: Gateway,
    other_server: Gateway,
    listeners: Listeners,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed_module, "LISTENS_ON_S", 0.0)
    await listeners.are(0)
    async with watching(server.stub) as stream:
        await listeners.are(1)
        await other_server.stub.Enqueue(enqueue())
        await stream.until_events(1)
    await until(lambda: not server.server._feed.ring.reader_count)
    await other_server.stub.Enqueue(enqueue())  # its hint finds nobody who reads
    await listeners.are(0)
    async with watching(server.stub):
        await listeners.are(1)


@pytest.mark.parametrize("is_heard", [True, False])
async def test_a_hint_that_nobody_hears_is_not_soon_repeated(
    settings: Settings, listeners: Listeners, monkeypatch: pytest.MonkeyPatch, is_heard: bool
) -> None:
    monkeypatch.setattr(doorbell_module, "_UNHEARD_REST_S", 3600.0)
    assert settings.redis_url is not None
    doorbell, listener = Doorbell(settings.redis_url), Doorbell(settings.redis_url)
    sent = 0
    publish = doorbell._publish

    async def counted() -> bool:
        nonlocal sent
        heard = await publish()
        sent += 1
        return heard

    monkeypatch.setattr(doorbell, "_publish", counted)
    hints = listener.feed_hints()
    if is_heard:
        await anext(hints)
        await listeners.are(1)
    doorbell.hint_feed()
    await until(lambda: sent == 1)
    doorbell.hint_feed()
    if is_heard:
        await until(lambda: sent == 2)
    else:
        await asyncio.sleep(0)
        assert not doorbell._hinting.done()  # it rests, with the next one in hand
        assert sent == 1
        doorbell._hinting.cancel()
        doorbell._hinting = None
    await hints.aclose()
    await doorbell.close()
    await listener.close()
