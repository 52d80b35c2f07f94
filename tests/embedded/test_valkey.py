"""The embedded Valkey: a doorbell that both of our clients can ring."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import redis.asyncio
from arq.connections import RedisSettings, create_pool

from mailgrpc.embedded.valkey import EmbeddedValkey


async def test_redis_py_and_arq_take_the_url() -> None:
    with EmbeddedValkey() as valkey:
        client = redis.asyncio.Redis.from_url(valkey.url)
        assert await client.ping()
        assert await client.config_get("save", "appendonly") == {"save": "", "appendonly": "no"}
        await client.aclose()
        pool = await create_pool(RedisSettings.from_dsn(valkey.url))
        assert await pool.enqueue_job("drain")
        await pool.aclose()


def test_it_comes_back_at_the_same_url_and_leaves_nothing() -> None:
    valkey = EmbeddedValkey()
    assert valkey.start().startswith("9.")
    url = valkey.url
    private = Path(url.removeprefix("unix://")).parent
    assert private.stat().st_mode & 0o777 == 0o700
    assert valkey.process is not None
    os.kill(valkey.process.pid, signal.SIGKILL)
    assert valkey.process.ended.wait(5)
    valkey.start()
    assert valkey.url == url
    valkey.stop()
    assert not private.exists()
