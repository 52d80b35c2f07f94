"""The load: a process of its own that calls one method as fast as answers come, with random mails.

python -m bench.load TARGET METHOD SECONDS CONCURRENCY BATCH   → one JSON line

Requests are serialized before the clock starts, so that the generator does little while it runs;
its own ceiling is what it reaches against the bare server.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
import uuid

import grpc
import uvloop

from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import message_pb2

PREPARED = 4000


def request() -> pb.EnqueueRequest:
    order = str(uuid.uuid4())
    return pb.EnqueueRequest(
        request_id=order,
        message=message_pb2.MailMessage(
            sender=message_pb2.Mailbox(address="shop@example.test", name="The Shop"),
            to=[message_pb2.Recipient(address=f"{os.urandom(6).hex()}@example.test")],
            subject="Your receipt",
            text=os.urandom(300).hex(),
            custom_args={"order": order},
        ),
    )


def payloads(batch: int, count: int) -> list[bytes]:
    if batch == 1:
        return [request().SerializeToString() for _ in range(count)]
    return [
        pb.EnqueueBatchRequest(requests=[request() for _ in range(batch)]).SerializeToString()
        for _ in range(max(count // batch, 8))
    ]


async def main(target: str, method: str, seconds: float, concurrency: int, batch: int) -> None:
    left = payloads(batch, int(PREPARED * max(seconds, 1)))
    latencies: list[float] = []
    channels = [
        grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(4)
    ]
    calls = [
        c.unary_unary(f"/mailgrpc.v1.MailService/{method}", request_serializer=None)
        for c in channels
    ]
    stop_at = time.perf_counter() + seconds

    async def run(number: int) -> None:
        call = calls[number % len(calls)]
        while left and time.perf_counter() < stop_at:
            payload = left.pop()
            began = time.perf_counter()
            await call(payload)
            latencies.append(time.perf_counter() - began)

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(run(i) for i in range(concurrency)))
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    for channel in channels:
        await channel.close()
    latencies.sort()
    print(
        json.dumps(
            {
                "rate": len(latencies) * batch / took,
                "p50_ms": latencies[len(latencies) // 2] * 1e3,
                "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
                "generator_cpu": cpu / took,
                "messages": len(latencies) * batch,
                "ran_out": not left,
            }
        )
    )


if __name__ == "__main__":
    random.seed()
    target, method, seconds, concurrency, batch = sys.argv[1:]
    uvloop.run(main(target, method, float(seconds), int(concurrency), int(batch)))
