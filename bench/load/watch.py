"""One subscriber of everything: how long after SENT was recorded it is told.

    python -m bench.load.watch TARGET   → "ready", then one JSON line when its input is closed

The time of an event is its `occurred_at`, which PostgreSQL writes as it records the outcome; so the
commit, the feed and the stream are all in what is measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import grpc
import uvloop

from bench.load.percentiles import of_times
from mailgrpc.v1 import delivery_pb2, mail_service_pb2_grpc
from mailgrpc.v1 import mail_service_pb2 as pb

_LAST_S = 1.5
"""For the last events: a hint may be lost, and a server looks by itself after a second."""


async def _closed_input() -> None:
    await asyncio.to_thread(sys.stdin.read)


async def main(target: str) -> None:
    late: list[float] = []
    async with grpc.aio.insecure_channel(target) as channel:
        stream = mail_service_pb2_grpc.MailServiceStub(channel).WatchStatus(pb.WatchStatusRequest())

        async def read() -> None:
            async for response in stream:
                now = time.time()
                if response.caught_up:
                    print("ready", flush=True)
                for event in response.events:
                    state = event.state_changed.delivery.state
                    if state == delivery_pb2.DELIVERY_STATE_SENT:
                        at = event.occurred_at
                        late.append(now - at.seconds - at.nanos / 1e9)

        reading = asyncio.create_task(read())
        await _closed_input()
        await asyncio.sleep(_LAST_S)
        reading.cancel()
        await asyncio.wait([reading])
    print(json.dumps(of_times(late)))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
