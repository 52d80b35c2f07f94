"""One subscriber of everything: when it is told that a delivery was SENT.

    python -m bench.load.watch TARGET   → "ready", then one JSON line when its input is closed

The line has the Unix time of each, by the delivery's id.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import grpc
import uvloop

from mailgrpc.v1 import delivery_pb2, mail_service_pb2_grpc
from mailgrpc.v1 import mail_service_pb2 as pb

_LAST_S = 1.5
"""For the last events: a hint may be lost, and a server looks by itself after a second."""


async def _closed_input() -> None:
    await asyncio.to_thread(sys.stdin.read)


async def main(target: str) -> None:
    told: dict[str, float] = {}
    async with grpc.aio.insecure_channel(target) as channel:
        stream = mail_service_pb2_grpc.MailServiceStub(channel).WatchStatus(pb.WatchStatusRequest())

        async def read() -> None:
            async for response in stream:
                now = time.time()
                if response.caught_up:
                    print("ready", flush=True)
                for event in response.events:
                    delivery = event.state_changed.delivery
                    if delivery.state == delivery_pb2.DELIVERY_STATE_SENT:
                        told[delivery.delivery_id] = now

        reading = asyncio.create_task(read())
        await _closed_input()
        await asyncio.sleep(_LAST_S)
        reading.cancel()
        await asyncio.wait([reading])
    print(json.dumps(told))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
