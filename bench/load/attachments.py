"""Enqueue of mails with a large attachment, so many in flight, over gRPC's own client.

    python -m bench.load.attachments TARGET MESSAGES BYTES IN_FLIGHT   → one JSON line

What is in flight together is more than the server's queue holds (64 MiB), so some calls are refused
with RESOURCE_EXHAUSTED, as they should be; they are repeated with the same request_id a moment
later. The clock runs from the first call, because a
first acknowledgement comes late here. Requests are serialized before.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

import grpc
import uvloop

from bench.load.mails import request
from mailgrpc.v1 import mail_service_pb2 as pb

_METHOD = "/mailgrpc.v1.MailService/Enqueue"
_RETRY_S = 0.1


async def main(target: str, messages: int, size: int, in_flight: int) -> None:
    left = [request(attachment_bytes=size).SerializeToString() for _ in range(messages)]
    accepted = failed = refused = 0
    async with grpc.aio.insecure_channel(target) as channel:
        call = channel.unary_unary(_METHOD, response_deserializer=pb.EnqueueResponse.FromString)

        async def run() -> None:
            nonlocal accepted, failed, refused
            while left:
                body = left.pop()
                while True:
                    try:
                        await call(body)
                    except grpc.aio.AioRpcError as error:
                        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                            refused += 1
                            await asyncio.sleep(_RETRY_S * (0.5 + random.random()))
                            continue
                        failed += 1
                    else:
                        accepted += 1
                    break

        began_at = time.time()
        await asyncio.gather(*(run() for _ in range(in_flight)))
    print(
        json.dumps(
            {"messages": accepted, "failed": failed, "refused": refused, "began_at": began_at}
        )
    )


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], *map(int, sys.argv[2:])))
