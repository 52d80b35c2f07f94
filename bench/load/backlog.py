"""Exactly so many random mails, by EnqueueBatch: what is to be drained, watched or weighed.

python -m bench.load.backlog TARGET COUNT   → one JSON line
"""

from __future__ import annotations

import asyncio
import json
import sys

import grpc
import uvloop

from bench.load.batches import payload
from mailgrpc.v1 import mail_service_pb2 as pb

_BATCH = 250
_AT_ONCE = 4
_METHOD = "/mailgrpc.v1.MailService/EnqueueBatch"


async def main(target: str, count: int) -> None:
    sizes = [min(_BATCH, count - first) for first in range(0, count, _BATCH)]
    taken = 0
    async with grpc.aio.insecure_channel(target) as channel:
        enqueue = channel.unary_unary(
            _METHOD, response_deserializer=pb.EnqueueBatchResponse.FromString
        )

        async def run() -> None:
            nonlocal taken
            while sizes:
                answer = await enqueue(payload(sizes.pop()))
                taken += sum(result.HasField("response") for result in answer.results)

        await asyncio.gather(*(run() for _ in range(_AT_ONCE)))
    print(json.dumps({"messages": taken}))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
