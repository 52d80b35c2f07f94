"""A Redis pub/sub round trip: published on one connection, received on another, by one client.

    python -m bench.counterparts.pubsub URL RATE   → "ready", then one JSON line when its input is
    closed

A message holds the time at which it was published. They are published at a steady rate, so that
the round trip is measured under the same load as what it is compared with, and all along it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import redis.asyncio
import uvloop

from bench.load.percentiles import of_times

_CHANNEL = "bench"


async def main(url: str, rate: float) -> None:
    times: list[float] = []
    async with (
        redis.asyncio.Redis.from_url(url) as publisher,
        redis.asyncio.Redis.from_url(url) as subscriber,
        subscriber.pubsub() as subscription,
    ):
        await subscription.subscribe(_CHANNEL)

        async def receive() -> None:
            async for message in subscription.listen():
                if message["type"] == "message":
                    times.append(time.time() - float(message["data"]))
                else:
                    print("ready", flush=True)

        async def publish() -> None:
            while True:
                await publisher.publish(_CHANNEL, repr(time.time()))
                await asyncio.sleep(1 / rate)

        tasks = [asyncio.create_task(receive()), asyncio.create_task(publish())]
        await asyncio.to_thread(sys.stdin.read)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    print(json.dumps(of_times(times)))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], float(sys.argv[2])))
