"""EnqueueBatch as fast as answers come, over gRPC's own client: a batch is large, a call is not.

    python -m bench.load.batches TARGET SECONDS CONCURRENCY SIZE [MESSAGES]   → one JSON line

Requests are serialized before the clock starts. With MESSAGES, so many are sent, whatever SECONDS.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time

import grpc
import uvloop

from bench.load.mails import request
from mailgrpc.v1 import mail_service_pb2 as pb

PREPARED_A_SECOND = 12000
_METHOD = "/mailgrpc.v1.MailService/EnqueueBatch"


def payload(size: int) -> bytes:
    return pb.EnqueueBatchRequest(requests=[request() for _ in range(size)]).SerializeToString()


async def main(target: str, seconds: float, concurrency: int, size: int, messages: int = 0) -> None:
    batches = messages // size or max(int(PREPARED_A_SECOND * seconds / size), 8)
    left = [payload(size) for _ in range(batches)]
    latencies: list[float] = []
    accepted = refused = 0
    first_at = 0.0
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(target, options=options) for _ in range(2)]
    calls = [
        c.unary_unary(_METHOD, response_deserializer=pb.EnqueueBatchResponse.FromString)
        for c in channels
    ]
    stop_at = time.perf_counter() + (math.inf if messages else seconds)

    async def run(number: int) -> None:
        nonlocal accepted, refused, first_at
        call = calls[number % len(calls)]
        while left and time.perf_counter() < stop_at:
            body = left.pop()
            began = time.perf_counter()
            answer = await call(body)
            latencies.append(time.perf_counter() - began)
            first_at = first_at or time.time()
            good = sum(result.HasField("response") for result in answer.results)
            accepted += good
            refused += len(answer.results) - good

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(run(i) for i in range(concurrency)))
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    for channel in channels:
        await channel.close()
    latencies.sort()
    print(
        json.dumps(
            {
                "messages": accepted,
                "refused": refused,
                "first_at": first_at,
                "rate": accepted / took,
                "p50_ms": latencies[len(latencies) // 2] * 1e3,
                "p99_ms": latencies[int(len(latencies) * 0.99)] * 1e3,
                "generator_cpu": cpu / took,
                "ran_out": not left,
            }
        )
    )


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], *map(float, sys.argv[2:3]), *map(int, sys.argv[3:])))
